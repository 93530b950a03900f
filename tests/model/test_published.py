"""A published folder is one model and processor by `relook.load` and by the Auto classes, also saved again."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from support.parity import MODELS, folder, tensors
from support.small_processors import processor_of
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Qwen2VLProcessor

import relook
from relook.looks import LOOKS
from relook.model import VPTQwen2VLConfig, VPTQwen2VLProcessor
from relook.model.loading import load_model, load_processor, read_config
from relook.model.published import PUBLISHED, convert


@torch.no_grad()
def logits(model, name):
    batch = tensors(folder(name) / "batch_right.safetensors")
    return model.eval()(**batch).logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("name", MODELS)
def test_auto_classes_run_a_published_model_as_relook_does(name, tmp_path):
    """The condition was a matter of the command line: what config.json says of it (1 pass) is not what was trained."""
    assert json.loads((folder(name) / "config.json").read_text())["num_inner_forward_run"] == 1
    expected = logits(load_model(folder(name), device="cpu"), name)
    assert AutoConfig.from_pretrained(folder(name)).to_dict().items() >= read_config(folder(name)).to_dict().items()
    by_file = AutoConfig.from_pretrained(folder(name) / "config.json")
    assert by_file.encoders == read_config(folder(name)).encoders
    auto = AutoModelForImageTextToText.from_pretrained(folder(name))
    assert auto.config.num_inner_forward_run == 2
    assert torch.equal(logits(auto, name), expected)
    auto.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path, device="cpu"), name), expected)
    assert torch.equal(logits(AutoModelForImageTextToText.from_pretrained(tmp_path), name), expected)


def published_folder(place, row, named="Qwen2VLProcessor"):
    """A published checkpoint as far as its processor goes: tokenizer, preprocessor_config.json, config.json.

    transformers 4.45 wrote the name of Qwen2-VL's processor into both.
    """
    processor_of(looks=("region", row.look)).save_pretrained(place)
    (place / "processor_config.json").unlink()
    processor_of().image_processor.save_pretrained(place)
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        values = json.loads((place / name).read_text())
        (place / name).write_text(json.dumps(values | {"processor_class": named}))
    values = json.loads((folder("clip") / "config.json").read_text()) | {"vision_encoder_ls": [LOOKS[row.look].encoder]}
    (place / "config.json").write_text(json.dumps(values | {"alignment": row.alignment}))
    return place


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("cached", [False, True], ids=["folder", "snapshot of the hub"])
def test_a_processor_knows_its_looks_and_whether_it_is_prompted(name, cached, tmp_path):
    place = tmp_path / (f"models--rp-yu--{name}/snapshots/0a1b2c" if cached else name)
    place.mkdir(parents=True)
    published_folder(place, PUBLISHED[name])
    assert relook.__version__  # importing relook is what registers the classes
    found = [load_processor(place), AutoProcessor.from_pretrained(place)]
    for processor in found:
        assert processor.looks == ["region", PUBLISHED[name].look]
        assert processor.free_choice == ("NoPrompt" in name)
    found[1].save_pretrained(tmp_path / "elsewhere")
    again = AutoProcessor.from_pretrained(tmp_path / "elsewhere")
    assert (again.looks, again.free_choice) == (found[0].looks, found[0].free_choice)
    assert read_config(place).provenance["source"] == name
    assert read_config(place).num_inner_forward_run == (1 if PUBLISHED[name].alignment else 2)


def test_a_converted_model_keeps_what_its_name_said(tmp_path):
    place = published_folder(tmp_path / "Qwen2-VL-2b-VPT-CLIP-NoPrompt", PUBLISHED["Qwen2-VL-2b-VPT-CLIP"])
    shutil.copyfile(folder("clip") / "config.json", place / "config.json")
    shutil.copyfile(folder("clip") / "model.safetensors", place / "model.safetensors")
    for target, to in (("ours", "relook"), ("back", "published")):
        place = convert(place, tmp_path / target, to=to)
        assert load_processor(place).free_choice and load_processor(place).looks == ["region", "clip"]


def test_a_folder_that_names_no_processor(tmp_path):
    place = published_folder(tmp_path, PUBLISHED["Qwen2-VL-2b-VPT-Seg"], named=None)
    assert AutoProcessor.from_pretrained(place).looks == ["region", "seg"]


def test_plain_qwen2_vl_keeps_its_own_processor(tmp_path, monkeypatch):
    place = published_folder(tmp_path, PUBLISHED["Qwen2-VL-2b-VPT-Seg"])
    monkeypatch.setattr(Qwen2VLProcessor, "from_pretrained", lambda name, **kwargs: ("stock", name))
    for config in ({"model_type": "qwen2_vl"}, None):
        (place / "config.json").write_text(json.dumps(config)) if config else (place / "config.json").unlink()
        assert AutoProcessor.from_pretrained(place) == ("stock", place)


@pytest.mark.parametrize("name", MODELS)
def test_every_way_to_the_config_is_run_with_the_condition(name, tmp_path):
    path = folder(name) / "config.json"
    ways = [VPTQwen2VLConfig.from_json_file(path), VPTQwen2VLConfig(**json.loads(path.read_text()))]
    for config in [*ways, VPTQwen2VLConfig.from_dict(json.loads(path.read_text()))]:
        assert config.num_inner_forward_run == 2
        assert set(config.encoders) == {look for look in config.reencodings if look != "clip"}
        config.num_inner_forward_run = 1  # said afterwards, it stays said
        config.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).num_inner_forward_run == 1


def test_no_prompt_is_told_by_the_folder_however_it_is_reached(tmp_path, monkeypatch):
    place = tmp_path / "Qwen2-VL-2b-VPT-Det-NoPrompt"
    place.mkdir()
    published_folder(place, PUBLISHED["Qwen2-VL-2b-VPT-Det-NoPrompt"])
    (tmp_path / "link").symlink_to(place)
    monkeypatch.chdir(place)
    for name, options in ((".", {}), (tmp_path / "link", {}), (tmp_path, {"subfolder": place.name})):
        assert VPTQwen2VLProcessor.from_pretrained(name, **options).free_choice, name
