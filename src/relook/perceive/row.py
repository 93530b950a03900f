"""The state machine of one request; `loop` runs many of them. A `Row` is always in one of four states:

    needs a token     everything written so far went through the language model; its logits decide the next token
    has one token     sampled or forced: it runs together with the other rows' tokens in the next step
    waiting           has more than one pending token (an opening, an injected turn): leaves the decoding rows and comes
                      back once they have run
    finished          its closing token went through the language model

Forced tokens are not decoded one by one but appended, so a call whose tokens are all known costs no step. Earlier turns
of a request are forced turns, too: they go through the same code as when they were written.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from PIL import Image
from torch import Tensor

from relook.errors import UserError
from relook.interventions import Intervention
from relook.looks import (
    IM_END,
    LOOKS,
    VISION_START,
    Call,
    look_turn,
    parse_tokens,
    with_trigger,
    without_triggers,
    write_call,
)
from relook.processing.vocabulary import BREAK, encode, expand
from relook.regions import Box, Cells, Frame
from relook.trace import Answer, Event, Finished, Look, LookTaken, TextDelta, Token, Turn, Usage

from .conversation import Conversation, ShownImage
from .engine import GivenLook, Past, Request
from .sampling import generator, with_probability
from .text import TextStreamer

TURN = 16  # tokens that a turn needs besides its text and pads, about
CALL = 12  # tokens of a call, with what ends its turn and a short answer


class Row:
    """One request: its conversation, looks, events and timing.

    Args:
        vlm: the `VLM` that is asked; read only.
        conversation: what it goes on from; left as it is.
        request: checked.

    Attributes:
        target: number of the image that looks go to.
        size, context: tokens of the conversation with those of given turns that are still to come; tokens it may have.
        patches, cached, forgotten: encoded for this row; tokens that needed not run; that ran and are left out.
        number: by which an engine knows it.
    """

    def __init__(self, vlm: Any, conversation: Conversation, request: Request):
        self.vlm, self.request, self.options = vlm, request, request.options
        self.question, self.context = request.question, vlm.context
        self.conversation = conversation.copy()
        self.generator = generator(self.options)
        self.target = conversation.target
        self.looks: list[Look] = []
        self.events: deque[Event] = deque()  # not yet yielded by the loop
        self.finished = self.failed = False
        self.started = self.admitted = False  # by the scheduler
        self.decoded = 0  # tokens since it was admitted
        self.patches = self.cached = self.forgotten = self.size = self.number = 0
        self.seconds = dict.fromkeys(("vision", "prefill", "decode", "look"), 0.0)
        self._tokens_before = len(conversation.ids)
        self._looks_left = self._allowed = 0 if self.options.look == "none" else self.options.max_looks or 0
        self._questions: deque[Past] = deque()  # to come, the request's own at last
        self._given_turns: deque[tuple[GivenLook, ...] | str] = deque()  # the question's, known already
        self._given: tuple[GivenLook, ...] | str | None = None  # of them, the one that is being written
        self._frame = Frame.of(vlm.processor, (1, 1))  # of the next region call; no image yet
        self._calls: deque[Cells] = deque()  # regions that the options ask for, to come
        self._calling = 0  # number of the turn of looks
        self._forced: deque[int] = deque()
        self._open: str | None = None  # re-encoding look whose start was written and whose condition is awaited
        self._written = 0
        self._begin_turn()

    # -- interface of the loop ---------------------------------------------------------------------------------------

    @property
    def needs_token(self) -> bool:
        return not self.finished and not self.conversation.pending.ids

    @property
    def waiting(self) -> bool:
        return len(self.conversation.pending) > 1 or bool(self.conversation.pending.shown)

    @property
    def stage(self) -> str:
        """Which of `seconds` the next forward belongs to."""
        return "prefill" if not self.started else "look" if self.waiting and not self._closing else "decode"

    def banned(self) -> Tensor:
        """(V,) bool: the tokens that may not be sampled now."""
        may_look = self._looks_left > 0
        if may_look and not self._fits(CALL):  # a call that was begun is completed
            may_look = self.vlm.vocabulary.allowed(self._turn) is not None
        return self.vlm.vocabulary.banned(self._turn, may_look, self.options.constrain)

    def after_forward(self, state: Tensor) -> None:
        """The pending tokens went through the language model; `state` (d,) is the hidden state of the last one."""
        self.started = True
        if self._closing:
            self.finished = True
            self.events.append(Finished(self._answer()))
            return
        if self._open is not None:
            self._condition_look(state)
        self._write_forced()

    def accept(self, token: int, logits: Tensor) -> None:
        """Append the sampled token; `logits` (V,) are the model's own in its place."""
        vocabulary = self.vlm.vocabulary
        top, text = self.request.logprobs, self.vlm.processor.decode
        chosen = None if top is None else with_probability(token, logits, top, text)
        self._write(vocabulary.im_end if token in vocabulary.ends else token, sampled=True, chosen=chosen)
        self._write_forced()

    # -- writing assistant turns -------------------------------------------------------------------------------------

    def _begin_turn(self) -> None:
        self._turn_at = len(self.conversation.ids)
        self._turn: list[str] = []
        self._turn_ids: list[int] = []
        self._turn_sampled = False
        self._chosen = self._prompted = 0
        self._closing = False
        self.finish = "stop"
        self._given = None
        self._conditions: dict[str, Tensor | None] = {}
        hidden, stop = self.vlm.vocabulary.hidden_ids, () if self._questions else self.request.stop
        self._streamer = TextStreamer(self.vlm.processor.tokenizer, hidden, stop)

    def _write_forced(self) -> None:
        while self._forced and self._open is None and not self._closing:
            self._write(self._forced.popleft(), sampled=False)

    def _write(self, token: int, sampled: bool, state: Tensor | None = None, chosen: Token | None = None) -> None:
        """Append a token to the assistant's turn; `state` (d,) replaces its input embedding."""
        conversation, text = self.conversation, self.vlm.vocabulary.text_of(token)
        if state is not None:
            conversation.pending.states.append((len(conversation.pending), state))
        conversation.add([token], sampled)
        self._turn.append(text)
        self._turn_ids.append(token)
        self._turn_sampled |= sampled
        self._chosen += sampled
        self._written += self._given is None
        if text == IM_END:
            self._end_turn()
            return
        self._say(self._streamer.add(token, chosen))
        if self._streamer.stopped and not self._forced:
            self._looks_left = 0
            self._forced.append(self.vlm.vocabulary.im_end)
            return
        starts = [n for n in self.vlm.model.config.reencodings if LOOKS[n].start == text]
        if starts and self._looks_left > 0:
            self._open = starts[0]
        elif self._given is None and not self._forced and self._ends_here():
            self.finish = "length"
            self._forced.append(self.vlm.vocabulary.im_end)

    def _ends_here(self) -> bool:
        """Whether the turn has to be cut here: not inside a call, unless calls may be malformed."""
        full = self._chosen >= self._room
        if not full and (self._looks_left <= 0 or self._fits(CALL)):
            return False
        if not self.options.constrain or self._looks_left <= 0:
            return full
        allowed = self.vlm.vocabulary.allowed(self._turn)
        return full if allowed is None else IM_END in allowed

    @property
    def _room(self) -> int:
        """How many tokens the model may choose in this turn."""
        context = self.context - len(self.conversation.ids) + self._chosen - 1  # <|im_end|>
        return min(self.options.max_new_tokens, context)

    def _fits(self, tokens: int) -> bool:
        return len(self.conversation.ids) + tokens < self.context

    def _say(self, delta: TextDelta | None) -> None:
        if delta is not None and self._given is None:
            self.events.append(delta)

    def _condition_look(self, state: Tensor) -> None:
        """Use the hidden state (d,) at `*_action_start`: it conditions the look and is the input of `*_action`.

        Without `request.condition` only the first of the two is omitted, so that only the second look's features change
        (and the embedding of `*_action`, which conditioned training never updates, is not used).
        """
        spec, vocabulary = LOOKS[self._open or ""], self.vlm.vocabulary
        conditioned = self.vlm.model.config.num_inner_forward_run == 2  # 1: alignment stage, no condition
        self._open = None
        self._conditions[spec.name] = state if conditioned and self.options.condition else None
        self._write(vocabulary[spec.action or ""], sampled=False, state=state if conditioned else None)
        if self.options.constrain and not self._forced:  # nothing else can follow, and written here it costs no step
            self._forced.extend([vocabulary[spec.end], vocabulary.im_end])

    # -- turns -------------------------------------------------------------------------------------------------------

    def ask(self) -> Row:
        """Begin with the request's turns, and the forced tokens of a requested look."""
        request = self.request
        own = Past(request.question, request.images, looks=request.looks, look_at=self.options.look_at)
        self._questions.extend([*request.past, own])
        self._next_question()
        self._write_forced()
        self.size = len(self.conversation.ids) + (self._to_come() if self._open else 0)
        self._check_size(self.size)
        return self

    def _check_size(self, tokens: int) -> None:
        if tokens + 2 > self.context:  # a token of the answer, and its end
            raise UserError(
                f"question, images and what was said before are {tokens} tokens, and the model takes "
                f"{self.context}; ask something shorter, or show smaller images"
            )

    def _to_come(self) -> int:
        """About how many tokens of the request are not written yet, because a re-encoding's condition is awaited."""
        processor, conversation, kept = self.vlm.processor, self.conversation, (self.target, self._frame)
        images, conversation.images = conversation.images, [*conversation.images]
        texts = [turn for turn in self._given_turns if isinstance(turn, str)]
        turns = [turn for turn in (self._given, *self._given_turns) if isinstance(turn, tuple)]
        seen = [image for turn in turns for image in self._look(self._calls_of(turn), turn)]
        for past in self._questions:
            texts += [past.question, past.answer]
            turns += past.looks
            seen += self._new_images(past)
            seen += [image for turn in past.looks for image in self._look(self._calls_of(turn), turn)]
        conversation.images, (self.target, self._frame) = images, kept
        written = sum(len(encode(processor.as_text(text), processor.tokenizer)) for text in texts)
        pads = sum(processor.pad_count(image.kind, image.view.grid) for image in seen)
        return len(self._forced) + written + pads + TURN * (len(texts) + len(turns))

    def _next_question(self) -> None:
        """The next user's turn. What the request says of the assistant's turns after it is forced."""
        past = self._questions.popleft()
        own, options = not self._questions, self.options
        self._given_turns.extend([*past.looks, *([] if own else [past.answer])])
        self._looks_left = max(self._allowed if own else 0, len(past.looks))
        shown = self._new_images(past)
        if not self.conversation.images:
            self._looks_left = 0
        kind = options.first_look if own else past.asked
        if not self.conversation.images or (own and self._looks_left <= 0):
            kind = "none"
        looks = [] if self.vlm.processor.free_choice or kind == "none" else self.vlm.looks
        question = self.vlm.processor.as_text(with_trigger(past.question, kind, looks))
        self._user_turn(self.vlm.processor.first_turn(question, len(shown)), shown)
        self._begin_turn()
        if own and self._looks_left > 0:
            self._force_look(len(past.looks))
        self._force_given()

    def _force_given(self) -> None:
        """The tokens of the turn, where the request gives it or its options ask for a region."""
        if not self._given_turns:
            if self._calls:
                self._force_call(self._calls.popleft())
            return
        self._given = self._given_turns.popleft()
        vocabulary, processor, given = self.vlm.vocabulary, self.vlm.processor, self._given
        if isinstance(given, str):
            self._forced.extend(encode(processor.as_text(given) + IM_END, processor.tokenizer))
            return
        for look in given:
            if look.kind not in self.vlm.looks:
                raise UserError(f"an earlier turn has a {look.kind} look, which this model lacks; leave it out")
        text = "".join(write_call(call.look, call.cells, vocabulary.grid) for call in self._calls_of(given)) + IM_END
        actions = {vocabulary.get(spec.action) for spec in LOOKS.values() if spec.action}  # written with their state
        ids = processor.tokenizer.encode(text, add_special_tokens=False)
        self._forced.extend(token for token in ids if token not in actions)

    def _new_images(self, past: Past) -> list[ShownImage]:
        """The views of the images that come with a question; its looks go to the first of them unless it says where."""
        before, shown = len(self.conversation.images), self._first_views(past.images)
        if self.conversation.images:
            self._aim(before if past.images else self.target, past.look_at)
        return shown

    def _aim(self, default: int, target: int | None) -> None:
        """Settle which image looks go to."""
        total = len(self.conversation.images)
        target = default if target is None else target
        if not -total <= target < total:
            raise UserError(f"look_at={target} names no image; the conversation has {total}, counted from 0")
        self.target = target % total
        self._frame = Frame.of(self.vlm.processor, self.conversation.images[self.target].size)

    def _calls_of(self, turn: Sequence[GivenLook]) -> list[Call]:
        """The calls of a turn that is given."""
        cells = [self._frame.cells(look.box) if look.box is not None else look.cells for look in turn]
        return [Call(look.kind, its, None, (0, 0)) for look, its in zip(turn, cells, strict=True)]

    def _force_look(self, made: int = 0) -> None:
        """Settle the look that the options ask for; `made`: turns of looks that the answer has by then."""
        whole = Frame.of(self.vlm.processor, self.conversation.images[self.target].size)
        calls = self.options.calls(whole, self._looks_left)
        self._calls.extend(calls[made:])
        if self.options.look in LOOKS and not calls and not made:
            self._force(LOOKS[self.options.look].start)

    def _force_call(self, cells: Cells) -> None:
        """The next region that the options ask for; one that no longer fits is left out, and is in the record."""
        if self.looks and not self._fits(CALL + 1):
            self._looks_left = 0
            self._calls.clear()
            look = self._region(Call("region", cells, None, (0, 0)))
            self._calling += 1
            self._record_look(replace(look, problem=f"no room for its call in the model's {self.context} tokens"))
        else:
            self._force(write_call("region", cells, self._frame.grid) + IM_END)

    def _force(self, text: str) -> None:
        """Begin the turn with the tokens of a call."""
        self._check_size(len(self.conversation.ids) + CALL)
        self._forced.extend(self.vlm.processor.tokenizer.encode(text, add_special_tokens=False))

    def _first_views(self, images: Sequence[Image.Image], stages: Sequence[str] = ()) -> list[ShownImage]:
        stages = stages or ["first"] * len(images)
        self.conversation.images += images
        with self._timed("vision"):
            lookup = self.conversation.features.lookup
            views = [lookup("image", image, stage)[0] for image, stage in zip(images, stages, strict=False)]
        return [ShownImage("image", view) for view in views]

    def _user_turn(self, content: str, images: Sequence[ShownImage]) -> None:
        """A user turn with its images in the order of its placeholders, and the assistant's header."""
        conversation, processor = self.conversation, self.vlm.processor
        counts: dict[str, list[int]] = {}
        for shown in images:
            counts.setdefault(shown.kind, []).append(processor.pad_count(shown.kind, shown.view.grid))
        given = self.request.system
        system = processor.system if given is None else processor.as_text(given)
        if not conversation.turns and system:
            conversation.turns.append(Turn("system", system.replace(BREAK, "")))
        ids = processor.user_ids(expand(content, counts), not conversation.ids, None if given is None else system)
        places = [i + 1 for i, token in enumerate(ids) if token == self.vlm.vocabulary[VISION_START]]
        conversation.add(ids, shown=list(zip(places, images, strict=True)))
        conversation.turns.append(Turn("user", content.replace(BREAK, "")))

    def _end_turn(self) -> None:
        """After the assistant's turn: look, ask again, take the next question, or finish."""
        self._say(self._streamer.finish())
        written = self.vlm.processor.tokenizer.decode(
            self._turn_ids[:-1], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        self.conversation.turns.append(Turn("assistant", written, sampled=self._turn_sampled))
        calls = list(parse_tokens(self._turn[:-1], self.vlm.vocabulary.grid)) if self._looks_left > 0 else []
        self._calling = self.looks[-1].turn + 1 if self.looks else 0
        has = ", ".join(self.vlm.looks) or "none"
        for i, call in enumerate(calls):
            if call.problem is None and call.look not in self.vlm.looks:
                calls[i] = replace(call, problem=f"the model has no {call.look} look (it has: {has})")
        good = [call for call in calls if call.problem is None]
        for call in calls:
            if call.problem:
                frame = None if call.cells is None else self._frame.box
                self._record_look(Look(call.look, cells=call.cells, problem=call.problem, frame=frame))
        if self._held(good):
            self.finish, self._closing = "look", True
        elif not calls and self._questions:
            self._next_question()
        elif not calls:
            self._closing = True
        elif not good:  # nothing to show: the question again, to be answered without a look
            self._looks_left = 0
            self._user_turn(self.vlm.processor.as_text(_plain(self.question)), [])
            self._begin_turn()
            self._check_size(len(self.conversation.ids))
        else:
            self._looks_left -= 1
            self._show(good)

    def _held(self, calls: Sequence[Call]) -> bool:
        """Whether whoever asked takes these looks; they are recorded, then."""
        free = self.request.hold_regions and self._given is None
        if not calls or not free or any(LOOKS[call.look].reencodes for call in calls):
            return False
        for call in calls:
            self._record_look(self._region(call))
            self.events.append(LookTaken(self.looks[-1]))
        return True

    def _show(self, calls: Sequence[Call]) -> None:
        """The user's turn that answers the calls, where it fits."""
        seen = len(self.looks)
        with self._timed("look"):
            images = self._look(calls, self._given if isinstance(self._given, tuple) else ())
        change = self._change if any(not LOOKS[call.look].reencodes for call in calls) else None
        needed = sum(self.vlm.processor.pad_count(image.kind, image.view.grid) for image in images)
        if not self._fits(needed + TURN):
            if self._given is not None:
                self._check_size(len(self.conversation.ids) + needed + TURN)
            self.finish, self._closing = "length", True
            for look in self.looks[seen:]:
                look.problem = f"no room for {needed} tokens in the model's {self.context}"
                self.events.append(LookTaken(look))
            return
        if change is not None and not change.row.text:
            self._forget_call()
        if change is not None and not change.row.image:
            calls = [call for call in calls if LOOKS[call.look].reencodes]
        self._user_turn(look_turn(calls), images)
        self._begin_turn()
        self._force_given()

    @property
    def _change(self) -> Intervention | None:
        """What is shown in place of crops; history stays as it was."""
        return self.options.change if self._given is None else None

    def _forget_call(self) -> None:
        """Leave the assistant's turn empty."""
        self.forgotten += self.conversation.cut(self._turn_at)
        self.conversation.turns[-1] = Turn("assistant", "")
        self.conversation.add([self.vlm.vocabulary.im_end])

    def _look(self, calls: Sequence[Call], given: Sequence[GivenLook]) -> list[ShownImage]:
        """The images that answer the calls, in the order of `look_turn`: grouped by look, in order of first call."""
        kinds = list(dict.fromkeys(call.look for call in calls))
        ordered = sorted(zip_longest(calls, given), key=lambda pair: kinds.index(pair[0].look))
        images = [self._reencode(call) if LOOKS[call.look].reencodes else self._crop(call, by) for call, by in ordered]
        self._frame = self._frame.after([self._seen(call.cells) for call in calls if call.cells is not None])
        return [image for image in images if image is not None]

    def _seen(self, cells: Cells) -> Box:
        """What the region `cells` shows, pixels of the original."""
        box, change = self._frame.shown(cells), self._change
        return box if change is None else change.region(box, self._frame.box, self._frame.grid)

    def _region(self, call: Call) -> Look:
        """A region look, not taken yet."""
        cells = call.cells or (0, 0, self._frame.grid - 1, self._frame.grid - 1)
        return Look("region", cells=call.cells, box=self._seen(cells), frame=self._frame.box)

    def _crop(self, call: Call, given: GivenLook | None) -> ShownImage | None:
        """A region of the original, the crop that was given, or what is shown instead; None: nothing is."""
        conversation, look = self.conversation, self._region(call)
        whole, lookup = conversation.images[self.target], conversation.features.lookup
        if given is not None and given.image is not None:
            return ShownImage("image", lookup("region", given.image, "crop")[0])
        change = self._change
        if change is not None and not change.row.image:
            self._record_look(look)
            self.events.append(LookTaken(look))
            return None
        if change is None or look.box is None:
            view, look.image = lookup("region", whole, "crop", look.box)
        else:
            view, look.image = lookup("region", change.crop(whole, look.box, self.vlm.processor), "crop")
        return ShownImage("image", view, self._record_look(look))

    def _reencode(self, call: Call) -> ShownImage:
        """The whole image, re-encoded by the look's encoder."""
        whole = self.conversation.images[self.target]
        view, seen = self.conversation.features.lookup(call.look, whole, "reencode")
        look = self._record_look(Look(call.look, box=(0, 0, *whole.size), image=seen))
        return ShownImage(call.look, view, look, self._conditions.get(call.look))

    def _record_look(self, look: Look) -> Look | None:
        """Record a look of this request. Its event follows when its image has been encoded, with the attention map."""
        if self._given is not None:
            return None
        look.turn = self._calling
        self.looks.append(look)
        if look.problem:
            self.events.append(LookTaken(look))
        return look

    # -- the record --------------------------------------------------------------------------------------------------

    def _answer(self) -> Answer:
        conversation = self.conversation
        run = len(conversation.ids) - self._tokens_before - self.cached + self.forgotten
        return Answer(
            text=self._streamer.text,
            looks=self.looks,
            usage=Usage(run, len(conversation.ids), self.patches, self._written, dict(self.seconds), self.cached),
            transcript=list(conversation.turns),
            question=self.question,
            image=conversation.images[self.target].copy() if conversation.images else None,
            model=self.vlm.name,
            warnings=[*self.vlm.warnings, *self.vlm.look_warnings(look.kind for look in self.looks)],
            grid=self.vlm.vocabulary.grid,
            finish=self.finish,
            tokens=self._streamer.tokens,
        )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - begin


def _plain(question: str) -> str:
    """The question without the sentences that ask for a look."""
    return without_triggers(question).strip() or question
