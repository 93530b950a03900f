"""The loop. The judge of every position, splice and condition is one full `forward` over the final conversation, with
inputs that the data pipeline (`encode_item`) makes from the transcript: nothing of the loop is used to check the loop.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from relook.errors import UserError
from relook.looks import ANSWER_PREFIX, IM_END, LOOKS, write_call
from relook.perceive import VLM
from relook.perceive.session import run
from relook.processing import View
from relook.trace import Finished, LookTaken, TextDelta

QUESTION = "What is the code in the RED box ?"
ALL = tuple(LOOKS)


def picture(seed=0, size=(130, 90)):
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 255, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


@contextmanager
def writing(vlm, *texts):
    """The model wants to write these texts, one after the other; then it wants to end its turns."""
    tokenizer = vlm.processor.tokenizer
    wanted = [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False)]
    end = tokenizer.convert_tokens_to_ids(IM_END)

    def want(module, inputs, logits):
        if logits.ndim == 1:  # the recorder's: what the model itself thinks
            return logits
        logits = logits.clone()
        logits[:, wanted.pop(0) if wanted else end] += 1e4
        return logits

    handle = vlm.model.lm_head.register_forward_hook(want)
    try:
        yield
    finally:
        handle.remove()


def recorded(vlm, requests):
    """Run (image, question, options) side by side -> answers, conversations, per row {index: logits of the next}."""
    rows = [vlm._row(vlm._begin(), image, question, options) for image, question, options in requests]
    logits = [{} for _ in rows]
    answers = {}
    for row, event in run(vlm._machine, rows, lambda row, index, values: logits[row].__setitem__(index, values)):
        if isinstance(event, Finished):
            answers[row] = event.answer
    return [answers[i] for i in range(len(rows))], [row.conversation for row in rows], logits


def one_forward(vlm, ids, answers):
    """Logits (L, V) of one full forward over a conversation's ids; its images by way of the transcript."""
    item = {"messages": [{"role": t.role, "content": t.text} for t in answers[-1].transcript]}
    for spec in LOOKS.values():
        item[spec.item_key] = []
    # images in the order of their placeholders: each question brings its own, then its looks theirs
    for answer, images in answers_with_images(answers):
        item["images"] += images
        for look in answer.looks:
            if look.problem is None:
                crop = (answer.image, look.box) if look.kind == "region" else answer.image
                item[LOOKS[look.kind].item_key].append(crop)
    encoded = vlm.processor.encode_item(item, labels=False)
    tensors = {k: v for k, v in encoded.items() if isinstance(v, torch.Tensor)}
    with torch.no_grad():
        out = vlm.model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), **tensors)
    return out.logits[0], encoded["input_ids"]


def answers_with_images(answers):
    return [(a, getattr(a, "given", [a.image])) for a in answers]


def largest_difference(vlm, conversation, logits, answers):
    full, ids = one_forward(vlm, conversation.ids, answers)
    assert len(ids) == len(conversation.ids) or any("\ufffd" in t.text for t in answers[-1].transcript)
    return max(float((full[i] - values).abs().max()) for i, values in logits.items())


CASES = {
    "no look": ({"look": "none"}, []),
    "region": ({"region": (1, 2, 3, 4)}, []),
    "region, written": ({"look": "region"}, ["<|x_5|><|y_0|><|x_2|><|y_7|><|region_token_end|>", IM_END]),
    "two regions": (
        {"look": "auto"},
        [write_call("region", (0, 0, 1, 1)) + write_call("region", (4, 3, 7, 7)), IM_END, "7 4 2"],
    ),
    "clip": ({"look": "clip"}, []),
    "detection": ({"look": "detection"}, []),
    "seg": ({"look": "seg"}, []),
    "region and seg in one turn": ({}, [write_call("region", (0, 0, 1, 1)), LOOKS["seg"].start, "742"]),
    "two looks": (
        {"max_looks": 2},
        [write_call("region", (2, 2, 3, 3)), IM_END, LOOKS["clip"].start, "742"],
    ),
    "the same look twice": ({"max_looks": 2, "look": "clip"}, [LOOKS["clip"].start, "742"]),
}

