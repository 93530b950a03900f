"""Processors of each base's own folder: the ids and pixels of its stock processor, and of training with looks.

The folders have the real vocabulary, the base's chat template (fixtures/chat_templates) and its image processor.
"""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
import transformers
from support import TESTS
from support.small_processors import as_chat, page
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from relook.bases import BASES
from relook.looks import LOOKS
from relook.processing import View, VPTQwen2VLProcessor

DATA = TESTS / "fixtures" / "parity" / "data"
SAMPLES = [each["sample"] for each in json.loads((DATA / "data_pipeline.json").read_text())["samples"]]
TEMPLATES = {"qwen2_vl": "qwen2_vl", "qwen2_5_vl": "qwen2_vl", "qwen3_vl": "qwen3_vl"}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
PREPROCESSING = {  # what preprocessor_config.json on the hub says
    "qwen2_vl": {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056, **CLIP},
    "qwen2_5_vl": {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056, **CLIP},
    "qwen3_vl": {
        "patch_size": 16,
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}


@pytest.fixture(scope="module", params=list(BASES))
def row(request):
    return BASES[request.param]


@pytest.fixture(scope="module")
def folder(row, qwen_folder, tmp_path_factory):
    return folder_of(row, qwen_folder, tmp_path_factory.mktemp(row.plain))


def folder_of(row, qwen_folder, place, holds="chat_template.jinja"):
    """A base's folder, its chat template in one of the files where folders have it."""
    shutil.copytree(qwen_folder, place, dirs_exist_ok=True)
    values = {"merge_size": 2, "temporal_patch_size": 2, "image_processor_type": "Qwen2VLImageProcessor"}
    values |= {**PREPROCESSING[row.plain], "processor_class": f"{row.stock}Processor"}
    (place / "preprocessor_config.json").write_text(json.dumps(values))
    path = place / holds
    if path.suffix == ".jinja":
        path.write_text(template(row))
    else:
        held = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**held, "chat_template": template(row)}))
    return place


def template(row):
    return (TESTS / "fixtures" / "chat_templates" / f"{TEMPLATES[row.plain]}.jinja").read_text()


@pytest.fixture(scope="module")
def ours(row, folder):
    """The processor of a plain folder with every look, as `model.start` opens it."""
    processor = VPTQwen2VLProcessor.from_pretrained(folder, system=row.system, looks=list(LOOKS))
    processor.add_look_tokens()
    return processor


@pytest.fixture(scope="module")
def stock(row, folder):
    """The stock processor, without the video processor that needs torchvision."""
    kind = getattr(transformers, f"{row.stock}Processor")

    class Stock(kind):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    return Stock(images, AutoTokenizer.from_pretrained(folder), template(row))


def said(role, *parts):
    return {"role": role, "content": [part if isinstance(part, dict) else text(part) for part in parts]}


def text(words):
    return {"type": "text", "text": words}


def picture(width=301, height=200, seed=0):
    return {"type": "image", "image": page(width, height, seed)}


CHATS = {
    "one question": [said("user", picture(), "\nWho is it?")],
    "words": [said("user", "Hello.")],
    "two images": [said("user", picture(), "\n", picture(500, 90, 1), "\nWhich is wider?")],
    "a system prompt": [{"role": "system", "content": "Be brief."}, said("user", picture(), "\nWho is it?")],
    "a follow-up": [
        said("user", picture(), "\nWho is it?"),
        said("assistant", "Ada."),
        said("user", "Where?"),
    ],
}


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_without_looks_it_writes_what_the_stock_processor_writes(ours, stock, chat):
    as_it_is = copy.copy(ours)
    as_it_is.first_look = View(None)
    asked = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    found, wanted = as_it_is.apply_chat_template(chat, **asked), stock.apply_chat_template(chat, **asked)
    assert found["input_ids"].tolist() == wanted["input_ids"].tolist()
    assert found.keys() >= wanted.keys() and ("pixel_values" in wanted) == (chat is not CHATS["words"])
    for name in set(wanted) - {"input_ids"}:
        assert torch.equal(found[name], wanted[name]), name


@pytest.mark.parametrize("sample", SAMPLES, ids=range(len(SAMPLES)))
def test_with_looks_its_template_writes_what_training_reads(ours, sample):
    encoded = ours.encode_item(sample, image_root=DATA)
    asked = dict(tokenize=True, return_dict=True, return_tensors="pt")
    out = ours.apply_chat_template(as_chat(sample, DATA), **asked)
    assert out["input_ids"][0].tolist() == [*encoded["input_ids"], *ours.tokenizer.encode("\n")]
    for name in set(encoded) - {"input_ids", "labels", "prompt_ids"}:
        assert torch.equal(out[name], encoded[name]), name


def test_the_system_turn_is_the_bases_own(row, ours, stock):
    opening = ours.decode(ours.user_ids("Who?", opening=True))
    chat = [{"role": "user", "content": "Who?"}]
    assert opening == stock.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert ("You are a helpful assistant." in opening) == bool(row.system)


@pytest.mark.parametrize("holds", ["chat_template.json", "tokenizer_config.json"])
def test_the_template_is_found_where_older_folders_have_it(qwen_folder, tmp_path, holds):
    row = BASES["qwen3_vl_vpt"]
    place = folder_of(row, qwen_folder, tmp_path, holds)
    assert VPTQwen2VLProcessor.from_pretrained(place).chat_template == template(row)
