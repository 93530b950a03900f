"""The state machine of one question; `loop` runs a group of them. A `Row` is always in one of four states:

    needs a token     everything written so far went through the language model; its logits decide the next token
    has one token     sampled or forced: it runs together with the other rows' tokens in the next step
    waiting           has more than one pending token (an opening, an injected turn): leaves the group until no row is
                      decoding, then runs with the other waiting rows in one forward
    finished          its closing token went through the language model

Forced tokens are not decoded one by one but appended, so a call whose tokens are all known costs no step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from PIL import Image
from torch import Tensor

from relook.errors import UserError
from relook.looks import (
    ANSWER_PREFIX,
    IM_END,
    IM_START,
    IMAGE_PAD,
    LOOKS,
    VISION_START,
    Call,
    look_turn,
    parse_tokens,
    without_triggers,
    write_call,
)
from relook.options import AskOptions
from relook.processing.turns import pad_stages
from relook.processing.vocabulary import BREAK, expand
from relook.regions import cells_to_box, widen
from relook.trace import Answer, Event, Finished, Look, LookTaken, TextDelta, Turn, Usage

from .conversation import Conversation, ShownImage
from .sampling import generator
from .text import TextStreamer


class Row:
    """One question: its conversation, looks, events and timing.

    Args:
        vlm: the `VLM` that is asked; read only.
        conversation: what it goes on from; left as it is.
        options: checked.

    Attributes:
        target: number of the image that looks go to.
    """

    def __init__(self, vlm: Any, conversation: Conversation, options: AskOptions):
        self.vlm, self.options = vlm, options
        self.question = ""
        self.conversation = conversation.copy()
        self.generator = generator(options)
        self.target = 0
        self.looks: list[Look] = []
        self.events: deque[Event] = deque()  # not yet yielded by the loop
        self.finished = False
        self.started = False
        self.seconds = dict.fromkeys(("vision", "prefill", "decode", "look"), 0.0)
        self._tokens_before = len(conversation.ids)
        self._patches_before = sum(s.patches for s in conversation.features.entries.values())
        self._looks_left = 0 if options.look == "none" else options.max_looks
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
        if not self.started:
            return "prefill"
        return "look" if self.waiting and not self._closing else "decode"

    def banned(self) -> Tensor:
        """(V,) bool: the tokens that may not be sampled now."""
        may_look = self._looks_left > 0
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

    def accept(self, token: int) -> None:
        """Append the sampled token."""
        vocabulary = self.vlm.vocabulary
        self._write(vocabulary.im_end if token in vocabulary.ends else token, sampled=True)
        self._write_forced()

    # -- writing assistant turns -------------------------------------------------------------------------------------

    def _begin_turn(self) -> None:
        self._turn: list[str] = []
        self._turn_ids: list[int] = []
        self._turn_sampled = False
        self._chosen = self._given = 0
        self._closing = False
        self._conditions: dict[str, Tensor | None] = {}
        self._streamer = TextStreamer(self.vlm.processor.tokenizer, self.vlm.vocabulary.hidden_ids)

    def _write_forced(self) -> None:
        while self._forced and self._open is None and not self._closing:
            self._write(self._forced.popleft(), sampled=False)

    def _write(self, token: int, sampled: bool, state: Tensor | None = None) -> None:
        """Append a token to the assistant's turn; `state` (d,) replaces its input embedding."""
        conversation, text = self.conversation, self.vlm.vocabulary.text_of(token)
        if state is not None:
            conversation.pending.states.append((len(conversation.pending), state))
        conversation.add([token], sampled)
        self._turn.append(text)
        self._turn_ids.append(token)
        self._turn_sampled |= sampled
        self._chosen += sampled
        self._written += 1
        if text == IM_END:
            self._end_turn()
            return
        if piece := self._streamer.add(token):
            self.events.append(TextDelta(piece))
        starts = [n for n in self.vlm.model.config.reencodings if LOOKS[n].start == text]
        if starts and self._looks_left > 0:
            self._open = starts[0]
        elif self._chosen >= self.options.max_new_tokens and not self._forced and self._may_end():
            self._forced.append(self.vlm.vocabulary.im_end)

    def _may_end(self) -> bool:
        """Whether the turn may be cut here: not inside a call, unless calls may be malformed."""
        if not self.options.constrain or self._looks_left <= 0:
            return True
        allowed = self.vlm.vocabulary.allowed(self._turn)
        return allowed is None or IM_END in allowed

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
        if self.options.constrain:  # nothing else can follow; written here, the rest of the call costs no step
            self._forced.extend([vocabulary[spec.end], vocabulary.im_end])

    # -- turns -------------------------------------------------------------------------------------------------------

    def ask(self, question: str, images: Sequence[Image.Image]) -> Row:
        """Begin with the user's turn: images and question, and the forced tokens of a requested look."""
        self.question, processor, before = question, self.vlm.processor, len(self.conversation.images)
        shown = self._first_views(images)
        self._aim(before if images else self.conversation.target)
        self._user_turn(processor.first_turn(processor.as_text(self._sentence()), len(shown)), shown)
        self._force_look()
        return self

    def go_on(self, prompt: list[int], images: Sequence[Image.Image]) -> Row:
        """Begin with a prompt in token ids, as `generate` takes it, and its images in the order of their pads.

        What follows the last header of the assistant is the beginning of its turn.
        """
        vocabulary, processor, conversation = self.vlm.vocabulary, self.vlm.processor, self.conversation
        runs, header = image_runs(self.vlm, prompt), processor.tokenizer.encode(f"{IM_START}assistant\n")
        last = len(prompt) - 1 - prompt[::-1].index(header[0]) if header[0] in prompt else 0
        cut = last + len(header) if prompt[last : last + len(header)] == header else len(prompt)
        texts = [(token, vocabulary.text_of(token)) for token, _ in groupby(prompt)]
        # plain text may spell a control token, which it is not
        plain = [text if token in vocabulary.hidden_ids else text.replace("<", "") for token, text in texts]
        stages = pad_stages(["".join(plain)])
        shown = self._first_views(images, stages)
        counts = [processor.pad_count("image", image.view.grid) for image in shown]
        if counts != [length for _, length in runs]:
            found = ", ".join(str(length) for _, length in runs) or "no"
            raise UserError(
                f"the prompt has {found} pads for its images, which make {', '.join(map(str, counts)) or 'none'}; "
                "give the images that the processor was given, in that order"
            )
        turn_of = [prompt[:at].count(vocabulary[IM_START]) for at, _ in runs]
        latest = max((turn for turn, stage in zip(turn_of, stages, strict=True) if stage == "first"), default=None)
        if latest is None:
            self._looks_left = 0
        else:
            self._aim(turn_of.index(latest))
        conversation.pending.shown += [(at, image) for (at, _), image in zip(runs, shown, strict=True)]
        conversation.add(prompt[:cut])
        conversation.turns.append(Turn("user", processor.decode(prompt[:cut])))
        after_start = {token for spec in LOOKS.values() if spec.action for token in (spec.action, spec.end)}
        self._forced.extend(token for token in prompt[cut:] if vocabulary.text_of(token) not in after_start)
        self._given = len(prompt) - cut
        if self._given or not self._looks_left:
            self._write_forced()
        else:
            self._force_look()
        return self

    def _aim(self, default: int) -> None:
        """Settle which image looks go to."""
        total, target = len(self.conversation.images), self.options.look_at
        target = default if target is None else target
        if not -total <= target < total:
            raise UserError(f"look_at={target} names no image; the conversation has {total}, counted from 0")
        self.target = target % total

    def _force_look(self) -> None:
        """The tokens of a look that the options ask for."""
        text = LOOKS[self.options.look].start if self.options.look in LOOKS else ""
        if self.options.region is not None:
            text = write_call("region", self.options.region, self.vlm.vocabulary.grid) + IM_END
        self._forced.extend(self.vlm.processor.tokenizer.encode(text, add_special_tokens=False))
        self._write_forced()

    @property
    def answer_ids(self) -> list[int]:
        """The ids of the last turn, with its end; without a prompt's part of it and the prefix of published answers."""
        ids, decode = self._turn_ids[self._given :], self.vlm.processor.decode
        if not decode(ids).startswith(ANSWER_PREFIX):
            return ids
        return ids[next(n for n in range(len(ids)) if len(decode(ids[:n])) >= len(ANSWER_PREFIX)) :]

    def _first_views(self, images: Sequence[Image.Image], stages: Sequence[str] = ()) -> list[ShownImage]:
        first, conversation = len(self.conversation.images), self.conversation
        stages = stages or ["first"] * len(images)
        conversation.images += images
        with self._timed("vision"):
            lookup = conversation.features.lookup
            views = [lookup("image", first + i, x, s)[0] for i, (x, s) in enumerate(zip(images, stages, strict=False))]
        return [ShownImage("image", view) for view in views]

    def _sentence(self) -> str:
        """The question, with the published sentence that asks for a look where the model was trained with it.

        look="auto": prompted models were trained with the sentence of the look to take, so the region's is given to a
        model that has regions, else the re-encoding one; free-choice models decide without. A question that holds one
        of the sentences (published ones do) keeps it then, and loses it where another or none belongs.
        """
        question, look = self._plain, self.options.first_look
        if self.vlm.processor.free_choice or self._looks_left <= 0:
            return question
        if look == "auto":
            if self.vlm.looks and question != self.question:
                return self.question
            look = next(iter(self.vlm.looks), "none")
        return f"{question} {LOOKS[look].trigger}" if look in LOOKS else question

    @property
    def _plain(self) -> str:
        """The question without any such sentence."""
        return without_triggers(self.question).strip() or self.question

    def _user_turn(self, content: str, images: Sequence[ShownImage]) -> None:
        """A user turn with its images in the order of its placeholders, and the assistant's header."""
        conversation, processor = self.conversation, self.vlm.processor
        counts: dict[str, list[int]] = {}
        for shown in images:
            counts.setdefault(shown.kind, []).append(processor.pad_count(shown.kind, shown.view.grid))
        if not conversation.turns and processor.system:
            conversation.turns.append(Turn("system", processor.system))
        ids = processor.user_ids(expand(content, counts), opening=not conversation.ids)
        base, start = len(conversation.pending), self.vlm.vocabulary[VISION_START]
        places = [base + i + 1 for i, token in enumerate(ids) if token == start]
        conversation.pending.shown += zip(places, images, strict=True)
        conversation.add(ids)
        conversation.turns.append(Turn("user", content.replace(BREAK, "")))

    def _end_turn(self) -> None:
        """After the assistant's turn: look, ask again, or finish."""
        if piece := self._streamer.finish():
            self.events.append(TextDelta(piece))
        written = self.vlm.processor.tokenizer.decode(
            self._turn_ids[:-1], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        self.conversation.turns.append(Turn("assistant", written, sampled=self._turn_sampled))
        calls = parse_tokens(self._turn[:-1], self.vlm.vocabulary.grid) if self._looks_left > 0 else []
        calls = [self._check_call(call) for call in calls]
        if not calls:
            self._closing = True
            return
        for call in calls:
            if call.problem:
                self._record_look(Look(call.look, cells=call.cells, problem=call.problem))
        good = [call for call in calls if call.problem is None]
        if good:
            self._looks_left -= 1
            with self._timed("look"):
                images = self._look(good)
            self._user_turn(look_turn(good), images)
        else:  # nothing to show: the question again, to be answered without a look
            self._looks_left = 0
            self._user_turn(self.vlm.processor.as_text(self._plain), [])
        self._begin_turn()

    def _check_call(self, call: Call) -> Call:
        """The call, with a problem where the model lacks its look."""
        if call.problem is None and call.look not in self.vlm.looks:
            has = ", ".join(self.vlm.looks) or "none"
            return Call(call.look, call.cells, f"the model has no {call.look} look (it has: {has})", call.span)
        return call

    def _look(self, calls: Sequence[Call]) -> list[ShownImage]:
        """The images that answer the calls, in the order of `look_turn`: grouped by look, in order of first call."""
        kinds = list(dict.fromkeys(call.look for call in calls))
        ordered = sorted(calls, key=lambda call: kinds.index(call.look))
        return [self._reencode(call) if LOOKS[call.look].reencodes else self._crop(call) for call in ordered]

    def _crop(self, call: Call) -> ShownImage:
        """A region, widened by the processor's margin, from the original pixels."""
        processor, number = self.vlm.processor, self.target
        grid, whole = self.vlm.vocabulary.grid, self.conversation.images[number]
        cells = widen(call.cells or (0, 0, grid - 1, grid - 1), processor.region_margin, grid)
        box = cells_to_box(cells, whole.size, grid)
        view, seen = self.conversation.features.lookup("region", number, whole, "crop", box, self.options.blank)
        return ShownImage("image", view, self._record_look(Look("region", cells=call.cells, box=box, image=seen)))

    def _reencode(self, call: Call) -> ShownImage:
        """The whole image, re-encoded by the look's encoder."""
        number = self.target
        whole = self.conversation.images[number]
        view, seen = self.conversation.features.lookup(call.look, number, whole, "reencode")
        look = self._record_look(Look(call.look, box=(0, 0, *whole.size), image=seen))
        return ShownImage(call.look, view, look, self._conditions.get(call.look))

    def _record_look(self, look: Look) -> Look:
        """Record a look. Its event follows when its image has been encoded (the attention map is part of it)."""
        self.looks.append(look)
        if look.problem:
            self.events.append(LookTaken(look))
        return look

    # -- the record --------------------------------------------------------------------------------------------------

    def _answer(self) -> Answer:
        conversation = self.conversation
        patches = sum(s.patches for s in conversation.features.entries.values())
        return Answer(
            text=self._streamer.text,
            looks=self.looks,
            usage=Usage(
                lm_positions=len(conversation.ids) - self._tokens_before,
                sequence_length=len(conversation.ids),
                vision_patches=patches - self._patches_before,
                generated_tokens=self._written,
                seconds=dict(self.seconds),
            ),
            transcript=list(conversation.turns),
            question=self.question,
            image=conversation.images[self.target].copy() if conversation.images else None,
            model=self.vlm.name,
            warnings=self.vlm.warnings,
            grid=self.vlm.vocabulary.grid,
        )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - begin


def image_runs(vlm: Any, ids: Sequence[int]) -> list[tuple[int, int]]:
    """(first pad, number of pads) of every image in a prompt. Raises UserError for re-encoded ones."""
    pads = {vlm.vocabulary.get(spec.pad): spec.pad for spec in LOOKS.values() if spec.reencodes}
    if other := next((pads[token] for token in ids if token in pads), None):
        raise UserError(f"the prompt holds {other}, a look taken before; go on with it by `VLM.chat`")
    starts = [i + 1 for i, token in enumerate(ids) if token == vlm.vocabulary[VISION_START]]
    image = vlm.vocabulary[IMAGE_PAD]
    return [(at, next((n for n, t in enumerate(ids[at:]) if t != image), len(ids) - at)) for at in starts]
