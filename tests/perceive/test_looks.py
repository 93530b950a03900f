"""Looks: their views and prompts, and the effect of leaving out one part of a look."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from support.oracle import deepstack_inputs
from support.scripted_model import QUESTION, largest_difference, picture, recorded, writing

from relook.looks import IM_END, LOOKS, write_call
from relook.processing import View

pytestmark = pytest.mark.usefixtures("base")


@pytest.mark.parametrize("look", ["clip", "detection", "seg"])
def test_the_attention_map_is_the_projectors(tiny_vlm, look):
    """<F_i, c> laid out as the tokens lie in the image, against the projector applied by hand."""
    vlm = tiny_vlm()
    (answer,), (conversation,), _ = recorded(vlm, [(picture(), QUESTION, {"look": look, "max_new_tokens": 2})])
    seen = answer.looks[0]
    assert seen.attention.shape == ((3, 4) if look == "clip" else (16, 16))
    encoded = vlm.processor.encode_images([seen.image], "image" if look == "clip" else look)
    with torch.no_grad():
        features = vlm.model.encode(look, **encoded)[0]
        start = conversation.ids.index(vlm.vocabulary[LOOKS[look].start])
        inputs = vlm.processor.encode_item(
            {"messages": [{"role": "user", "content": answer.transcript[1].text}], "images": [picture()]}, labels=False
        )
        state = vlm.model(
            input_ids=torch.tensor([conversation.ids[: start + 1]]),
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
            output_hidden_states=True,
        ).hidden_states[-1][0, -1]
        expected = vlm.model.project(look, features, state)[1]
    np.testing.assert_allclose(seen.attention.reshape(-1), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("margin", "box", "size"), [(0, (200, 100, 400, 200), (192, 96)), (1, (100, 50, 500, 250), (400, 192))]
)
def test_a_region_is_cut_from_the_original_pixels(tiny_vlm, margin, box, size):
    vlm = tiny_vlm(second_look=View(None), region_margin=margin)
    image = picture(0, (800, 400))
    look = vlm.ask(image, QUESTION, region=(2, 2, 3, 3), max_new_tokens=1).looks[0]
    assert look.cells == (2, 2, 3, 3) and look.box == box
    assert look.image.size == size  # multiples of a merged token, 16 px
    expected = image.crop(look.box).resize(look.image.size, Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(look.image), np.asarray(expected))


def test_prompts_of_auto(tiny_vlm):
    def prompt(vlm, **options):
        return vlm.ask(picture(), "What?", max_new_tokens=1, **options).transcript[1].text

    region, again = LOOKS["region"].trigger, LOOKS["clip"].trigger
    assert prompt(tiny_vlm()) == f"<image>\nWhat? {region}"
    assert prompt(tiny_vlm(("clip",))) == f"<image>\nWhat? {again}"
    assert prompt(tiny_vlm(), look="seg") == f"<image>\nWhat? {again}"
    assert prompt(tiny_vlm(), look="none") == prompt(tiny_vlm(), max_looks=0) == "<image>\nWhat?"
    assert prompt(tiny_vlm(free_choice=True)) == prompt(tiny_vlm(free_choice=True), look="clip") == "<image>\nWhat?"
    assert prompt(tiny_vlm(free_choice=True, question_first=True)) == "What?\n<image>"


def test_a_question_that_holds_a_published_sentence(tiny_vlm):
    """Published questions bring the sentence along: it is neither doubled nor left where it does not belong."""
    region, again = LOOKS["region"].trigger, LOOKS["clip"].trigger

    def prompt(vlm, **options):
        answer = vlm.ask(picture(), f"What? {again}", max_new_tokens=1, **options)
        return answer.transcript[1].text.removeprefix("<image>\n")

    assert prompt(tiny_vlm()) == prompt(tiny_vlm(), look="clip") == f"What? {again}"
    assert prompt(tiny_vlm(), look="region") == prompt(tiny_vlm(), region=(0, 0, 1, 1)) == f"What? {region}"
    assert prompt(tiny_vlm(), look="none") == prompt(tiny_vlm(free_choice=True)) == prompt(tiny_vlm(())) == "What?"


def test_none_and_spent_looks_cannot_be_called(tiny_vlm):
    vlm = tiny_vlm()
    eager = [write_call("region", (0, 0, 1, 1)), write_call("region", (0, 0, 1, 1))]
    for options in ({"look": "none"}, {"max_looks": 0}):
        with writing(vlm, *eager):
            answer = vlm.ask(picture(), QUESTION, max_new_tokens=6, **options)
        assert not answer.looks and "<|region" not in answer.transcript[-1].text
    with writing(vlm, eager[0], IM_END, eager[1]):
        answer = vlm.ask(picture(), QUESTION, max_new_tokens=6)
    assert len(answer.looks) == 1 and "<|region" not in answer.transcript[-1].text


# -- looks with a part left out --------------------------------------------------------------------------------------


def by_hand(vlm, ids, first, again):
    """Logits (L, V) of a conversation with one clip look and c = 0, from the decoder and the vision encoder alone.

    y = F + <F, 0> 0 = F: the encoder's features of `again` stand where its pads are, nothing added but the base's inner
    ones; the control token is the hidden state at the token before it, which one run over the prefix gives.
    """
    inner, word = vlm.model.model, vlm.processor.tokenizer.convert_tokens_to_ids
    row, deep = torch.tensor([ids]), dict[int, torch.Tensor]()

    def run(embeds, places):
        given = deepstack_inputs(embeds.shape[1], deep)
        return inner.language_model(inputs_embeds=embeds, position_ids=places, **given).last_hidden_state

    with torch.no_grad():
        embeds = inner.get_input_embeddings()(row)
        pictures = [vlm.processor.encode_images([image], "image") for image in (first, again)]
        for pad, picture_ in zip(("<|image_pad|>", "<|clip_image_pad|>"), pictures, strict=True):
            features = inner.get_image_features(**picture_, return_dict=True)
            embeds[row == word(pad)] = features.pooler_output[0]
            if layers := getattr(features, "deepstack_features", None):
                deep[ids.index(word(pad))] = torch.stack([layer[0] for layer in layers])
        kinds = (row == word("<|image_pad|>")).int()
        places = inner.get_rope_index(row, kinds, image_grid_thw=pictures[0]["image_grid_thw"])[0]
        start = ids.index(word("<|clip_action_start|>"))
        assert ids[start + 1] == word("<|clip_action|>")
        embeds[0, start + 1] = run(embeds[:, : start + 1], places[..., : start + 1])[0, -1]
        return vlm.model.lm_head(run(embeds, places)[0])


def test_an_unconditioned_look_equals_a_full_forward(tiny_vlm):
    vlm = tiny_vlm(("region", "clip"), reencode_look=View(96))
    ask = lambda **options: recorded(vlm, [(picture(), QUESTION, {"look": "clip", "max_new_tokens": 5, **options})])  # noqa: E731
    (off,), (conversation,), (logits,) = ask(condition=False)
    assert [look.kind for look in off.looks] == ["clip"] and off.looks[0].attention is None
    first = vlm.processor.view(picture(), "first", "image")
    full = by_hand(vlm, conversation.ids, first, off.looks[0].image)
    last = conversation.ids.index(vlm.vocabulary["<|clip_action_start|>"])
    assert max(logits) == len(full) - 1 and len(logits) > 5
    assert max(float((full[i] - values).abs().max()) for i, values in logits.items()) < 1e-4

    (on,), _, (conditioned,) = ask()
    assert on.looks[0].attention is not None
    assert torch.equal(conditioned[last], logits[last]), "up to the look nothing differs"
    here = min(i for i in logits if i > last)  # the first place at which the second look has been seen
    assert float((conditioned[here] - logits[here]).abs().max()) > 1e-3


@pytest.mark.parametrize("look", ["clip", "detection", "seg"])
def test_without_a_condition_is_a_projector_whose_c_is_zero(tiny_vlm, look):
    """The judge: one full forward of the same model with Linear_c set to zero, so that c = 0 whatever h is."""
    vlm = tiny_vlm()
    options = {"look": look, "max_new_tokens": 3, "condition": False}
    (answer,), (conversation,), (logits,) = recorded(vlm, [(picture(), QUESTION, options)])
    assert largest_difference(vlm, conversation, logits, [answer]) > 1e-3, "conditioned, it would be another answer"
    linear = vlm.model.projectors[look].linear_condition
    kept = {name: value.clone() for name, value in linear.state_dict().items()}
    try:
        with torch.no_grad():
            linear.weight.zero_(), linear.bias.zero_()
        assert largest_difference(vlm, conversation, logits, [answer]) < 1e-4
    finally:
        linear.load_state_dict(kept)


def test_the_defaults_leave_nothing_out(tiny_vlm):
    vlm = tiny_vlm()
    for options in ({"look": "clip"}, {"look": "seg"}, {"region": (1, 2, 3, 4)}):
        request = (picture(), QUESTION, {"max_new_tokens": 3, **options})
        said = (
            picture(),
            QUESTION,
            {**request[2], **({"blank": False} if "region" in options else {"condition": True})},
        )
        (plain,), _, (ours,) = recorded(vlm, [request])
        (spelt,), _, (theirs,) = recorded(vlm, [said])
        assert plain.looks == spelt.looks and plain.transcript == spelt.transcript
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[i], theirs[i]) for i in ours)


def test_a_blank_crop_is_a_crop_of_an_empty_page(tiny_vlm):
    """Same call, same size, same cost; the judge cuts the crop from a page of one colour, CLIP's mean."""
    vlm = tiny_vlm()
    request = (picture(), QUESTION, {"region": (1, 2, 3, 4), "max_new_tokens": 4})
    (seen,), _, (shown,) = recorded(vlm, [request])
    (answer,), (conversation,), (logits,) = recorded(vlm, [(*request[:2], {**request[2], "blank": True})])
    look = answer.looks[0]
    assert (look.cells, look.box, look.image.size) == (seen.looks[0].cells, seen.looks[0].box, seen.looks[0].image.size)
    assert look.image.getcolors() == [(look.image.width * look.image.height, (123, 117, 104))]
    assert answer.usage.vision_patches == seen.usage.vision_patches
    answer.given, answer.image = [answer.image], Image.new("RGB", answer.image.size, (123, 117, 104))
    assert largest_difference(vlm, conversation, logits, [answer]) < 1e-4
    first = min(logits)
    assert first == min(shown) and float((logits[first] - shown[first]).abs().max()) > 1e-3


def test_a_part_may_be_left_out_of_a_later_look(tiny_vlm):
    vlm = tiny_vlm(("region", "clip"))
    with writing(vlm, LOOKS["clip"].start, "742"):
        answer = vlm.ask(picture(), QUESTION, region=(0, 0, 1, 1), max_looks=2, condition=False)
    assert [(look.kind, look.attention) for look in answer.looks] == [("region", None), ("clip", None)]


def test_a_blank_crop_is_not_kept_for_the_next_question(tiny_vlm):
    vlm = tiny_vlm()
    region = {"region": (1, 2, 3, 4), "max_new_tokens": 2}
    chat = vlm.chat(picture())
    answers = [chat.ask("What?", blank=blank, **region) for blank in (True, False)]
    blank, real = (answer.looks[0].image for answer in answers)
    assert answers[1].usage.vision_patches > 0  # encoded anew
    assert len(blank.getcolors()) == 1
    assert np.array_equal(np.asarray(real), np.asarray(vlm.ask(picture(), "What?", **region).looks[0].image))
