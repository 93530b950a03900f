"""The generation loop: continuous batching of rows that may look again.

A step of the `Scheduler`

1. admits waiting rows, within its limits: new ones, and those that come back with the turn that answers a look;
2. prefill: runs their pending tokens (or a piece of them) in one forward; rows that have run all of them join;
3. decode: runs one token of every row that decodes, in another forward;
4. samples a token for every row that needs one. A row that looks again, or is finished, leaves with its own keys and
   values; the others go on.

Every token goes through the language model exactly once. What is written is decided by `row.Row`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relook.trace import Event, LookTaken

from .conversation import Inputs, ShownImage, embed_pending, forward_inputs
from .features import ViewFeatures, encode
from .kv_cache import KVRows
from .memory import Memory
from .row import Row
from .sampling import draw

Recorder = Callable[[Row, int, Tensor], None]  # (row, index of the last token, logits (V,) of the next)
Happened = tuple[Row, Event | Exception]  # an exception: the row has failed


@dataclass(frozen=True)
class Limits:
    """Bounds of a scheduler; None: unbounded.

    rows     at work at once
    tokens   that rows which have begun may hold, with those they may still write
    piece    tokens of prefill in one step: how long the others' next token may have to wait
    turn     tokens that a row decodes before it makes room, where another one waits for its place
    spacing  decode steps between the first token after one image and the encoding of the next: answers that began
             together would end together, and the questions that follow them would wait for one another again
    """

    rows: int | None = None
    tokens: int | None = None
    piece: int | None = None
    turn: int | None = None
    spacing: int = 0


@dataclass(eq=False)
class _Prefill:
    """A row's pending tokens, of which the first `done` have run."""

    row: Row
    inputs: Inputs
    seen: list[ShownImage]
    done: int = 0

    def piece(self, limit: int | None) -> Inputs:
        """The next tokens, at most `limit` of them."""
        end = None if limit is None else self.done + limit
        embeds, positions = self.inputs
        return embeds[self.done : end], positions[:, self.done : end]

    @property
    def left(self) -> int:
        return len(self.inputs[0]) - self.done