KINDS_TAKEN = {
    "two regions": ["region", "region"],
    "region and seg in one turn": ["region", "seg"],
    "two looks": ["region", "clip"],
    "the same look twice": ["clip", "clip"],
}


@pytest.mark.parametrize("case", CASES)
def test_the_loop_equals_one_forward_over_the_final_conversation(tiny_vlm, case):
    vlm = tiny_vlm()
    options, texts = CASES[case]
    request = (picture(), QUESTION, {"max_new_tokens": 20 if texts else 5, **options})
    if texts:
        with writing(vlm, *texts):
            (answer,), (conversation,), (logits,) = recorded(vlm, [request])
    else:
        (answer,), (conversation,), (logits,) = recorded(vlm, [request])
    assert all(look.problem is None for look in answer.looks)
    if texts and "written" not in case:
        assert [look.kind for look in answer.looks] == KINDS_TAKEN[case]
    assert largest_difference(vlm, conversation, logits, [answer]) < 1e-4
    assert len(conversation.ids) - 1 in logits, "the closing token is in the cache too"


def test_ids_are_those_of_the_data_pipeline(tiny_vlm):
    """What the loop wrote is, id for id, how a training item of the same conversation is written."""
    vlm = tiny_vlm()
    with writing(vlm, write_call("region", (2, 2, 3, 3)), IM_END, LOOKS["clip"].start, ANSWER_PREFIX + "742"):
        (answer,), (conversation,), _ = recorded(vlm, [(picture(), QUESTION, {"max_looks": 2, "max_new_tokens": 40})])
    _, ids = one_forward(vlm, conversation.ids, [answer])
    assert conversation.ids == ids
    assert [(t.role, t.text) for t in answer.transcript] == [
        ("system", "You are a helpful assistant."),
        ("user", f"<image>\n{QUESTION} {LOOKS['region'].trigger}"),
        ("assistant", write_call("region", (2, 2, 3, 3))),
        ("user", "<image>"),
        ("assistant", write_call("clip")),
        ("user", "<clip_image>"),
        ("assistant", ANSWER_PREFIX + "742"),
    ]
    assert answer.text == "742"
    assert [look.kind for look in answer.looks] == ["region", "clip"]


def test_sequential_positions_and_the_alignment_stage(tiny_vlm):
    vlm = tiny_vlm()
    config = vlm.model.config
    for field, value in (("position_mode", "sequential"), ("num_inner_forward_run", 1)):
        before = getattr(config, field)
        setattr(config, field, value)
        try:
            (answer,), (conversation,), (logits,) = recorded(
                vlm, [(picture(), QUESTION, {"look": "clip", "max_new_tokens": 4})]
            )
            assert largest_difference(vlm, conversation, logits, [answer]) < 1e-4
            assert (answer.looks[0].attention is None) == (field == "num_inner_forward_run")
        finally:
            setattr(config, field, before)


def test_several_images(tiny_vlm):
    vlm = tiny_vlm()
    images = [picture(1), picture(2, (60, 120))]
    (answer,), (conversation,), (logits,) = recorded(
        vlm, [(images, QUESTION, {"region": (0, 0, 3, 3), "max_new_tokens": 4, "look_at": 1})]
    )
    assert answer.image.size == (60, 120) and answer.looks[0].box == (0, 0, 37, 75)  # 5 x 5 cells with the margin
    answer.given = images
    assert largest_difference(vlm, conversation, logits, [answer]) < 1e-4


