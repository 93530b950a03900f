"""An adapter that is opened as a model is the model that peft runs, whatever it updates of tied weights."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.synthetic import TINY
from transformers import AutoModelForImageTextToText

from relook.model.loading import load_model
from relook.model.new import build
from relook.model.start import open_model
from relook.model.writing import merge

pytestmark = pytest.mark.filterwarnings("ignore:[^\\n]*tie_word_embeddings")  # peft's
PARTS = [
    dict(target_modules=["q_proj", "lm_head"]),
    dict(target_modules=["q_proj", "embed_tokens"]),
    dict(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    dict(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True),
    dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder whose head and embedding are tied."""
    place = tmp_path_factory.mktemp("base")
    model, processor = build(TINY, seed=1)
    assert model.config.tie_word_embeddings
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place


def adapter_of(base, place, parts):
    """peft's own files of an adapter that has learnt something."""
    adapter = get_peft_model(load_model(base, device="cpu"), LoraConfig(r=4, **parts))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if any(part in name for part in ("lora_B", "lora_embedding", "modules_to_save")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapter.save_pretrained(place)
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return place


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_a_merged_adapter_says_what_peft_says(base, parts, tmp_path):
    place = adapter_of(base, tmp_path / "adapter", parts)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load_model(base, device="cpu"), place).eval()(input_ids=ids).logits
        plain = load_model(base, device="cpu")(input_ids=ids).logits
        assert (expected - plain).abs().max() > 1e-2
        opened = open_model(place, device="cpu")[0]
        opened.tie_weights()  # as transformers' own functions do: the configs say which weights are one
        opened.save_pretrained(tmp_path / "again")
        auto = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
        auto.tie_weights()
        torch.testing.assert_close(auto(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
        found = opened(input_ids=ids).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        saved = load_model(merge(place, tmp_path / "whole"), device="cpu")
        torch.testing.assert_close(saved(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_attention_is_the_one_asked_for(base, tmp_path):
    place = adapter_of(base, tmp_path, PARTS[0])
    for kind in ("eager", "sdpa"):
        model, _ = open_model(place, device="cpu", attn_implementation=kind)
        assert model.model.language_model.config._attn_implementation == kind
