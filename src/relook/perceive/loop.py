"""The generation loop: answers a group of questions side by side, with second looks.

1. Prefill: the caches of the waiting rows are merged, and one forward runs all their pending tokens (openings, turns).
2. Decode: one token a step for all rows. A row that looks again, or is finished, is extracted with its own tokens.
3. When no row decodes any more, the waiting rows are merged again.

Every token goes through the language model exactly once. What is written is decided by `row.Row`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from relook.trace import Event, LookTaken

from .conversation import forward_pending
from .features import encode
from .kv_cache import KVRows
from .row import Row
from .sampling import draw

Recorder = Callable[[int, int, Tensor], None]  # (row, index of the last token, logits (V,) of the next)


@torch.inference_mode()
def run(vlm: Any, rows: Sequence[Row], record: Recorder | None = None) -> Iterator[tuple[int, Event]]:
    """Answer all rows side by side.

    A row's answer, looks and counts do not depend on the other rows. `seconds` are wall time, divided evenly among the
    rows of a forward.

    Args:
        vlm: a `VLM`.
        rows: the questions.
        record: is called with the logits after every forward (tests compare them with one full forward).

    Yields:
        (index of the row, event), as they happen.
    """
    number = {id(row): i for i, row in enumerate(rows)}
    waiting = list(rows)
    while waiting:
        live, waiting = waiting, []
        images = [[shown for _, shown in row.conversation.pending.shown] for row in live]
        if any(images):
            with _timed_shared(vlm, live, lambda row: "look" if row.started else "vision"):
                encode(vlm.model, [shown.view for row in images for shown in row])
        kv = KVRows.merge([row.conversation.kv for row in live])
        states = _forward_step(vlm, kv, live)
        for row, seen in zip(live, images, strict=True):
            row.events.extend(LookTaken(shown.look) for shown in seen if shown.look is not None)
        while live:
            with _timed_shared(vlm, live, lambda row: "decode"):
                _sample_step(vlm, live, states, number, record)
            going = [i for i, row in enumerate(live) if not row.finished and not row.waiting]
            for i, row in enumerate(live):  # before any event is yielded: a caller that stops has whole conversations
                if i not in going:
                    row.conversation.kv = kv.extract(i)
                    waiting += [] if row.finished else [row]
            for row in live:
                while row.events:
                    yield number[id(row)], row.events.popleft()
            kv, live = kv.select_rows(going), [live[i] for i in going]
            if live:
                states = _forward_step(vlm, kv, live)


def _forward_step(vlm: Any, kv: KVRows, rows: Sequence[Row]) -> Tensor:
    """One forward over the pending tokens of the rows; (B, d) hidden states of their last tokens."""
    with _timed_shared(vlm, rows, lambda row: row.stage):
        return forward_pending(vlm.model, kv, [row.conversation for row in rows])


def _sample_step(
    vlm: Any, live: Sequence[Row], states: Tensor, number: dict[int, int], record: Recorder | None
) -> None:
    """Give every row its hidden state of `states` (B, d), and sample a token for those that need one."""
    for row, state in zip(live, states, strict=True):
        if record is not None:  # every position, also those whose successor is forced
            record(number[id(row)], len(row.conversation.ids) - 1, vlm.model.lm_head(state).float())
        row.after_forward(state)
    wanting = [i for i, row in enumerate(live) if row.needs_token]
    if not wanting:
        return
    logits = vlm.model.lm_head(states[wanting]).float()  # (b, V)
    banned = torch.stack([live[i].banned() for i in wanting])
    logits = logits.masked_fill(banned, -torch.inf)  # before processors and warpers, which keep the best of the rest
    ends = sorted(vlm.vocabulary.ends)
    for place, i in enumerate(wanting if vlm.logits_processors else ()):
        ids = torch.tensor([live[i].conversation.ids], device=logits.device)
        scores = vlm.logits_processors(ids, logits[place : place + 1].clone())[0].masked_fill(banned[place], -torch.inf)
        if scores[vlm.vocabulary.im_end] == -torch.inf:  # a turn that may not end yet has other ends, too
            scores[ends] = -torch.inf
        if scores.isfinite().any():  # else only what was taken away keeps a call well formed
            logits[place] = scores
    greedy = logits.argmax(-1).tolist()
    for place, i in enumerate(wanting):
        row = live[i]
        row.accept(draw(logits[place], row.options, row.generator) if row.options.do_sample else greedy[place])


@contextmanager
def _timed_shared(vlm: Any, rows: Sequence[Row], stage: Callable[[Row], str]) -> Iterator[None]:
    """Measure the wall time of work that several rows share, and divide it among them, each under its own stage."""
    stages = [stage(row) for row in rows]
    begin = time.perf_counter()
    yield
    if vlm.model.device.type == "cuda":
        torch.cuda.synchronize(vlm.model.device)
    share = (time.perf_counter() - begin) / len(rows)
    for row, name in zip(rows, stages, strict=True):
        row.seconds[name] += share