def test_follow_up_questions_continue_the_cache(tiny_vlm):
    vlm = tiny_vlm()
    chat = vlm.chat(picture(1))
    logits: dict[int, torch.Tensor] = {}
    answers = []
    second = picture(3, (70, 100))
    for question, image, options in (
        ("What?", None, {"region": (1, 1, 4, 4)}),
        ("And then?", None, {"look": "clip"}),
        ("And here?", second, {"look": "none"}),
        ("Look closer.", None, {"region": (5, 5, 7, 7)}),
    ):
        row = vlm._row(
            chat._conversation,
            chat._new_images + ([image] if image else []),
            question,
            {**options, "max_new_tokens": 4},
        )
        for event in chat._run(row, lambda _, index, values: logits.__setitem__(index, values)):
            if isinstance(event, Finished):
                answers.append(event.answer)
        answers[-1].given = [answers[-1].image] if question in ("What?", "And here?") else []
    assert answers[-1].image is second, "looks go to the latest image"
    assert largest_difference(vlm, chat._conversation, logits, answers) < 1e-4
    assert (
        sum(a.usage.lm_positions for a in answers) == answers[-1].usage.sequence_length == len(chat._conversation.ids)
    )
    clip = answers[1]
    assert clip.usage.vision_patches == 0, "the first look's features are still there"
    assert [t.role for t in chat.transcript].count("assistant") == 7, "three looks, four answers"


MIX = [
    {"look": "none"},
    {"region": (1, 2, 3, 4)},
    {"look": "clip", "max_new_tokens": 3},
    {"look": "seg"},
    {"look": "detection", "max_looks": 2},
    {"look": "auto"},
    {"look": "region", "max_new_tokens": 9},
    {"look": "clip", "condition": False},
    {"region": (4, 1, 6, 3), "blank": True},
]


def mixed_requests():
    return [
        (picture(i, (60 + 20 * i, 150 - 15 * i)), QUESTION + " again" * (i % 3), {"max_new_tokens": 6, **options})
        for i, options in enumerate(MIX)
    ]


def test_ask_many_equals_ask(tiny_vlm):
    vlm = tiny_vlm()
    together, conversations, logits = recorded(vlm, mixed_requests())
    for i, request in enumerate(mixed_requests()):
        (alone,), (conversation,), (expected,) = recorded(vlm, [request])
        assert conversations[i].ids == conversation.ids
        assert conversations[i].sampled == conversation.sampled
        assert logits[i].keys() == expected.keys()
        assert max(float((logits[i][k] - expected[k]).abs().max()) for k in expected) < 1e-4
        assert together[i].text == alone.text and together[i].looks == alone.looks
        assert together[i].transcript == alone.transcript
        for field in ("lm_positions", "sequence_length", "vision_patches", "generated_tokens"):
            assert getattr(together[i].usage, field) == getattr(alone.usage, field)
        for one, other in zip(together[i].looks, alone.looks, strict=True):
            if alone.looks[0].attention is not None:
                np.testing.assert_allclose(one.attention, other.attention, atol=1e-4)


def test_ask_many_takes_batches_and_forms(tiny_vlm):
    vlm = tiny_vlm(("region",))
    image = picture()
    pairs = [(image, "What?"), (image, "Who?", {"look": "none"}), {"image": image, "question": "Why?", "look": "none"}]
    answers = vlm.ask_many(pairs, batch_size=2, max_new_tokens=3)
    assert [a.question for a in answers] == ["What?", "Who?", "Why?"]
    assert answers[2].text == vlm.ask(image, "Why?", look="none", max_new_tokens=3).text
    assert vlm.ask_many([]) == []


def test_greedy_text_equals_transformers_generate(tiny_vlm):
    """Without a look the loop is plain greedy decoding: transformers' `generate` writes the same tokens."""
    vlm = tiny_vlm()
    (_,), (conversation,), _ = recorded(vlm, [(picture(), QUESTION, {"look": "none", "max_new_tokens": 8})])
    start = conversation.sampled.index(True)
    item = {"messages": [{"role": "user", "content": f"<image>\n{QUESTION}"}], "images": [picture()]}
    encoded = vlm.processor.encode_item(item, labels=False)
    ids = torch.tensor([encoded["prompt_ids"]])
    assert conversation.ids[:start] == ids[0].tolist()
    banned = vlm._machine.vocabulary.banned([], may_look=False, constrain=True).nonzero().flatten().tolist()
    out = vlm.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=encoded["pixel_values"],
        image_grid_thw=encoded["image_grid_thw"],
        max_new_tokens=8,
        do_sample=False,
        suppress_tokens=banned,
        eos_token_id=sorted(vlm._machine.vocabulary.ends),
    )
    theirs = out[0, ids.shape[1] :].tolist()
    if theirs[-1] in vlm._machine.vocabulary.ends:  # <|endoftext|> ends a turn too; a conversation writes <|im_end|>
        theirs[-1] = vlm._machine.vocabulary.im_end
    assert len(theirs) > 3 and conversation.ids[start:][: len(theirs)] == theirs


