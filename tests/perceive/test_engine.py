"""`LocalEngine`: requests from several threads, histories, what a client asks of the text, and what it is refused."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.scripted_model import QUESTION, one_forward, picture, writing

from relook.errors import RelookError, UserError
from relook.looks import ANSWER_PREFIX, IM_END, write_call
from relook.options import AskOptions
from relook.perceive.engine import (
    Cancelled,
    DeadlineExceeded,
    EngineBusy,
    EngineClosed,
    GivenLook,
    Past,
    Request,
)
from relook.perceive.local import LocalEngine
from relook.perceive.loop import Scheduler, run
from relook.perceive.memory import Memory
from relook.trace import Finished, LookTaken, TextDelta

IMAGE = (picture(),)
LONG = AskOptions.of({"look": "none", "max_new_tokens": 3000})


@pytest.fixture
def engine(tiny_vlm):
    made = LocalEngine(tiny_vlm(), cache_bytes=2**20)
    yield made
    made.close()


def answer(engine, *args, **kwargs):
    return list(engine.submit(Request(*args, **kwargs)))[-1].answer


def options(**values):
    return AskOptions.of({"max_new_tokens": 5, **values})


def turns(given):
    return [turn.text for turn in given.transcript]


# ---- one conversation, request by request


LOOKS_ASKED = [{"region": (1, 1, 4, 4)}, {"look": "clip"}, {"look": "none"}, {"look": "seg"}, {}]


def past_of(question, images, given, asked):
    looks = tuple((GivenLook(look.cells, look.kind),) for look in given.looks)
    return Past(question, tuple(images), given.text, looks, asked.get("look"))


def test_a_history_is_continued_as_a_chat_is_whatever_is_remembered(tiny_vlm):
    """Each request says everything so far: images, questions, answers, looks. `VLM.chat` keeps it in a cache."""
    vlm = tiny_vlm()
    likely = {}
    for cache_bytes in (0, 2**14, 2**22):
        engine, chat, length = LocalEngine(vlm, cache_bytes=cache_bytes), vlm.chat(), 0
        past, likely[cache_bytes] = [], []
        for number, asked in enumerate(LOOKS_ASKED):
            question, images = f"Question {number}?", [picture(number)] if number % 2 == 0 else []
            with writing(vlm, f"{number}7"):  # a random model's bytes are no text that could be said again
                expected = chat.ask(question, images or None, **options(**asked).model_dump(exclude_defaults=True))
            request = Request(question, tuple(images), options(**asked), tuple(past))
            with writing(vlm, f"{number}7"):
                given = list(engine.submit(request))[-1].answer
            assert (given.text, turns(given), given.looks) == (expected.text, turns(expected), expected.looks)
            assert given.usage.sequence_length == expected.usage.sequence_length
            if cache_bytes == 2**22 and number:
                assert given.usage.cached_tokens >= length - 1
                assert given.usage.vision_patches == expected.usage.vision_patches
            length = given.usage.sequence_length
            past.append(past_of(question, images, given, asked))
            after = Request("Is it?", (), options(look="none"), tuple(past), logprobs=5)
            top = list(engine.submit(after))[-1].answer.tokens[0].top
            likely[cache_bytes].append([value for _, value in top])
        assert engine.memory.bytes <= cache_bytes
        engine.close()
    for cache_bytes in (2**14, 2**22):
        for values, expected in zip(likely[cache_bytes], likely[0], strict=True):
            assert values == pytest.approx(expected, abs=1e-4)


def test_the_same_words_about_another_image_share_no_more_than_what_comes_before_it(engine):
    first, second = (answer(engine, QUESTION, (picture(seed),), options(look="none")) for seed in (1, 2))
    again = answer(engine, QUESTION, (picture(2),), options(look="none"))
    assert second.usage.cached_tokens < 20 < again.usage.cached_tokens
    assert again.text == second.text == engine.vlm.ask(picture(2), QUESTION, look="none", max_new_tokens=5).text
    assert again.usage.vision_patches == 0 < second.usage.vision_patches == first.usage.vision_patches


def test_a_measurement_is_not_answered_from_memory_of_another_setting(engine):
    """`condition` changes what is seen, not the tokens."""
    past = Past(QUESTION, (picture(),), "7", ((GivenLook(kind="clip"),),))
    tops = []
    for changed in ({}, {"condition": False}, {}, {"condition": False}):
        asked = AskOptions.of({"max_new_tokens": 2, "look": "clip", **changed})
        with writing(engine.vlm, "7"):
            answer(engine, QUESTION, (picture(),), asked)
        after = Request("And?", (), asked, (past,), logprobs=3)
        tops.append([value for _, value in list(engine.submit(after))[-1].answer.tokens[0].top])
    assert tops[0] == pytest.approx(tops[2], abs=1e-4) != pytest.approx(tops[1], abs=1e-4)
    assert tops[1] == pytest.approx(tops[3], abs=1e-4)


def test_a_look_that_the_model_lacks_in_the_history_is_refused(tiny_vlm):
    engine = LocalEngine(tiny_vlm(looks=("region",)))
    try:
        with pytest.raises(UserError, match="clip look, which this model lacks"):
            engine.submit(Request("?", past=(Past("?", (picture(),), "a", ((GivenLook(kind="clip"),),)),)))
        with pytest.raises(UserError, match="region"):
            GivenLook(kind="region")
    finally:
        engine.close()


# ---- looks that the client takes


def test_a_region_that_the_client_crops_is_answered_as_if_it_was_cropped_here(engine):
    vlm = engine.vlm
    asked, call = options(max_new_tokens=20), write_call("region", (2, 2, 5, 5))
    with writing(vlm, call, IM_END, "742"):
        expected = vlm.ask(picture(), QUESTION, max_new_tokens=20)
    with writing(vlm, call):
        held = answer(engine, QUESTION, (picture(),), asked, hold_regions=True)
    assert held.finish == "look" and held.text == "" and held.looks[0].image is None
    assert (held.looks[0].cells, held.looks[0].box) == (expected.looks[0].cells, expected.looks[0].box)
    given = ((GivenLook(held.looks[0].cells, image=picture().crop(held.looks[0].box)),),)
    with writing(vlm, "742"):
        after = answer(engine, QUESTION, (picture(),), asked, hold_regions=True, looks=given)
    assert (after.text, turns(after)) == (expected.text, turns(expected)) and after.finish == "stop"
    assert after.usage.cached_tokens > 20


def test_another_crop_is_what_the_model_sees(engine):
    """The client's own crop enters, as the same crop in a full forward does."""
    other = picture(9, (64, 64))
    given = ((GivenLook((2, 2, 5, 5), image=other),),)
    after = answer(engine, QUESTION, (picture(),), options(look="region"), looks=given, logprobs=3)
    item = {"messages": [{"role": t.role, "content": t.text} for t in after.transcript], "images": [picture(), other]}
    encoded = engine.vlm.processor.encode_item(item, labels=False)
    tensors = {name: value for name, value in encoded.items() if isinstance(value, torch.Tensor)}
    ids = torch.tensor([encoded["input_ids"]])
    with torch.no_grad():
        logits = engine.vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids), **tensors).logits[0]
    expected = logits[len(encoded["prompt_ids"]) - 1].log_softmax(-1).topk(3)
    assert [p for _, p in after.tokens[0].top] == pytest.approx(expected.values.tolist(), abs=1e-4)


