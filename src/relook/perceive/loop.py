"""The loop: a group of questions to their answers, with second looks on the way.

    join      rows that wait put their caches side by side; one forward pushes all their blocks (openings, new turns)
    decode    one token a step for all rows of the group; a row that wants to look, or is done, leaves with its tokens
    again     when nobody decodes any more, the rows that wait join

Every token goes through the language model exactly once. What a row writes is the row's affair (`row.py`); this module
refuses to know turns, calls and text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from relook.trace import LookTaken

from .conversation import forward_pending
from .features import encode
from .kv_cache import KVRows
from .row import Event, LoopContext, Row

Recorder = Callable[[int, int, Tensor], None]  # (row, index of the token just pushed, logits (V,) of the next)


@torch.inference_mode()
def run(context: LoopContext, rows: Sequence[Row], record: Recorder | None = None) -> Iterator[tuple[int, Event]]:
    """Answer all rows side by side; (row number, event) as things happen.

    A row's answer, looks and counts are those it has alone. `seconds` are wall time, shared out evenly where rows
    shared a forward. `record` gets the logits after every pushed block (tests compare them with one full forward).
    """
    number = {id(row): i for i, row in enumerate(rows)}
    waiting = list(rows)
    while waiting:
        live, waiting = waiting, []
        images = [[shown for _, shown in row.conversation.pending.shown] for row in live]
        if any(images):
            with _timed_shared(context, live, lambda row: "look" if row.started else "vision"):
                encode(context.model, [shown.view for row in images for shown in row])
        kv = KVRows.merge([row.conversation.kv for row in live])
        states = _forward_step(context, kv, live)
        for row, seen in zip(live, images, strict=True):
            row.events.extend(LookTaken(shown.look) for shown in seen if shown.look is not None)
        while live:
            with _timed_shared(context, live, lambda row: "decode"):
                _sample_step(context, live, states, number, record)
            going = [i for i, row in enumerate(live) if not row.finished and not row.waiting]
            for i, row in enumerate(live):
                if (
                    i not in going
                ):  # before any event is given out: whoever stops listening then has whole conversations
                    row.conversation.kv = kv.extract(i)
                    waiting += [] if row.finished else [row]
            for row in live:
                while row.events:
                    yield number[id(row)], row.events.popleft()
            kv, live = kv.select_rows(going), [live[i] for i in going]
            if live:
                states = _forward_step(context, kv, live)


def _forward_step(context: LoopContext, kv: KVRows, rows: Sequence[Row]) -> Tensor:
    """One forward over what the rows have to push; (B, d) hidden states of their last tokens."""
    with _timed_shared(context, rows, lambda row: row.stage):
        return forward_pending(context.model, kv, [row.conversation for row in rows])


def _sample_step(
    context: LoopContext, live: Sequence[Row], states: Tensor, number: dict[int, int], record: Recorder | None
) -> None:
    """After a push: tell every row, and draw a token for those that want one. `states` is (B, d)."""
    for row, state in zip(live, states, strict=True):
        if record is not None:  # every position, also those whose successor is forced
            record(number[id(row)], len(row.conversation.ids) - 1, context.model.lm_head(state).float())
        row.after_forward(state)
    wanting = [i for i, row in enumerate(live) if row.needs_token]
    if not wanting:
        return
    logits = context.model.lm_head(states[wanting]).float()  # (b, V)
    logits = logits.masked_fill(torch.stack([live[i].banned() for i in wanting]), -torch.inf)
    greedy = logits.argmax(-1).tolist()
    for place, i in enumerate(wanting):
        row = live[i]
        sampling = row.request.sampling
        row.accept(sampling.draw(logits[place], row.generator) if sampling.do_sample else greedy[place])


@contextmanager
def _timed_shared(context: LoopContext, rows: Sequence[Row], stage: Callable[[Row], str]) -> Iterator[None]:
    """Measures wall time of work that several rows share, and shares it out among them, each under its own stage."""
    stages = [stage(row) for row in rows]
    begin = time.perf_counter()
    yield
    if context.model.device.type == "cuda":
        torch.cuda.synchronize(context.model.device)
    share = (time.perf_counter() - begin) / len(rows)
    for row, name in zip(rows, stages, strict=True):
        row.seconds[name] += share