# -- what an answer costs --------------------------------------------------------------------------------------------


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
    """(ViT patches, DINOv2 patches, SAM patches) that the towers were really given during `call()`."""
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


# -- looks -----------------------------------------------------------------------------------------------------------


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
        start = conversation.ids.index(vlm._machine.vocabulary[LOOKS[look].start])
        inputs = vlm.processor.encode_item(
            {"messages": [{"role": "user", "content": answer.transcript[1].text}], "images": [picture()]}, labels=False
        )
        state = vlm.model(
            input_ids=torch.tensor([conversation.ids[: start + 1]]),
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
        ).last_state[0]
        expected = vlm.model.project(look, features, state)[1]
    np.testing.assert_allclose(seen.attention.reshape(-1), expected.numpy(), atol=1e-4)


def test_a_region_is_cut_from_the_original_pixels(tiny_vlm):
    vlm = tiny_vlm(second_look=View(None), region_margin=0)
    image = picture(0, (800, 400))
    look = vlm.ask(image, QUESTION, region=(2, 2, 3, 3), max_new_tokens=1).looks[0]
    assert look.cells == (2, 2, 3, 3) and look.box == (200, 100, 400, 200)
    assert look.image.size == (192, 96)  # multiples of a merged token, 16 px
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
    """Logits (L, V) of a conversation with one clip look and c = 0, from the decoder and the vision tower alone.

    y = F + <F, 0> 0 = F: the tower's features of `again` stand where its pads are, nothing added; the control token
    is the hidden state at the token before it, which one run over the prefix gives.
    """
    inner, word = vlm.model.model, vlm.processor.tokenizer.convert_tokens_to_ids
    row = torch.tensor([ids])
    with torch.no_grad():
        embeds = inner.get_input_embeddings()(row)
        pictures = [vlm.processor.encode_images([image], "image") for image in (first, again)]
        for pad, picture_ in zip(("<|image_pad|>", "<|clip_image_pad|>"), pictures, strict=True):
            tokens = inner.get_image_features(**picture_, return_dict=True).pooler_output[0]
            embeds[row == word(pad)] = tokens
        kinds = (row == word("<|image_pad|>")).int()
        places = inner.get_rope_index(row, kinds, image_grid_thw=pictures[0]["image_grid_thw"])[0]
        start = ids.index(word("<|clip_action_start|>"))
        assert ids[start + 1] == word("<|clip_action|>")
        before = inner.language_model(inputs_embeds=embeds[:, : start + 1], position_ids=places[..., : start + 1])
        embeds[0, start + 1] = before.last_hidden_state[0, -1]
        hidden = inner.language_model(inputs_embeds=embeds, position_ids=places).last_hidden_state
        return vlm.model.lm_head(hidden[0])


def test_without_its_condition_a_look_enters_as_it_is(tiny_vlm):
    vlm = tiny_vlm(("region", "clip"), reencode_look=View(96))
    ask = lambda **options: recorded(vlm, [(picture(), QUESTION, {"look": "clip", "max_new_tokens": 5, **options})])  # noqa: E731
    (off,), (conversation,), (logits,) = ask(condition=False)
    assert [look.kind for look in off.looks] == ["clip"] and off.looks[0].attention is None
    first = vlm.processor.view(picture(), "first", "image")
    full = by_hand(vlm, conversation.ids, first, off.looks[0].image)
    last = conversation.ids.index(vlm._machine.vocabulary["<|clip_action_start|>"])
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
    blank, real = (chat.ask("What?", blank=blank, **region).looks[0].image for blank in (True, False))
    assert len(blank.getcolors()) == 1
    assert np.array_equal(np.asarray(real), np.asarray(vlm.ask(picture(), "What?", **region).looks[0].image))