# ---- what is asked of the text


def test_probabilities_are_those_of_a_full_forward(engine):
    row = engine.vlm._row_of(Request(QUESTION, (picture(),), options(look="none"), logprobs=4))
    given = next(event.answer for _, event in run(engine.vlm, [row]) if isinstance(event, Finished))
    full, _ = one_forward(engine.vlm, row.conversation.ids, [given])
    begin = len(row.conversation.ids) - 1 - len(given.tokens)
    assert len(given.tokens) == 5 and "".join(token.text for token in given.tokens[:1]) in given.text
    for at, token in enumerate(given.tokens):
        expected = full[begin + at - 1].log_softmax(-1)
        assert [value for _, value in token.top] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-4)
        assert token.logprob == pytest.approx(float(expected[row.conversation.ids[begin + at]]), abs=1e-4)


@pytest.mark.parametrize("stop, expected", [(("2 3",), "1"), (("x", "3"), "1 2"), (("1",), ""), (("2 3 4 5 6",), None)])
def test_a_stop_text_ends_the_answer_before_it(engine, stop, expected):
    whole = "1 2 3 4 5"
    with writing(engine.vlm, whole):
        events = list(
            engine.submit(Request(QUESTION, (picture(),), options(max_new_tokens=40, look="none"), stop=stop))
        )
    given = events[-1].answer
    assert given.text == (whole if expected is None else expected) and given.finish == "stop"
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == given.text


