"""Input validation of `VLM`, models with a single look, and loaded models."""

from __future__ import annotations

import pytest
from support.scripted_model import QUESTION, picture

from relook.errors import UserError
from relook.perceive import VLM


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"question": "  "}, "question is empty"),
        ({"question": None}, "expected text"),
        ({"look": "zoom"}, "expected one of auto, none, region, clip"),
        ({"look": "seg"}, "this model has no 'seg' look; expected one of auto, none, region, clip"),
        ({"region": (3, 3, 2, 4)}, "grid"),
        ({"region": (0, 0, 8, 8)}, "grid"),
        ({"region": (0, 0, 1)}, "four"),
        ({"region": 7}, "four"),
        ({"region": (0, 0, 1, 1), "look": "clip"}, "leave look out"),
        ({"region": (0, 0, 1, 1), "max_looks": 0}, "max_looks=0"),
        ({"max_looks": -1}, "max_looks"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"look_at": 3}, "look_at=3"),
        ({"condition": 0}, "condition=0 is neither True nor False"),
        ({"condition": False, "look": "region"}, "look='region' and max_looks=1 leaves nothing out; it is for: clip"),
        ({"condition": False, "region": (0, 0, 1, 1)}, "condition=False with look='region'"),
        ({"condition": False, "look": "none", "max_looks": 2}, "condition=False with look='none'"),
        ({"condition": False, "max_looks": 0}, "look='auto' and max_looks=0 leaves nothing out"),
        ({"blank": True, "look": "clip"}, "blank=True with look='clip' and max_looks=1 leaves nothing out; .* region"),
        ({"blank": "yes"}, "blank='yes' is neither"),
        ({"temperature": 0.5}, "do_sample"),
        ({"do_sample": True, "top_p": 1.5}, "top_p"),
        ({"image": None}, "no image"),
        ({"image": "no/such/file.png"}, "no such file"),
        ({"image": b"not an image"}, "not an image"),
        ({"image": []}, "no image"),
    ],
    ids=str,
)
def test_invalid_input_raises_before_generation(tiny_vlm, options, said):
    vlm = tiny_vlm(("region", "clip"))
    arguments = {"image": picture(), "question": "What?", **options}
    with pytest.raises(UserError, match=said.replace("|", r"\|")) as caught:
        vlm.ask(arguments.pop("image"), arguments.pop("question"), **arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="question 1"):
        vlm.ask_many([(picture(), "What?"), {"image": picture(), "question": "What?", **options}])


def test_a_tokenizer_without_look_tokens_raises(tiny_vlm):
    from transformers import Qwen2Tokenizer

    vlm = tiny_vlm()
    bare = type("Processor", (), {"tokenizer": Qwen2Tokenizer(vocab={"a": 0}, merges=[]), "grid_size": 8})()
    with pytest.raises(UserError, match="the tokenizer has no token"):
        VLM(vlm.model, bare)


def test_load_gives_the_same_answers(tiny_vlm, tmp_path):
    import relook

    vlm = tiny_vlm(("region", "clip"))
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    loaded = relook.load(tmp_path, dtype="float32", device="cpu")
    assert loaded.looks == ["region", "clip"] and loaded.domain is None and loaded.name == str(tmp_path)
    with pytest.raises(UserError, match="'meta' holds shapes and no weights"):
        relook.load(tmp_path, device="meta")
    for options in ({"look": "clip"}, {"region": (0, 0, 2, 2)}):
        ours, theirs = (v.ask(picture(), QUESTION, max_new_tokens=4, **options) for v in (vlm, loaded))
        assert ours.transcript == theirs.transcript and ours.looks == theirs.looks
        assert theirs.model == str(tmp_path) and theirs.to_dict()["usage"]["lm_positions"] == ours.usage.lm_positions


def test_a_model_with_a_domain_adds_a_warning_to_every_answer(tiny_vlm):
    vlm = tiny_vlm(("region",), seed=3)
    assert vlm.ask(picture(), "What?", look="none", max_new_tokens=1).warnings == []
    vlm.model.config.domain = "receipts"
    try:
        many = vlm.ask_many([(picture(), "What?"), (picture(1), "Who?", {"look": "none"})], max_new_tokens=1)
        chat = vlm.chat(picture())
        followed = [chat.ask(question, max_new_tokens=1) for question in ("What?", "And then?")]
        unnamed = VLM(vlm.model, vlm.processor).ask(picture(), "What?", max_new_tokens=1)
    finally:
        vlm.model.config.domain = None
    said = "was trained on receipts only; on anything else its answers mean nothing."
    assert [answer.warnings for answer in (*many, *followed)] == [[f"tiny {said}"]] * 4
    assert unnamed.to_dict()["warnings"] == [f"this model {said}"]
