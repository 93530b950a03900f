"""Checkpoints: strict loading, self-describing, both layouts, transformers' Auto classes."""

from __future__ import annotations

import copy
import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hub_totals import HUB_TOTALS
from support.oracle import STOCK
from support.parity import MODELS, encoder_configs, folder, tensors
from support.tiny_model import conversation, stack, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    Dinov2Config,
    Dinov2Model,
    SamConfig,
    SamModel,
)

import relook
from relook.bases import HUB
from relook.errors import CheckpointError, UserError
from relook.model import VPTQwen2VLConfig
from relook.model.loading import count_parameters, inspect, load_model, load_processor, resolve
from relook.model.published import PUBLISHED, convert, published_config
from relook.model.start import Start, open_start


def load_published(folder, **settings):
    return load_model(folder, dtype="float32", device="cpu", **settings)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_the_published_checkpoints(name):
    total = sum(count_parameters(VPTQwen2VLConfig(**published_config(name))).values())
    assert round(total / 1e9, 2) == PUBLISHED[name].billions


@pytest.mark.parametrize("name", HUB)
def test_parameter_counts_of_the_bases_on_the_hub(name):
    settings, kind = STOCK[HUB[name].base.model_type]
    with torch.device("meta"):
        model = kind(settings(**HUB[name].config()))
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == HUB_TOTALS[name]


@pytest.fixture
def clip(tmp_path):
    """A writable copy of the published-format clip fixture, without its recordings."""
    target = tmp_path / "published"
    target.mkdir()
    for name in ("config.json", "model.safetensors", "generation_config.json", "encoder_config.json"):
        shutil.copyfile(folder("clip") / name, target / name)
    return target


def answer(model):
    batch = tensors(folder("clip") / "batch_right.safetensors")
    with torch.no_grad():
        return model(**batch).logits


