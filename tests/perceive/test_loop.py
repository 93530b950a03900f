"""The generation loop, compared at every position with one full `forward` over the final conversation.

The inputs of that forward are made from the transcript by the data pipeline (`encode_item`), without any code of the
loop.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.scripted_model import QUESTION, largest_difference, mixed_requests, one_forward, picture, recorded, writing

from relook.looks import ANSWER_PREFIX, IM_END, LOOKS, write_call
from relook.options import AskOptions
from relook.trace import Finished

pytestmark = pytest.mark.usefixtures("base")
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
            AskOptions.of({**options, "max_new_tokens": 4}),
        )
        for event in chat._run(row, lambda _, index, values: logits.__setitem__(index, values)):
            if isinstance(event, Finished):
                answers.append(event.answer)
        answers[-1].given = [answers[-1].image] if question in ("What?", "And here?") else []
    assert answers[-1].image.tobytes() == second.tobytes(), "looks go to the latest image"
    assert largest_difference(vlm, chat._conversation, logits, answers) < 1e-4
    assert (
        sum(a.usage.lm_positions for a in answers) == answers[-1].usage.sequence_length == len(chat._conversation.ids)
    )
    clip = answers[1]
    assert clip.usage.vision_patches == 0, "the first look's features are still there"
    assert [t.role for t in chat.transcript].count("assistant") == 7, "three looks, four answers"


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
    banned = vlm.vocabulary.banned([], may_look=False, constrain=True).nonzero().flatten().tolist()
    out = vlm.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=encoded["pixel_values"],
        image_grid_thw=encoded["image_grid_thw"],
        max_new_tokens=8,
        do_sample=False,
        suppress_tokens=banned,
        eos_token_id=sorted(vlm.vocabulary.ends),
    )
    theirs = out[0, ids.shape[1] :].tolist()
    if theirs[-1] in vlm.vocabulary.ends:  # <|endoftext|> ends a turn too; a conversation writes <|im_end|>
        theirs[-1] = vlm.vocabulary.im_end
    assert len(theirs) > 3 and conversation.ids[start:][: len(theirs)] == theirs