# -- calls that go wrong ---------------------------------------------------------------------------------------------

BROKEN = {
    "truncated": ["<|region_token_start|><|x_1|><|y_2|>", IM_END, "742"],
    "only columns": ["<|region_token_start|><|x_1|><|x_2|><|region_token_end|>", IM_END, "742"],
    "no start": ["<|x_1|><|y_2|>", IM_END, "742"],
    "wrong end": ["<|clip_action_start|>", "<|region_token_end|>", IM_END, "742"],
}


@pytest.mark.parametrize("case", BROKEN)
def test_malformed_calls_are_recorded_and_answered_without(tiny_vlm, case):
    vlm = tiny_vlm()
    with writing(vlm, *BROKEN[case]):
        answer = vlm.ask(picture(), QUESTION, constrain=False)
    assert answer.text == "742"
    assert len(answer.looks) == 1 and answer.looks[0].problem and answer.looks[0].image is None
    assert [t.text for t in answer.transcript[-2:]] == [QUESTION, "742"]
    assert answer.usage.lm_positions == answer.usage.sequence_length


@pytest.mark.parametrize("case", BROKEN)
def test_constrained_calls_are_well_formed_whatever_the_model_wants(tiny_vlm, case):
    vlm = tiny_vlm()
    with writing(vlm, *BROKEN[case]):
        answer = vlm.ask(picture(), QUESTION, max_new_tokens=8)
    assert all(look.problem is None for look in answer.looks)
    assert answer.usage.lm_positions == answer.usage.sequence_length


def test_a_look_the_model_lacks(tiny_vlm):
    """The tokenizer knows the seg call, the model has no such look: recorded, and answered without."""
    vlm = tiny_vlm(("region", "clip"))
    call = [write_call("seg"), IM_END, "742"]
    with writing(vlm, *call):
        answer = vlm.ask(picture(), QUESTION, constrain=False)
    assert answer.text == "742"
    assert answer.looks[0].kind == "seg" and "region, clip" in answer.looks[0].problem
    with writing(vlm, *call):
        constrained = vlm.ask(picture(), QUESTION, max_new_tokens=4)
    assert not constrained.looks


def test_good_calls_beside_a_broken_one_are_followed(tiny_vlm):
    vlm = tiny_vlm()
    with writing(vlm, write_call("region", (0, 0, 1, 1)) + "<|region_token_start|>", IM_END, "742"):
        answer = vlm.ask(picture(), QUESTION, constrain=False)
    assert [bool(look.problem) for look in answer.looks] == [True, False]
    assert answer.text == "742" and answer.transcript[-2].text == "<image>"


def test_a_call_is_completed_at_the_token_limit(tiny_vlm):
    vlm = tiny_vlm()
    with writing(vlm, write_call("region", (0, 1, 2, 3)), IM_END, "742" * 5):
        answer = vlm.ask(picture(), QUESTION, max_new_tokens=2)
    assert answer.looks[0].cells == (0, 1, 2, 3)
    assert len(vlm.processor.tokenizer.encode(answer.text)) <= 2


# -- streaming, conversations, sampling ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["naïve café 東京 🙂", ANSWER_PREFIX + "7 4 2 ", "Now answer", " 742\n", ANSWER_PREFIX, ""]
)
def test_pieces_add_up_to_the_answer_and_are_whole_characters(tiny_vlm, text):
    vlm = tiny_vlm()
    with writing(vlm, text):
        events = list(vlm.stream(picture(), QUESTION, look="none"))
    pieces = [event.text for event in events if isinstance(event, TextDelta)]
    assert "".join(pieces) == events[-1].answer.text == text.removeprefix(ANSWER_PREFIX.strip()).strip()
    assert all(piece and "\ufffd" not in piece for piece in pieces)