@pytest.mark.parametrize("text", ["日本語 é 42", "éé日本 7", ANSWER_PREFIX + "é7"])
@pytest.mark.parametrize("stop", [(), ("$",)])
def test_probabilities_of_characters_that_take_several_tokens(engine, text, stop):
    whole = text.removeprefix(ANSWER_PREFIX)
    asked = Request(QUESTION, IMAGE, options(max_new_tokens=80, look="none"), stop=stop, logprobs=0)
    with writing(engine.vlm, text + "$ and more" * bool(stop)):
        events = list(engine.submit(asked))
    given = events[-1].answer
    assert given.text == whole
    count = len(engine.vlm.processor.tokenizer.encode(whole, add_special_tokens=False))
    assert len(given.tokens) - count in (0, 1)  # a newline of the prefix may count to the text
    assert [token for event in events[:-1] for token in event.tokens] == given.tokens


def test_looks_of_a_history_go_to_the_image_that_they_went_to(engine):
    images, asked = (picture(1), picture(2)), {"region": (2, 2, 5, 5), "look_at": 1}
    chat = engine.vlm.chat(list(images))
    with writing(engine.vlm, "7"):
        first = chat.ask("What?", **asked, max_new_tokens=5)
    past = Past("What?", images, first.text, ((GivenLook((2, 2, 5, 5)),),), look_at=1)
    given = answer(engine, "And?", (), options(look="clip"), (past,))
    expected = chat.ask("And?", look="clip", max_new_tokens=5)
    assert given.image.tobytes() == expected.image.tobytes() == images[1].tobytes()
    assert abs(given.looks[0].attention - expected.looks[0].attention).max() < 1e-4 and given.text == expected.text


def test_an_image_that_comes_later_keeps_what_was_said_before(engine):
    said = answer(engine, "Tell me about receipts " * 8, (), options(look="none"))
    before = Past("Tell me about receipts " * 8, (), said.text, look="none")
    assert answer(engine, "And this?", IMAGE, options(), (before,)).usage.cached_tokens > 100


def test_why_an_answer_ends(engine):
    with writing(engine.vlm, "1 2 3 4 5 6 7"):
        assert answer(engine, QUESTION, (picture(),), options(max_new_tokens=3, look="none")).finish == "length"
    with writing(engine.vlm, "1"):
        assert answer(engine, QUESTION, (picture(),), options(max_new_tokens=9, look="none")).finish == "stop"
    with writing(engine.vlm, write_call("region", (2, 2, 5, 5)), "1"):  # the call takes the tokens of its turn
        assert answer(engine, QUESTION, (picture(),), options(max_new_tokens=6)).finish == "stop"


def test_a_system_prompt_and_questions_without_an_image(engine):
    given = answer(engine, "Say <|im_end|> and <image>.", (), options(), system="Be <|im_start|>brief.")
    assert turns(given)[:2] == ["Be <|im_start|>brief.", "Say <|im_end|> and <image>."]
    assert given.image is None and given.looks == []


# ---- many at once


def test_threads_get_their_own_answers(engine):
    asked = [(QUESTION + f" {n % 5}", picture(n % 4), options(look=("none", "clip", "auto")[n % 3])) for n in range(24)]
    with ThreadPoolExecutor(12) as pool:
        given = list(pool.map(lambda one: answer(engine, one[0], (one[1],), one[2]), asked))
    for one, got in zip(asked, given, strict=True):
        assert got.text == engine.vlm.ask(one[1], one[0], **one[2].model_dump(exclude_defaults=True)).text
    assert engine.stats()["rows"] == engine.stats()["waiting"] == engine.stats()["tokens_held"] == 0


def test_events_asynchronously_and_leaving_off_cancels(engine):
    async def read(limit):
        events = []
        async for event in engine.submit(Request(QUESTION, (picture(),), options(look="region"))):
            events.append(event)
            if len(events) == limit:
                break
        return events

    async def both():
        return await asyncio.gather(*(read(99) for _ in range(8)))

    for events in asyncio.run(both()):
        assert isinstance(events[-1], Finished) and isinstance(events[0], LookTaken)
    for event in engine.submit(Request(QUESTION, (picture(),), LONG)):
        assert isinstance(event, TextDelta)
        break
    wait_for(lambda: engine.stats()["rows"] == 0)
    running = engine.submit(Request(QUESTION, (picture(),), LONG))
    running.cancel()
    with pytest.raises(Cancelled):
        list(running)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- what is refused


def test_a_full_queue_is_refused_and_says_when_to_come_back(tiny_vlm):
    engine = LocalEngine(tiny_vlm(), max_rows=1, max_waiting=2, turn=10_000)
    try:
        running = [engine.submit(Request(QUESTION, (picture(),), LONG))]
        wait_for(lambda: engine.stats()["rows"] == 1)
        running += [engine.submit(Request(QUESTION, (picture(),), LONG)) for _ in range(2)]
        with pytest.raises(EngineBusy, match="waiting") as refused:
            engine.submit(Request(QUESTION, (picture(),), LONG))
        with pytest.raises(EngineBusy):  # no place is lost by a refusal
            engine.submit(Request(QUESTION, (picture(),), LONG))
        assert refused.value.retry_after >= 1
        for one in running:
            one.cancel()
        assert answer(engine, QUESTION, (picture(),), options()).text is not None
    finally:
        engine.close()


