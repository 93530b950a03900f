"""Continuous batching: what a request gets does not depend on who else is there, and nobody waits for ever.

The yardstick is `VLM.ask`, alone, whose answers are compared with full forwards in test_loop.py.
"""

from __future__ import annotations

import random

import pytest
import torch
from support.scripted_model import MIX, QUESTION, picture
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

from relook.options import AskOptions
from relook.perceive.engine import Request
from relook.perceive.loop import Limits, Scheduler
from relook.perceive.memory import Memory
from relook.trace import Finished, TextDelta

pytestmark = pytest.mark.usefixtures("base")
TIGHT = Limits(rows=4, tokens=900, piece=16, turn=3)


def request(number: int, **more) -> Request:
    options = {"max_new_tokens": 2 + number % 7, **MIX[number % len(MIX)], **more}
    if number % 5 == 0:
        options |= {"do_sample": True, "seed": number, "temperature": 1.5}
    image = picture(number % 6, (60 + 20 * (number % 4), 150 - 15 * (number % 3)))
    return Request(QUESTION + " again" * (number % 3), (image,), AskOptions.of(options))


def alone(vlm, asked: Request):
    return vlm.ask(list(asked.images), asked.question, **asked.options.model_dump(exclude_defaults=True))


def same(answer, expected):
    assert answer.text == expected.text
    assert [turn.text for turn in answer.transcript] == [turn.text for turn in expected.transcript]
    assert answer.looks == expected.looks
    for look, wanted in zip(answer.looks, expected.looks, strict=True):
        assert (look.attention is None) == (wanted.attention is None)
        if look.attention is not None:
            assert abs(look.attention - wanted.attention).max() < 1e-4
    usage = answer.usage
    assert usage.lm_positions + usage.cached_tokens == expected.usage.lm_positions
    assert usage.generated_tokens == expected.usage.generated_tokens


@pytest.mark.parametrize("limits", [Limits(), TIGHT], ids=["no limits", "tight"])
@pytest.mark.parametrize("remember", [0, 2**20], ids=["no memory", "memory"])
def test_requests_that_arrive_at_random_steps_are_answered_as_if_alone(tiny_vlm, limits, remember):
    vlm, dice = tiny_vlm(), random.Random(7)
    scheduler = Scheduler(vlm, limits, Memory(remember))
    requests = [request(number) for number in range(32)]
    arrivals = sorted((dice.randrange(60), number) for number in range(32))
    cancelled = set(dice.sample(range(32), 6))
    rows, answers, step = {}, {}, 0
    while arrivals or scheduler.rows:
        while arrivals and arrivals[0][0] <= step:
            number = arrivals.pop(0)[1]
            rows[number] = vlm._row_of(requests[number], vlm._begin(scheduler.memory))
            scheduler.add(rows[number])
        for number in sorted(cancelled & rows.keys()):
            if dice.random() < 0.3:
                scheduler.remove(rows[number])
                cancelled.discard(number)
                assert all(row is not rows[number] for row in scheduler.rows)
        for row, event in scheduler.step():
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Finished):
                answers[next(n for n, r in rows.items() if r is row)] = event.answer
        assert len(scheduler.live) + len(scheduler.prefills) <= (limits.rows or 32)
        step += 1
    assert len(answers) >= 26
    for number, answer in answers.items():
        same(answer, alone(vlm, requests[number]))
    if remember:
        assert sum(answer.usage.cached_tokens for answer in answers.values()) > 0
        assert 0 < scheduler.memory.bytes <= remember


def test_a_question_is_begun_within_bounded_steps_under_a_full_load_of_long_answers(tiny_vlm):
    """With turns of 8 tokens, 4 places and 4 long answers, the k-th that waits starts after about k turns."""
    vlm = tiny_vlm()
    scheduler = Scheduler(vlm, Limits(rows=4, piece=64, turn=8))

    def row(words: int):
        options = AskOptions.of({"look": "none", "max_new_tokens": words})
        return vlm._row_of(Request(QUESTION, (picture(words % 3),), options))

    for _ in range(4):
        scheduler.add(row(400))
    for _ in range(20):
        scheduler.step()
    short = [row(5) for _ in range(6)]
    for one in short:
        scheduler.add(one)
    arrived, first = 0, {}
    for arrived in range(200):
        for one, event in scheduler.step():
            if isinstance(event, (TextDelta, Finished)):
                first.setdefault(id(one), arrived)
        if all(id(one) in first for one in short):
            break
    assert max(first[id(one)] for one in short) <= 60
    assert len(scheduler.rows) >= 4, "the long answers go on"


def test_a_long_prompt_does_not_stop_the_others(tiny_vlm):
    """While a prompt is read in pieces, every row that decodes gets its token in every step."""
    vlm = tiny_vlm()
    scheduler = Scheduler(vlm, Limits(rows=4, piece=8, turn=1000))
    talking = vlm._row_of(Request(QUESTION, (picture(1),), AskOptions.of({"look": "none", "max_new_tokens": 300})))
    scheduler.add(talking)
    while not talking.decoded:
        scheduler.step()
    reading = vlm._row_of(Request("Why? " * 60, (picture(2),), AskOptions.of({"look": "none", "max_new_tokens": 2})))
    scheduler.add(reading)
    before, steps = talking.decoded, 0
    while not reading.started:
        scheduler.step()
        steps += 1
    assert steps > 10 and talking.decoded == before + steps