def test_events_come_as_things_happen(tiny_vlm):
    vlm = tiny_vlm()
    with writing(vlm, LOOKS["clip"].start, "742"):
        stream = vlm.stream(picture(), QUESTION, look="auto")
        look = next(stream)
        assert isinstance(look, LookTaken) and look.look.attention is not None
        kinds = [type(event) for event in stream]
    assert kinds[-1] is Finished and set(kinds[:-1]) == {TextDelta}


def test_interleaved_conversations_do_not_disturb_each_other(tiny_vlm):
    vlm = tiny_vlm()
    requests = [(picture(5), "What?", {"look": "clip"}), (picture(6, (50, 140)), QUESTION, {"region": (0, 0, 2, 2)})]
    alone = [vlm.ask(i, q, max_new_tokens=6, **o) for i, q, o in requests]
    streams = [vlm.stream(i, q, max_new_tokens=6, **o) for i, q, o in requests]
    last = {}
    while streams:
        for stream in list(streams):
            event = next(stream, None)
            if event is None:
                streams.remove(stream)
            elif isinstance(event, Finished):
                last[event.answer.question] = event.answer
    for answer in alone:
        other = last[answer.question]
        assert (other.text, other.looks, other.transcript) == (answer.text, answer.looks, answer.transcript)
    # nor do they leave anything on the model
    assert [vlm.ask(i, q, max_new_tokens=6, **o).text for i, q, o in requests] == [a.text for a in alone]
    assert vlm.model.model.rope_deltas is None


def test_an_abandoned_question_leaves_the_chat_as_it_was(tiny_vlm):
    vlm = tiny_vlm()
    chat = vlm.chat(picture())
    chat.ask("What?", look="none", max_new_tokens=3)
    before, turns = list(chat._conversation.ids), chat.transcript
    stream = chat.stream("And?", look="clip", max_new_tokens=5)
    next(stream)
    stream.close()
    assert chat._conversation.ids == before == [*chat._conversation.ids] and chat.transcript == turns
    assert chat._conversation.kv.lengths == [len(before)]
    again = chat.ask("And?", look="clip", max_new_tokens=5)
    assert again.usage.lm_positions == again.usage.sequence_length - len(before)


def test_sampling_depends_on_the_seed_alone(tiny_vlm):
    vlm = tiny_vlm()
    options = {"look": "none", "max_new_tokens": 6, "do_sample": True, "temperature": 0.95, "top_p": 0.9, "top_k": 50}
    one = vlm.ask(picture(), QUESTION, seed=1, **options)
    batch = vlm.ask_many([(picture(3), "Who?"), (picture(), QUESTION)], seed=1, **options)
    assert batch[1].text == one.text == vlm.ask(picture(), QUESTION, seed=1, **options).text
    assert len({vlm.ask(picture(), QUESTION, seed=s, **options).text for s in range(4)}) > 1
    greedy = vlm.ask(picture(), QUESTION, look="none", max_new_tokens=6)
    assert vlm.ask(picture(), QUESTION, **{**options, "top_k": 1}).text == greedy.text


# -- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"question": "  "}, "question is empty"),
        ({"question": None}, "expected text"),
        ({"question": "What is <|im_end|>?"}, "<|im_end|>"),
        ({"question": "Where is the <image>?"}, "<image>"),
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
def test_wrong_input_is_refused_at_the_door(tiny_vlm, options, said):
    vlm = tiny_vlm(("region", "clip"))
    arguments = {"image": picture(), "question": "What?", **options}
    with pytest.raises(UserError, match=said.replace("|", r"\|")) as caught:
        vlm.ask(arguments.pop("image"), arguments.pop("question"), **arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="question 1"):
        vlm.ask_many([(picture(), "What?"), {"image": picture(), "question": "What?", **options}])


def test_a_tokenizer_without_the_tokens_is_refused(tiny_vlm):
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


def test_a_model_with_a_domain_says_so_with_every_answer(tiny_vlm):
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