def test_the_queue_is_bounded_while_turns_rotate(tiny_vlm):
    engine, running = LocalEngine(tiny_vlm(), max_rows=2, max_waiting=2, turn=1), []
    try:
        with pytest.raises(EngineBusy):
            for _ in range(5):
                running.append(engine.submit(Request(QUESTION, (picture(),), LONG)))
                wait_for(lambda: engine.stats()["waiting"] == 0)
        assert len(running) == 4
    finally:
        engine.close()


def test_a_deadline_ends_a_request_wherever_it_is(tiny_vlm):
    engine = LocalEngine(tiny_vlm(), max_rows=1, turn=10_000)
    try:
        at_work = engine.submit(Request(QUESTION, (picture(),), LONG), timeout=0.5)
        waiting = engine.submit(Request(QUESTION, (picture(),), LONG), timeout=0.2)
        for running in (waiting, at_work):
            with pytest.raises(DeadlineExceeded):
                list(running)
        assert engine.stats()["tokens_held"] == 0
    finally:
        engine.close()


CELLS = (1, 1, 2, 2)
REFUSED = {
    "a long question": ({"question": "why " * 50_000, "images": IMAGE}, r"\d+ tokens, and the model takes 32768"),
    "behind a re-encoding": (
        {"question": "why " * 40_000, "past": (Past("?", IMAGE, "a", ((GivenLook(kind="clip"),),)),)},
        r"\d+ tokens, and the model takes 32768",
    ),
    "a long answer": ({"question": "?", "images": IMAGE, "options": LONG}, r"may take \d+ tokens, .* holds 500"),
    "nothing": ({"question": "  ", "images": IMAGE}, "empty"),
    "half a character": ({"question": "?", "past": (Past("\ud800", IMAGE, ""),)}, "surrogate"),
    "looks without an image": ({"question": "?", "looks": ((GivenLook(CELLS, image=IMAGE[0]),),)}, "without an image"),
    "earlier ones": ({"question": "?", "past": (Past("?", (), "a", ((GivenLook(CELLS),),)),)}, "without an image"),
    "an empty turn": ({"question": "?", "images": IMAGE, "looks": ((),)}, "without a look"),
    "a look without an image": ({"question": "?", "options": options(look="region")}, "without an image"),
    "a long stop": ({"question": "?", "images": IMAGE, "stop": ("x" * 50_000,)}, "stop"),
    "an empty stop": ({"question": "?", "images": IMAGE, "stop": ("",)}, "stop"),
    "many alternatives": ({"question": "?", "images": IMAGE, "logprobs": 999}, "logprobs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_when_it_is_handed_in(tiny_vlm, case):
    fields, sentence = REFUSED[case]
    engine = LocalEngine(tiny_vlm(), max_tokens=500)
    try:
        with pytest.raises(UserError, match=sentence):
            engine.submit(Request(**fields))
        assert engine.stats()["rows"] == engine.stats()["waiting"] == 0
    finally:
        engine.close()


@pytest.mark.parametrize("extra", range(0, 60, 4))
def test_nothing_goes_beyond_the_models_window(tiny_vlm, extra):
    vlm = tiny_vlm()
    prompt = vlm._row_of(Request(QUESTION, IMAGE, options(look="none"))).size
    vlm.context_limit = prompt + extra + 1
    crop = (GivenLook((0, 0, 7, 7), image=picture(2)),)
    try:
        for asked in (
            {"look": "none"},
            {"look": "region"},
            {"look": "clip"},
            {"look": "auto"},
            {"region": (0, 0, 7, 7)},
        ):
            for looks in ((), (crop,)):
                try:
                    row = vlm._row_of(Request(QUESTION, IMAGE, options(**asked, max_new_tokens=500), looks=looks))
                except UserError as error:
                    assert str(vlm.context_limit) in str(error)
                    continue  # too long by itself
                with writing(vlm, write_call("region", (0, 0, 7, 7)), "1 2 3 4 5 6 7 8 9 " * 9):
                    given = next(event.answer for _, event in run(vlm, [row]) if isinstance(event, Finished))
                assert given.usage.sequence_length <= vlm.context_limit
                assert given.finish == "length" or given.text
                assert all("no room" in look.problem for look in given.looks if look.problem)
    finally:
        vlm.context_limit = None


def test_closing_lets_answers_finish_or_says_that_it_did_not(tiny_vlm):
    engine = LocalEngine(tiny_vlm())
    running = engine.submit(Request(QUESTION, (picture(),), options()))
    engine.close(drain=20)
    assert isinstance(list(running)[-1], Finished)
    with pytest.raises(EngineClosed):
        engine.submit(Request(QUESTION, (picture(),)))
    engine = LocalEngine(tiny_vlm())
    running = engine.submit(Request(QUESTION, (picture(),), LONG))
    engine.close()
    with pytest.raises(EngineClosed):
        list(running)


def test_a_fault_in_one_answer_is_its_own(engine, monkeypatch):
    monkeypatch.setattr(engine.vlm.processor, "decode", lambda ids: 1 / 0)
    broken = engine.submit(Request(QUESTION, (picture(),), options(), logprobs=0))
    with pytest.raises(RelookError, match="ZeroDivisionError") as failed:
        list(broken)
    assert isinstance(failed.value.__cause__, ZeroDivisionError)
    monkeypatch.undo()
    assert answer(engine, QUESTION, (picture(),), options(look="none")).finish in ("stop", "length")


def test_the_engine_outlives_an_error_outside_of_a_step(engine, monkeypatch):
    monkeypatch.setattr(engine, "_expire", lambda: 1 / 0)
    with pytest.raises(RelookError, match="ZeroDivisionError"):
        list(engine.submit(Request(QUESTION, IMAGE, options())))
    monkeypatch.undo()
    assert answer(engine, QUESTION, IMAGE, options(look="none")).finish in ("stop", "length")


def test_a_fault_in_a_step_is_not_the_fault_of_who_comes_in_that_step(engine, monkeypatch):
    """What is at work fails; what arrives meanwhile is answered, and nothing is left at work unseen."""
    late = []

    def failing():
        late.append(engine.submit(Request(QUESTION, IMAGE, options(look="none"))))
        raise ZeroDivisionError

    monkeypatch.setattr(engine._scheduler, "step", failing)
    with pytest.raises(RelookError, match="ZeroDivisionError"):
        list(engine.submit(Request(QUESTION, IMAGE, options())))
    assert isinstance(list(late[0])[-1], Finished)
    assert engine.stats()["rows"] == 0 and not engine._scheduler.rows


def test_rows_in_the_midst_of_admission_fail_with_their_step(engine, monkeypatch):
    """They are in none of the scheduler's lists then, and must not hang."""
    monkeypatch.setattr(engine.memory, "reuse", lambda conversation: 1 / 0)
    with pytest.raises(RelookError, match="ZeroDivisionError"):
        list(engine.submit(Request(QUESTION, IMAGE, options())))
    assert engine.stats()["rows"] == 0


def test_a_view_that_cannot_be_encoded_fails_its_row_only(engine, monkeypatch):
    vlm = engine.vlm
    rows = [vlm._row_of(Request(QUESTION, (picture(seed),), options(look="none"))) for seed in range(3)]
    rows[1].conversation.pending.shown[0][1].view.tensors = {"pixel_values": torch.zeros(1)}
    scheduler, ends = Scheduler(vlm), {}
    for row in rows:
        scheduler.add(row)
    while scheduler.rows:
        ends |= {rows.index(row): event for row, event in scheduler.step() if not isinstance(event, TextDelta)}
    assert isinstance(ends[1], Exception) and all(isinstance(ends[i], Finished) for i in (0, 2))


def test_ended_requests_leave_nothing_behind(engine):
    gc.collect()
    gc.disable()
    try:
        finished = engine.submit(Request(QUESTION, IMAGE, options()))
        rows = [weakref.ref(job.row) for job in engine._at_work()]
        list(finished)
        cancelled = engine.submit(Request(QUESTION, IMAGE, LONG))
        rows += [weakref.ref(job.row) for job in engine._at_work()]
        cancelled.cancel()
        del cancelled
        answer(engine, QUESTION, IMAGE, options())
        wait_for(lambda: all(row() is None for row in rows))
    finally:
        gc.enable()


def test_kept_views_hold_what_they_are_counted_for(engine):
    vlm, memory = engine.vlm, Memory(2**22)
    scheduler = Scheduler(vlm, memory=memory)
    for seed in range(6):
        scheduler.add(vlm._row_of(Request(QUESTION, (picture(seed),), options()), vlm._begin(memory)))
    scheduler.step()
    views = [kept.view.features for kept in memory._kept.values() if kept.view]
    assert len(views) == 6 and memory.bytes == sum(view.untyped_storage().nbytes() for view in views)