def test_streams_go_on_beside_a_long_prompt_while_turns_change(tiny_vlm):
    """Four long answers in four places, with turns of three tokens, and a prompt of a hundred pieces."""
    vlm = tiny_vlm()
    scheduler = Scheduler(vlm, Limits(rows=4, piece=8, turn=3))
    long = AskOptions.of({"look": "none", "max_new_tokens": 400})
    talking = [vlm._row_of(Request(QUESTION, (picture(seed),), long)) for seed in range(4)]
    for row in talking:
        scheduler.add(row)
    while not all(row.started for row in talking):
        scheduler.step()
    short = AskOptions.of({"look": "none", "max_new_tokens": 2})
    reading = vlm._row_of(Request("Why? " * 120, (picture(),), short))
    scheduler.add(reading)
    lengths, steps = [len(row.conversation.ids) for row in talking], 0
    while not reading.started:
        scheduler.step()
        steps += 1
        assert steps < 1000
    written = sum(len(row.conversation.ids) for row in talking) - sum(lengths)
    assert written >= 2 * steps, "three of the four places go on decoding"


def test_requests_that_come_together_get_their_first_tokens_one_after_the_other(tiny_vlm):
    """The k-th first token waits for k images and prompts, not for all of them."""
    vlm = tiny_vlm()
    scheduler, order = Scheduler(vlm, Limits(rows=8, piece=64)), []
    asked = AskOptions.of({"look": "none", "max_new_tokens": 30})
    rows = [vlm._row_of(Request(QUESTION, (picture(seed),), asked)) for seed in range(4)]
    for row in rows:
        scheduler.add(row)
    while len(order) < 4:
        scheduler.step()
        encoded = sum(row.patches > 0 for row in rows)
        order += [encoded for row in rows[len(order) :] if row.started]
    assert order == [1, 2, 3, 4]


def test_answers_that_began_together_do_not_end_together_for_ever(tiny_vlm):
    """Four clients, each asking again two steps after its answer: from the second answer on none waits for images."""
    vlm = tiny_vlm().with_settings()  # a copy
    vlm.logits_processors = LogitsProcessorList([SuppressTokensLogitsProcessor([vlm.vocabulary.im_end])])  # all alike
    scheduler = Scheduler(vlm, Limits(rows=8, piece=64, spacing=2))
    asked = AskOptions.of({"look": "none", "max_new_tokens": 30})
    coming, rows, ahead = {0: 4}, [], {}
    for step in range(250):
        for _ in range(coming.pop(step, 0)):
            row = vlm._row_of(Request(QUESTION, (picture(len(rows)),), asked))
            ahead[id(row)] = sum(other.patches > 0 for other in rows)
            scheduler.add(row)
            rows.append(row)
        ended = sum(isinstance(event, Finished) for _, event in scheduler.step())
        coming[step + 2] = coming.get(step + 2, 0) + ended
        for row in rows:
            if row.started and id(row) in ahead:  # images that were encoded between its arrival and its first token
                row.number = sum(other.patches > 0 for other in rows if other is not row) - ahead.pop(id(row))
    assert [row.number for row in rows[4:24]] == [0] * 20


def test_a_row_that_fails_fails_alone(tiny_vlm, monkeypatch):
    vlm = tiny_vlm()
    rows = [vlm._row_of(request(number)) for number in range(4)]
    monkeypatch.setattr(rows[2], "accept", lambda *_: 1 / 0)
    scheduler = Scheduler(vlm)
    for row in rows:
        scheduler.add(row)
    ends = {}
    while scheduler.rows:
        for row, event in scheduler.step():
            if isinstance(event, (Finished, Exception)):
                ends[rows.index(row)] = event
    assert isinstance(ends.pop(2), ZeroDivisionError)
    for number, event in ends.items():
        same(event.answer, alone(vlm, request(number)))


def test_cancelling_frees_the_row_and_its_keys_before_the_next_step(tiny_vlm):
    vlm = tiny_vlm()
    scheduler = Scheduler(vlm, Limits(rows=8))
    rows = [vlm._row_of(request(number, max_new_tokens=50, look="none", region=None)) for number in (1, 2, 3)]
    for row in rows:
        scheduler.add(row)
    scheduler.step()
    held = scheduler.tokens_held
    scheduler.remove(rows[1])
    assert scheduler.live == [rows[0], rows[2]] and len(scheduler._kv) == 2
    assert scheduler.tokens_held < held


def test_bfloat16_rows_join_and_leave(tiny_vlm):
    vlm = tiny_vlm(seed=1)
    try:
        vlm.model.to(torch.bfloat16)
        scheduler = Scheduler(vlm, TIGHT, Memory(2**20))
        for number in range(8):
            scheduler.add(vlm._row_of(request(number), vlm._begin(scheduler.memory)))
        finished = 0
        while scheduler.rows:
            finished += sum(isinstance(event, Finished) for _, event in scheduler.step())
        assert finished == 8
    finally:
        vlm.model.to(torch.float32)
