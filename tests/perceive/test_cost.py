"""Cost of an answer: tokens through the language model and patches through the encoders."""

from __future__ import annotations

import pytest
from support.scripted_model import MIX, QUESTION, picture, recorded, writing

from relook.processing import View


@pytest.mark.parametrize("options", MIX, ids=str)
def test_every_token_goes_through_the_language_model_once(tiny_vlm, options):
    vlm = tiny_vlm()
    seen = []
    handle = vlm.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        (answer,), (conversation,), _ = recorded(vlm, [(picture(), QUESTION, {"max_new_tokens": 4, **options})])
    finally:
        handle.remove()
    usage = answer.usage
    assert usage.lm_positions == usage.sequence_length == len(conversation.ids) == sum(seen)
    assert conversation.kv.lengths == [len(conversation.ids)]
    assert set(usage.seconds) == {"vision", "prefill", "decode", "look"}


def test_a_forced_region_is_read_in_one_prefill(tiny_vlm):
    """Nothing about the call or its crop has to be decoded: opening, call and second look are one forward."""
    vlm = tiny_vlm()
    widths = []
    handle = vlm.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        with writing(vlm, "7"):
            answer = vlm.ask(picture(), QUESTION, region=(0, 0, 1, 1))
    finally:
        handle.remove()
    assert widths[1:] == [1, 1] and widths[0] == answer.usage.sequence_length - 2  # "7" and <|im_end|>


def patches_through_towers(vlm, call):
    """(ViT patches, DINOv2 patches, SAM patches) that the encoders were really given during `call()`."""
    counts = {"vit": 0, "detection": 0, "seg": 0}
    model = vlm.model
    handles = [
        model.model.visual.register_forward_pre_hook(
            lambda m, a, k: counts.__setitem__("vit", counts["vit"] + (a[0] if a else k["hidden_states"]).shape[0]),
            with_kwargs=True,
        ),
        model.encoders["detection"].register_forward_hook(
            lambda m, a, out: counts.__setitem__(
                "detection", counts["detection"] + out.last_hidden_state[:, 1:, 0].numel()
            )
        ),
        model.encoders["seg"].register_forward_hook(
            lambda m, a, out: counts.__setitem__("seg", counts["seg"] + out.last_hidden_state[:, 0].numel())
        ),
    ]
    try:
        result = call()
    finally:
        for handle in handles:
            handle.remove()
    return result, counts


@pytest.mark.parametrize("options", MIX, ids=str)
def test_vision_patches_are_those_the_towers_saw(tiny_vlm, options):
    vlm = tiny_vlm()
    answer, counts = patches_through_towers(
        vlm, lambda: vlm.ask(picture(), QUESTION, **{"max_new_tokens": 3, **options})
    )
    assert answer.usage.vision_patches == sum(counts.values())


def test_equal_views_are_encoded_once(tiny_vlm):
    direct = tiny_vlm().ask(picture(), QUESTION, look="none", max_new_tokens=2).usage.vision_patches
    same = tiny_vlm().ask(picture(), QUESTION, look="clip", max_new_tokens=2).usage.vision_patches
    closer = tiny_vlm(reencode_look=View(128)).ask(picture(), QUESTION, look="clip", max_new_tokens=2)
    twice = tiny_vlm(second_look=View(64)).ask(picture(), QUESTION, region=(0, 0, 7, 7), max_new_tokens=2)
    assert same == direct
    assert closer.usage.vision_patches > 2 * direct
    assert twice.usage.vision_patches == direct, "a region of everything at the first look's size is the first look"