class Scheduler:
    """Answers rows side by side. A row's answer, looks and counts do not depend on the others.

    Not for several threads. `seconds` are wall time, divided evenly among the rows of a forward.

    Args:
        vlm: a `VLM`.
        limits: see there.
        memory: of earlier conversations, whose keys, values and features are used again.
        record: is called with the logits after every forward (tests compare them with one full forward).
    """

    def __init__(self, vlm: Any, limits: Limits | None = None, memory: Memory | None = None, record: Any = None):
        self.vlm, self.limits, self.memory, self.record = vlm, limits or Limits(), memory, record
        self.waiting: deque[Row] = deque()
        self.prefills: list[_Prefill] = []
        self.live: list[Row] = []
        self._kv = KVRows.empty(0)
        self._happened: list[Happened] = []
        self._steps = self._decoded = 0  # all; those since a prompt with an image was through

    @property
    def rows(self) -> list[Row]:
        """All that are not finished."""
        return [*self.live, *(prefill.row for prefill in self.prefills), *self.waiting]

    @property
    def tokens_held(self) -> int:
        """Tokens of the rows that have begun, with those that they may still write."""
        return sum(tokens_of(row) for row in self.rows if row.admitted)

    def add(self, row: Row) -> None:
        """A row to answer; it waits for its place."""
        self.waiting.append(row)

    def remove(self, row: Row) -> None:
        """Forget a row, which frees its place and memory."""
        self.waiting = deque(other for other in self.waiting if other is not row)
        self.prefills = [prefill for prefill in self.prefills if prefill.row is not row]
        self._keep([i for i, other in enumerate(self.live) if other is not row])

    @torch.inference_mode()
    def step(self) -> list[Happened]:
        """One step; returns what happened, in order."""
        self._happened, self._steps = [], self._steps + 1
        self._encode(self._resume(self._admit()))
        self._decoded += 1
        joining = self._prefill()
        states = [*self._decode(), *(state for _, _, state in joining)]
        if joining:
            self._kv = KVRows.merge([*([self._kv] if self.live else []), *(kv for _, kv, _ in joining)])
            self.live += [row for row, _, _ in joining]
        if self.live:
            with _timed_shared(self.vlm, self.live, lambda row: "decode"):
                self._sample(torch.stack(states))
        self._dismiss()
        happened, self._happened = self._happened, []
        return happened

    # -- admission ---------------------------------------------------------------------------------------------------

    def _admit(self) -> list[Row]:
        """Take rows out of the queue in order, as far as the limits go."""
        admitted: list[Row] = []
        if not self.waiting:
            return admitted
        held, blocked = self.tokens_held, False  # blocked: no new row may overtake one for which tokens are lacking
        for row in list(self.waiting):
            at_work = len(self.live) + len(self.prefills) + len(admitted)
            if not row.admitted and (blocked or not self._has_tokens(held, row, bool(at_work))):
                blocked = True
                continue
            seeing = self.limits.piece is not None and bool(row.conversation.pending.shown)
            if seeing and (self._almost_through() or self._too_soon()):
                continue
            if self.limits.rows is not None and at_work >= self.limits.rows and not self._make_room():
                break
            self.waiting.remove(row)
            held += 0 if row.admitted else tokens_of(row)
            row.admitted, row.decoded = True, 0
            admitted.append(row)
            if seeing:
                break  # one encoder call between two steps of the others
        return admitted

    def _almost_through(self) -> bool:
        """Whether a prompt is read in two more pieces at most: its first token comes before the next one's image."""
        return any(prefill.seen and prefill.left <= 2 * (self.limits.piece or 0) for prefill in self.prefills)

    def _too_soon(self) -> bool:
        """Whether rows that decode are still to have their steps between two images."""
        return bool(self.live) and self._decoded < self.limits.spacing

    def _has_tokens(self, held: int, row: Row, anybody: bool) -> bool:
        limit = self.limits.tokens
        return limit is None or held + tokens_of(row) <= limit or not (held or anybody)

    def _make_room(self) -> bool:
        """Send the row that has decoded longest back to the queue, if its turn is over."""
        turn = self.limits.turn
        longest = max(self.live, key=lambda row: row.decoded, default=None)
        if turn is None or longest is None or longest.decoded < turn:
            return False
        at = self.live.index(longest)
        longest.conversation.kv = self._kv.extract(at)
        self._keep([i for i in range(len(self.live)) if i != at])
        self.waiting.append(longest)
        return True

    def _resume(self, rows: Sequence[Row]) -> list[Row]:
        """Let rows that were sent back to the queue decode on; returns the others."""
        back = [row for row in rows if not row.waiting]
        if back:
            kvs = [row.conversation.kv for row in back]
            self._kv = KVRows.merge([*([self._kv] if self.live else []), *kvs])
            self.live = [*self.live, *back]
        return [row for row in rows if row.waiting]

    def _encode(self, rows: Sequence[Row]) -> None:
        """Everything that the pending tokens of admitted rows need, before they run."""
        seen: dict[int, list[ShownImage]] = {}
        for row in rows:
            if self.memory is not None and len(row.conversation.pending) > 1:
                row.cached += self.memory.reuse(row.conversation)
            seen[id(row)] = row.conversation.pending.to_see
        new = {id(row): [s.view for s in seen[id(row)] if s.view.features is None] for row in rows}
        self._encode_views([row for row in rows if new[id(row)]], new)
        rows = [row for row in rows if not row.failed]
        for row in rows:
            row.patches += sum({id(view): view.patches for view in new[id(row)]}.values())
            if self.memory is not None:
                for view in new[id(row)]:
                    self.memory.keep_view(view)
        for row in rows:
            try:
                (inputs,) = embed_pending(self.vlm.model, [row.conversation])
                self.prefills.append(_Prefill(row, inputs, seen[id(row)]))
            except Exception as error:
                self._fail([row], error)

    def _encode_views(self, rows: Sequence[Row], new: dict[int, list[ViewFeatures]]) -> None:
        """Encode the new views of rows, together or, if that fails, row by row."""
        if not rows:
            return
        try:
            with _timed_shared(self.vlm, rows, lambda row: "look" if row.started else "vision"):
                encode(self.vlm.model, [view for row in rows for view in new[id(row)]])
        except Exception as error:
            if len(rows) == 1:
                self._fail(rows, error)
            for row in rows if len(rows) > 1 else ():
                self._encode_views([row], new)

    # -- forwards ----------------------------------------------------------------------------------------------------

    def _prefill(self) -> list[tuple[Row, KVRows, Tensor]]:
        """Run a piece of the pending tokens; returns the rows that are through, with the states of their last ones.

        By turns the oldest and the shortest come first: a long prompt keeps neither short ones nor itself waiting.
        """
        limit, width, parts = self.limits.piece, 0, list[_Prefill]()
        by_age = self._steps % 2 == 0
        for prefill in self.prefills if by_age else sorted(self.prefills, key=lambda prefill: prefill.left):
            # as many as fit, padded to the longest
            wider = max(width, prefill.left if limit is None else min(prefill.left, limit))
            if limit is None or not parts or wider * (len(parts) + 1) <= limit:
                width = wider
                parts.append(prefill)
        inputs = [part.piece(limit) for part in parts]
        if not parts:
            return []
        rows = [part.row for part in parts]
        try:
            kv = KVRows.merge([row.conversation.kv for row in rows])
            with _timed_shared(self.vlm, rows, lambda row: row.stage):
                states = forward_inputs(self.vlm.model, kv, inputs)
        except Exception as error:
            self.prefills = [prefill for prefill in self.prefills if prefill not in parts]
            self._fail(rows, error)
            return []
        through = []
        for i, (part, (embeds, _)) in enumerate(zip(parts, inputs, strict=True)):
            part.done += len(embeds)
            if part.left:
                part.row.conversation.kv = kv.extract(i)
                continue
            self.prefills.remove(part)
            self._decoded = 0 if part.seen else self._decoded
            part.row.events.extend(LookTaken(shown.look) for shown in part.seen if shown.look is not None)
            through.append((part.row, i, states[i]))
        together = kv.select_rows([i for _, i, _ in through])
        empty = KVRows.empty(0)
        return [(row, empty if at else together, state) for at, (row, _, state) in enumerate(through)]

    def _decode(self) -> list[Tensor]:
        """One forward over one token of every row that decodes; the states (d,) after them."""
        if not self.live:
            return []
        try:
            with _timed_shared(self.vlm, self.live, lambda row: row.stage):
                inputs = embed_pending(self.vlm.model, [row.conversation for row in self.live])
                states = forward_inputs(self.vlm.model, self._kv, inputs)
        except Exception as error:
            self._fail(self.live, error)
            self._keep([])
            return []
        for row in self.live:
            row.decoded += 1
        return list(states)

    def _sample(self, states: Tensor) -> None:
        """Give every row its hidden state of `states` (B, d), and sample a token for those that need one."""
        for row, state in zip(self.live, states, strict=True):
            if self.record is not None:  # every position, also those whose successor is forced
                self.record(row, len(row.conversation.ids) - 1, self.vlm.model.lm_head(state).float())
            self._guard(row, row.after_forward, state)
        wanting = [i for i, row in enumerate(self.live) if row.needs_token]
        if not wanting:
            return
        raw = self.vlm.model.lm_head(states[wanting]).float()  # (b, V)
        banned = torch.stack([self.live[i].banned() for i in wanting])
        logits = raw.masked_fill(banned, -torch.inf)  # before processors and warpers, which keep the best of the rest
        for place, i in enumerate(wanting if self.vlm.logits_processors else ()):
            self._guard(self.live[i], self._process, logits, place, banned[place], self.live[i])
        greedy = logits.argmax(-1).tolist()
        for place, i in enumerate(wanting):
            row = self.live[i]
            drawn = lambda row=row, place=place: draw(logits[place], row.options, row.generator)  # noqa: E731
            self._guard(row, self._accept, row, drawn if row.options.do_sample else greedy[place], raw[place])

    def _accept(self, row: Row, token: Any, logits: Tensor) -> None:
        row.accept(token() if callable(token) else token, logits)

    def _process(self, logits: Tensor, place: int, banned: Tensor, row: Row) -> None:
        """Apply the model's logits processors to one row of `logits` (b, V)."""
        ids = torch.tensor([row.conversation.ids], device=logits.device)
        scores = self.vlm.logits_processors(ids, logits[place : place + 1].clone())[0].masked_fill(banned, -torch.inf)
        if scores[self.vlm.vocabulary.im_end] == -torch.inf:  # a turn that may not end yet has other ends, too
            scores[sorted(self.vlm.vocabulary.ends)] = -torch.inf
        if scores.isfinite().any():  # else only what was taken away keeps a call well formed
            logits[place] = scores

    # -- leaving -----------------------------------------------------------------------------------------------------

    def _dismiss(self) -> None:
        """Let rows leave that are finished or wait for a look's turn, and collect what happened."""
        rows, going, back = self.live, list[int](), list[Row]()
        for i, row in enumerate(rows):  # before any event is seen: a caller that stops has whole conversations
            if row.failed:
                continue
            if not row.finished and not row.waiting:
                going.append(i)
                continue
            row.conversation.kv = self._kv.extract(i).head(row.conversation.run)  # shorter where a turn was forgotten
            if not row.finished:
                back.append(row)
            elif self.memory is not None:
                self.memory.keep(row.conversation)
        self.waiting.extendleft(reversed(back))
        self._keep(going)
        for row in rows:
            while row.events and not row.failed:
                self._happened.append((row, row.events.popleft()))

    def _keep(self, going: list[int]) -> None:
        """Go on decoding the given ones of the rows."""
        if len(going) < len(self.live):
            self._kv, self.live = self._kv.select_rows(going), [self.live[i] for i in going]

    def _guard(self, row: Row, work: Callable[..., None], *arguments: Any) -> None:
        try:
            if not row.failed:
                work(*arguments)
        except Exception as error:
            self._fail([row], error)

    def _fail(self, rows: Sequence[Row], error: Exception) -> None:
        for row in rows:
            row.failed = row.finished = True
            self._happened.append((row, error))