def test_bin_shards_load_like_safetensors(clip):
    expected = answer(load_published(clip))
    weights = load_file(clip / "model.safetensors")
    (clip / "model.safetensors").unlink()
    names = sorted(weights)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({k: weights[k] for k in part}, clip / shard)
        index |= dict.fromkeys(part, shard)
    (clip / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert torch.equal(answer(load_published(clip)), expected)


def test_missing_weights_raise_with_their_names(clip):
    weights = load_file(clip / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    weights["model.layers.9.mlp.up_proj.weight"] = torch.zeros(128, 64)
    save_file(weights, clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        load_published(clip)
    message = str(error.value)
    assert "1 missing: model.language_model.layers.1.mlp.up_proj.weight" in message
    assert "1 unexpected: " in message and "layers.9.mlp.up_proj.weight" in message


def test_wrong_shapes_raise(clip):
    weights = load_file(clip / "model.safetensors")
    weights["visual.blocks.0.attn.proj.weight"] = torch.zeros(8, 8)
    save_file(weights, clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 mismatched: model\.visual\.blocks\.0\.attn\.proj\.weight"):
        load_published(clip)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "no weights here"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken"), "not a readable weight file"),
        (lambda f: (f / "config.json").write_text("{"), "not a readable JSON file"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "model_type is 'llama'"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
    ],
)
def test_corrupt_folders_raise_with_the_reason(clip, spoil, message):
    spoil(clip)
    with pytest.raises(UserError, match=message):
        load_model(clip)


def test_pickles_are_never_run(clip, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    (clip / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, clip / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        load_published(clip)
    assert not (tmp_path / "owned").exists()


def test_unknown_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="unknown model 'nobody'"):
        resolve("nobody")
    with pytest.raises(UserError, match=r"no-one/no-model: no such folder"):
        resolve("no-one/no-model")


@pytest.mark.parametrize("name", MODELS)
def test_convert_there_and_back_changes_no_number(name, tmp_path):
    given = encoder_configs(name)
    ours, back = tmp_path / "ours", tmp_path / "back"
    convert(folder(name), ours, to="relook", encoder_config=given)
    convert(ours, back, to="published")
    before = load_published(folder(name), encoder_config=given).state_dict()
    for path in (ours, back):  # both know their encoders without being told
        after = load_model(path).state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[k], v) for k, v in before.items())
    stored = torch.load(back / "pytorch_model.bin", weights_only=True)
    assert set(load_file(folder(name) / "model.safetensors")) <= set(stored)
    with pytest.raises(UserError, match="already there"):
        convert(folder(name), ours)


def test_save_and_auto_classes_round_trip(base, tmp_path):
    model = tiny_model()
    batch = stack([conversation(("clip", "seg"), 1), conversation(("detection",), 2)])
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is type(AutoModelForMultimodalLM.from_pretrained(tmp_path)) is type(model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    assert model.config.model_type == base
    with torch.no_grad():
        # Of a copy: loaded weights lie in the file's pages, and a product of unaligned ones is summed in another order.
        assert torch.equal(copy.deepcopy(again)(**batch).logits, model(**batch).logits)
    assert relook  # importing relook is what registers the classes
    shown = inspect(tmp_path)
    assert shown["looks"] == ["region", "clip", "detection", "seg"]
    assert sum(shown["parameters"].values()) == sum(
        p.numel() for _, p in model.named_parameters(remove_duplicate=False)
    )


def test_new_model_from_plain_parts(base, tmp_path):
    """A plain base, DINOv2 and SAM folders, written by transformers itself, become one model with their numbers."""
    from support.qwen2vl_folder import plain_qwen2_vl

    plain = plain_qwen2_vl(tmp_path / "base")
    torch.manual_seed(0)
    dino = Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=56)).eval()
    dino.save_pretrained(tmp_path / "dino")
    vision = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_dim=32, global_attn_indexes=[])
    sam = SamModel(SamConfig(vision_config=vision)).eval()
    sam.save_pretrained(tmp_path / "sam")
    looks = ["region", "clip", "detection", "seg"]
    places = {"start": str(tmp_path / "base"), "detection": str(tmp_path / "dino"), "seg": str(tmp_path / "sam")}
    model, processor = open_start(Start(**places, looks=looks), seed=3)
    assert model.config.looks == looks
    stock, info = STOCK[base][1].from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(info.values())
    ids = torch.tensor([plain])
    with torch.no_grad():
        old = stock(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits[..., : old.shape[-1]], old)
        pixels = torch.randn(1, 3, 224, 224)
        torch.testing.assert_close(
            model.encode("detection", detection_images=pixels)[0], dino(pixels).last_hidden_state[0, 1:]
        )
    same, _ = open_start(Start(**places, looks=looks), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    model.save_pretrained(tmp_path / "new")
    processor.save_pretrained(tmp_path / "new")
    again = load_model(tmp_path / "new", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(UserError, match="needs its encoder"):
        open_start(Start(start=places["start"], looks=["seg"]))


def test_tied_config_with_a_head_of_its_own_is_untied(clip):
    """4.45 saved lm_head apart; where it was trained apart, tying would throw it away."""
    weights = load_file(clip / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, clip / "model.safetensors", metadata={"format": "pt"})
    expected = answer(load_published(folder("clip")))
    assert torch.equal(answer(load_published(clip)), expected)
    weights["lm_head.weight"] += 1
    save_file(weights, clip / "model.safetensors", metadata={"format": "pt"})
    apart = load_published(clip)
    assert torch.equal(apart.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(apart.get_input_embeddings().weight, weights["model.embed_tokens.weight"])


def test_what_is_saved_does_not_tell_how_it_was_loaded(tmp_path):
    """A processor that was loaded and saved again has the very files of the folder it came from."""
    shipped = resolve("cards-tiny")
    load_processor(shipped).save_pretrained(tmp_path)
    ours, theirs = (json.loads((place / "tokenizer_config.json").read_text()) for place in (tmp_path, shipped))
    assert ours == theirs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": 5}, "dtype 5 is not one torch knows"),
        ({"attn_implementation": "bogus"}, "attn_implementation='bogus' cannot be used"),
        pytest.param(
            {"attn_implementation": "flash_attention_2"},
            "attn_implementation='flash_attention_2' cannot be used",
            marks=pytest.mark.skipif(find_spec("flash_attn") is not None, reason="the package is there"),
        ),
    ],
    ids=str,
)
def test_a_way_of_loading_that_there_is_not(options, words):
    with pytest.raises(UserError, match=words):
        load_model(resolve("cards-tiny"), device="cpu", **options)
