"""A model exported as a plain Qwen2-VL: stock transformers loads it, and it says what the model itself says."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from support.openai_server import PlainQwen
from support.oracle import STOCK
from support.running_server import data_url
from support.scripted_model import QUESTION, picture
from support.synthetic import TINY
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

import relook
from relook.cli.app import app
from relook.errors import UserError
from relook.model.export import export, vllm_command
from relook.model.loading import save_new
from relook.model.new import build
from relook.model.published import convert


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export("cards-tiny", tmp_path_factory.mktemp("export") / "plain")


def test_stock_qwen2_vl_loads_it_whole_and_gives_the_same_logits(exported):
    vlm = relook.load("cards-tiny")
    plain, info = Qwen2VLForConditionalGeneration.from_pretrained(
        exported, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    chat = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": QUESTION}]}]
    inputs = vlm.processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    with torch.no_grad():
        ours, theirs = vlm.model(**inputs).logits, plain(**inputs).logits
    assert torch.equal(ours, theirs)


def test_every_base_is_exported_as_its_own_stock_class(base, tmp_path):
    model, processor = build(replace(TINY, base=base), seed=2)
    plain, info = STOCK[base][1].from_pretrained(
        export(save_new(model, processor, tmp_path / "model"), tmp_path / "plain"), output_loading_info=True
    )
    assert not any(info.values())
    chat = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": QUESTION}]}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, plain.eval()(**inputs).logits)


def test_the_published_layout_by_the_command(tmp_path, capsys):
    convert("cards-tiny", tmp_path / "published", to="published")
    with pytest.raises(SystemExit) as left:
        app(["models", "export", str(tmp_path / "published"), "--out", str(tmp_path / "plain")])
    written, serve = capsys.readouterr().out.splitlines()
    assert left.value.code == 0 and written == f"written: {tmp_path / 'plain'}" and "vllm serve" in serve
    with safe_open(tmp_path / "plain" / "model.safetensors", "pt") as plain:
        names = set(plain.keys())
    assert {name.split(".")[0] for name in names} == {"model", "visual"}  # tied; no projector
    with pytest.raises(SystemExit) as left:
        app(["models", "export", "cards-tiny", "--for", "mlx", "--out", str(tmp_path / "out")])
    assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("first", ["text", "image"])
def test_its_template_and_tokens_are_the_models_own(exported, first):
    vlm = relook.load("cards-tiny")
    stock = PlainQwen(exported)
    seen = vlm.processor.view(picture(), "first")
    parts = [{"type": "image_url", "image_url": {"url": data_url(seen)}}, {"type": "text", "text": QUESTION}]
    message = {"role": "user", "content": parts if first == "image" else parts[::-1]}
    ours = vlm.processor.encode_item(
        {
            "messages": [{"role": "user", "content": vlm.processor.first_turn(QUESTION)}],
            "images": [picture()],
        },
        labels=False,
    )
    theirs = stock.inputs([message], add_generation_prompt=True)
    assert theirs["input_ids"][0].tolist() == ours["input_ids"]
    assert torch.equal(theirs["pixel_values"], ours["pixel_values"])
    assert stock.model.generation_config.eos_token_id == vlm.model.generation_config.eos_token_id


def test_published_order_of_question_and_image(tiny_vlm, tmp_path):
    vlm = tiny_vlm(("region",))
    vlm.model.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    folder = export(tmp_path / "model", tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen = "<|vision_start|><|image_pad|><|vision_end|>"
    image, text = {"type": "image"}, {"type": "text", "text": " Q?\n"}

    def rendered(*parts, role="user"):
        turn = tokenizer.apply_chat_template([{"role": role, "content": list(parts)}], tokenize=False)
        return turn.removeprefix("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")

    assert rendered(text, image) == rendered(image, text) == f"<|im_start|>user\n{seen}\nQ?<|im_end|>\n"
    assert rendered(image) == f"<|im_start|>user\n{seen}<|im_end|>\n"
    several = ({"type": "text", "text": "Region 0: "}, image, {"type": "text", "text": "\nRegion 1: "}, image)
    assert rendered(*several) == f"<|im_start|>user\nRegion 0: {seen}\nRegion 1: {seen}<|im_end|>\n"


def test_the_folder_is_one_of_qwen2_vls(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"] and config["model_type"] == "qwen2_vl"
    assert not {key for key in config if "clip" in key or "para" in key or key in ("looks", "domain", "provenance")}
    images = json.loads((exported / "preprocessor_config.json").read_text())
    assert images["image_processor_type"] == "Qwen2VLImageProcessor" and images["patch_size"] == 8
    assert json.loads((exported / "tokenizer_config.json").read_text())["processor_class"] == "Qwen2VLProcessor"
    assert not (exported / "processor_config.json").exists()


def test_how_vllm_is_told_of_sections(exported, tiny_vlm, tmp_path):
    """vLLM has three sections of M-RoPE, or channels by turns: the tiny models' sixteen sections of one."""
    command = vllm_command(exported)
    override = json.loads(shlex.split(command)[-1])["text_config"]["rope_parameters"]
    assert override["mrope_section"] == [6, 5, 5] and override["mrope_interleaved"] and str(exported) in command
    vlm = tiny_vlm(("region",))
    vlm.model.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    assert "override" not in vllm_command(export(tmp_path / "model", tmp_path / "plain"))


def test_refusals_leave_nothing(tmp_path, tiny_vlm, monkeypatch):
    with pytest.raises(UserError, match="'mlx' is no engine"):
        export("cards-tiny", tmp_path / "out", "mlx")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(UserError, match="already there"):
        export("cards-tiny", tmp_path / "full")
    vlm = tiny_vlm(("region",))
    vlm.model.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "position_mode": "sequential"}))
    with pytest.raises(UserError, match=r"'sequential'.*relook serve"):
        export(tmp_path / "model", tmp_path / "out")

    def full_disk(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("relook.model.export._save_processor", full_disk)
    with pytest.raises(OSError):
        export("cards-tiny", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "model"]