def run(vlm: Any, rows: Sequence[Row], record: Any = None) -> Iterator[tuple[int, Event]]:
    """Answer all rows side by side.

    Args:
        vlm: a `VLM`.
        rows: the questions.
        record: as for `Scheduler`, with the index of the row.

    Yields:
        (index of the row, event), as they happen.
    """
    number = {id(row): i for i, row in enumerate(rows)}
    numbered = None if record is None else lambda row, index, logits: record(number[id(row)], index, logits)
    scheduler = Scheduler(vlm, record=numbered)
    for row in rows:
        scheduler.add(row)
    while scheduler.rows:
        for row, event in scheduler.step():
            if isinstance(event, Exception):
                raise event
            yield number[id(row)], event


def tokens_of(row: Row) -> int:
    """Tokens that a row holds, or may come to hold."""
    return min(max(len(row.conversation.ids), row.size) + row.options.max_new_tokens, row.context)


@contextmanager
def _timed_shared(vlm: Any, rows: Sequence[Row], stage: Callable[[Row], str]) -> Iterator[None]:
    """Measure the wall time of work that several rows share, and divide it among them, each under its own stage."""
    stages = [stage(row) for row in rows]
    begin = time.perf_counter()
    yield
    device = torch.device(vlm.vocabulary.device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    share = (time.perf_counter() - begin) / len(rows)
    for row, name in zip(rows, stages, strict=True):
        row.seconds[name] += share
