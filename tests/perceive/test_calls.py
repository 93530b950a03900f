"""Malformed calls, streaming, conversations and sampling."""

from __future__ import annotations

import pytest
from support.scripted_model import QUESTION, picture, writing

from relook.looks import ANSWER_PREFIX, IM_END, LOOKS, write_call
from relook.trace import Finished, LookTaken, TextDelta

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
