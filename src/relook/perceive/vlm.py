"""The public interface: load a model, ask it about images, get a typed record.

All input is checked here, before the model runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict, Unpack

from PIL import Image

from relook.errors import UserError
from relook.looks import LOOKS
from relook.regions import check_cells
from relook.trace import Answer, Finished
from relook.views import open_image

from .conversation import Conversation
from .loop import Recorder, run
from .row import Event, LoopContext, Request, Row
from .sampling import Sampling, Vocabulary

AUTO, NONE = "auto", "none"
ROWS_AT_ONCE = 8  # how many questions `ask_many` works on side by side


class AskOptions(TypedDict, total=False):
    """How a question is to be answered; `VLM.ask` says what each one means."""

    look: str
    region: Sequence[int] | None
    max_looks: int
    max_new_tokens: int
    do_sample: bool
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    constrain: bool
    condition: bool
    blank: bool
    look_at: int | None


def load(name: str | Path, *, dtype: Any = None, device: Any = None, attn_implementation: str | None = None) -> VLM:
    """Load a model with its processor.

    Args:
        name: a model that ships ("cards-tiny", "receipts-tiny"), a folder (a model or an adapter), or a hub id.
        dtype, device, attn_implementation: as `relook.model.loading.load_model` takes them.

    Raises:
        UserError: no such model, a folder that is not one, or a device that cannot run it. CheckpointError: weights
            that do not fit.
    """
    from relook.model.loading import torch_device
    from relook.model.start import open_model

    if torch_device(device).type == "meta":
        raise UserError("device 'meta' holds shapes and no weights, so nothing can be asked there; use cpu or cuda")

    return VLM(*open_model(name, dtype=dtype, device=device, attn_implementation=attn_implementation), str(name))


class VLM:
    """A vision-language model that may look again.

    Stateless: several conversations, also from several threads, do not affect each other.

    Args:
        model: a `VPTQwen2VLForConditionalGeneration`, in eval mode.
        processor: its `VPTQwen2VLProcessor`.
        name: what answers call it.
    """

    def __init__(self, model: Any, processor: Any, name: str = ""):
        self.model, self.processor, self.name = model.eval(), processor, name
        vocabulary = Vocabulary(
            processor.tokenizer, model.lm_head.weight.shape[0], model.config.looks, processor.grid_size, model.device
        )
        self._context = LoopContext(model, processor, vocabulary, name)

    @property
    def looks(self) -> list[str]:
        """Names of the looks this model can take."""
        return self._context.looks

    @property
    def domain(self) -> str | None:
        """What a small model was trained on ("receipts", "cards"); None for a general one."""
        return self._context.domain

    def with_settings(self, **settings: Any) -> VLM:
        """The same model with other settings of the processor (`first_look`, `region_margin`, ...), all else shared.

        This VLM and its processor stay as they are.
        """
        other = copy.copy(self)
        other.processor = copy.copy(self.processor)
        for name, value in settings.items():
            setattr(other.processor, name, value)
        other._context = replace(self._context, processor=other.processor)
        return other

    # -- asking ------------------------------------------------------------------------------------------------------

    def ask(self, image: Any, question: str, **options: Unpack[AskOptions]) -> Answer:
        """Answer one question about one image, or about several (a list).

        Args:
            image: a path, a PIL image, a numpy array, the bytes of an image file, or a list of these.
            question: in words; asked as it is.
            look: "auto": the model decides. A model that was trained to be asked for a look (a prompted one) is given
                the published sentence that asks for a region (for a re-encoding, where it has no regions); a
                free-choice model gets the question alone. (A question that holds such a sentence keeps it for a
                prompted model, and loses it where another or none belongs.) "none": no sentence, and no look. A look's
                name ("region", "clip", "detection", "seg"): its sentence, and the call's first token is written for the
                model.
            region: (x0, y0, x1, y1) grid cells, both ends inclusive: the model is made to look there.
            max_looks: how many times the model may look again (one turn may ask for several regions). 0 is "none".
            max_new_tokens: limit on the tokens the model chooses in one turn; a call that was begun is completed.
            do_sample, temperature, top_p, top_k, seed: sampling; greedy without `do_sample`.
            constrain: while a call is being written, only tokens that keep it well formed can be chosen. Without it, a
                malformed call is recorded in `answer.looks` with its problem, and the question is asked again with no
                look allowed.
            condition: for measuring. False: the projector of a re-encoding look gets no condition (c = 0), so that the
                second look's features enter as they are, F in place of F + <F, c> c, and `attention` is None. The
                control token keeps its hidden state. Regions have no projector, hence no condition.
            blank: for measuring. True: the crops of regions are blank images of the same size (`Look.image` shows it).
            look_at: which image looks go to, counted from 0 over the conversation (negative: from its end). Default:
                the first image that came with the latest question that had one.

        Raises:
            UserError: an image that cannot be read, an empty question, a look the model lacks, a region off the grid,
                a condition or a crop to leave out of a look that has none.
        """
        return _last(self.stream(image, question, **options))

    def stream(self, image: Any, question: str, **options: Unpack[AskOptions]) -> Iterator[Event]:
        """As `ask`, event by event: TextDelta, LookTaken, and at the end Finished with the answer.

        The text pieces of the last turn add up to `answer.text`. (What a model writes before a call in the same turn is
        given out too; it is in the transcript, not in the answer.)
        """
        return self.chat(image).stream(question, **options)

    def ask_many(
        self,
        pairs: Iterable[Sequence[Any] | Mapping[str, Any]],
        *,
        batch_size: int = ROWS_AT_ONCE,
        **options: Unpack[AskOptions],
    ) -> list[Answer]:
        """Answer several questions side by side, in order. Each answer is the one `ask` gives.

        Args:
            pairs: (image, question), or (image, question, options), or dicts {"image": .., "question": .., options..}.
            batch_size: how many at once.
            options: for all of them, as in `ask`; a pair's own options win.
        """
        _whole("batch_size", batch_size, 1)
        answers: list[Answer] = []
        rest = enumerate(pairs)
        while batch := list(
            islice(rest, batch_size)
        ):  # opened batch by batch: thousands of images need not fit in memory
            rows = [self._numbered_row(number, pair, options) for number, pair in batch]
            done = {i: event.answer for i, event in run(self._context, rows) if isinstance(event, Finished)}
            answers += [done[i] for i in range(len(rows))]
        return answers

    def chat(self, image: Any = None) -> Chat:
        """A conversation about an image (or a list of images), for questions that build on each other."""
        return Chat(self, _images(image))

    # -- inside ------------------------------------------------------------------------------------------------------

    def _begin(self) -> Conversation:
        return Conversation.begin(self.processor, self.model.device)

    def _row(self, conversation: Conversation, image: Any, question: str, options: Mapping[str, Any]) -> Row:
        images = _images(image)
        if not images and not conversation.images:
            raise UserError("no image was given; give a path, a PIL image, an array, bytes, or a list of these")
        return Row(self._context, conversation, self._request(conversation, images, question, **options))

    def _numbered_row(self, number: int, pair: Any, options: Mapping[str, Any]) -> Row:
        try:
            image, question, own = _unpack(pair)
            return self._row(self._begin(), image, question, {**options, **own})
        except UserError as error:
            raise UserError(f"question {number}: {error}") from error

    def _request(
        self,
        conversation: Conversation,
        images: list[Image.Image],
        question: str,
        *,
        look: str = AUTO,
        region: Sequence[int] | None = None,
        max_looks: int = 1,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        constrain: bool = True,
        condition: bool = True,
        blank: bool = False,
        look_at: int | None = None,
    ) -> Request:
        """The request, checked; raises UserError as `ask` says."""
        _whole("max_looks", max_looks, 0)
        _whole("max_new_tokens", max_new_tokens, 1)
        self._check_look(look)
        cells = None
        if region is not None:
            self._check_look("region")
            if look not in (AUTO, "region"):
                raise UserError(
                    f"region={tuple(region)} was given with look={look!r}; leave look out, or make it 'region'"
                )
            cells = check_cells(_four(region), self.processor.grid_size)
        if max_looks == 0 and (cells is not None or look in LOOKS):
            raise UserError(f"look={'region' if cells else look!r} was asked for with max_looks=0; allow at least 1")
        asked_for = "region" if cells else look
        if not _flag("condition", condition):
            conditioned = [name for name in self.looks if LOOKS[name].reencodes]
            _check_left_out("condition=False", asked_for, max_looks, conditioned)
        if _flag("blank", blank):
            cropped = [name for name in self.looks if not LOOKS[name].reencodes]
            _check_left_out("blank=True", asked_for, max_looks, cropped)
        total = len(conversation.images) + len(images)
        target = look_at
        if target is None:
            target = len(conversation.images) if images else conversation.target
        if not -total <= target < total:
            raise UserError(f"look_at={target} names no image; the conversation has {total}, counted from 0")
        return Request(
            question=self._check_question(question),
            images=images,
            look=look,
            region=cells,
            max_looks=max_looks,
            max_new_tokens=max_new_tokens,
            target=target % total,
            constrain=constrain,
            condition=condition,
            blank=blank,
            sampling=Sampling(do_sample, temperature, top_p, top_k, seed),
        )

    def _check_look(self, look: str) -> None:
        offered = [AUTO, NONE, *self.looks]
        if look in offered:
            return
        if look in LOOKS:
            raise UserError(f"this model has no {look!r} look; expected one of {', '.join(offered)}")
        raise UserError(f"look {look!r} is unknown; expected one of {', '.join(offered)}")

    def _check_question(self, question: str) -> str:
        if not isinstance(question, str):
            raise UserError(f"the question is a {type(question).__name__}; expected text")
        if not question.strip():
            raise UserError("the question is empty; ask something about the image")
        return question.strip()


class Chat:
    """A conversation that goes on: each question continues the same cache.

    A question that is abandoned (its stream not read to the end, an error) leaves the conversation as it was.
    """

    def __init__(self, vlm: VLM, images: list[Image.Image]):
        self._vlm, self._new_images = vlm, images
        self._conversation = vlm._begin()

    @property
    def transcript(self) -> list[Any]:
        """All turns so far."""
        return list(self._conversation.turns)

    def ask(self, question: str, image: Any = None, **options: Unpack[AskOptions]) -> Answer:
        """The next question; `image` adds images to the conversation. Options as in `VLM.ask`.

        `usage` counts what this question cost, except `sequence_length`, which is the whole conversation's: over all
        questions, `lm_positions` add up to it.
        """
        return _last(self.stream(question, image, **options))

    def stream(self, question: str, image: Any = None, **options: Unpack[AskOptions]) -> Iterator[Event]:
        """As `ask`, event by event."""
        row = self._vlm._row(self._conversation, self._new_images + _images(image), question, options)
        return self._run(row)

    def _run(self, row: Row, record: Recorder | None = None) -> Iterator[Event]:
        for _, event in run(self._vlm._context, [row], record):
            if isinstance(event, Finished):
                self._conversation, self._new_images = row.conversation, []
                self._conversation.target = row.request.target
            yield event


def _last(events: Iterator[Event]) -> Answer:
    for event in events:
        if isinstance(event, Finished):
            return event.answer
    raise AssertionError("the loop ended without an answer")  # a bug of ours: every row finishes


def _images(image: Any) -> list[Image.Image]:
    """Opened images of whatever was given; [] for None."""
    if image is None:
        return []
    several = image if isinstance(image, (list, tuple)) else [image]
    return [open_image(one) for one in several]


def _unpack(pair: Sequence[Any] | Mapping[str, Any]) -> tuple[Any, str, dict[str, Any]]:
    if isinstance(pair, Mapping):
        options = dict(pair)
        if "image" not in options or "question" not in options:
            raise UserError(f"a question needs 'image' and 'question', got {', '.join(map(str, options)) or 'nothing'}")
        return options.pop("image"), options.pop("question"), options
    if not isinstance(pair, (list, tuple)) or len(pair) not in (2, 3):
        raise UserError(f"expected (image, question) or (image, question, options), got {type(pair).__name__}")
    return pair[0], pair[1], dict(pair[2]) if len(pair) == 3 else {}


def _four(region: Sequence[int]) -> tuple[int, int, int, int]:
    try:
        values = tuple(region)
    except TypeError as error:
        raise UserError(f"region={region!r} is not four cells; expected (x0, y0, x1, y1)") from error
    if len(values) != 4 or not all(isinstance(v, (int, float)) or hasattr(v, "__index__") for v in values):
        raise UserError(f"region={values} is not four cells; expected (x0, y0, x1, y1), both ends inclusive")
    return values


def _whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name}={value!r} is not a whole number of at least {least}")


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{name}={value!r} is neither True nor False")
    return value


def _check_left_out(option: str, look: str, max_looks: int, having: Sequence[str]) -> None:
    """What none of the looks asked for has cannot be left out: such an answer would pass for a measurement.

    `look`: the first one ("auto", "none" or a name), after which the model is free. `having`: its looks with that part.
    """
    free = look == AUTO or (max_looks > 1 and look != NONE)
    possible = having if free and max_looks > 0 else set(having) & {look}
    if not possible:
        known = ", ".join(having) or "none of this model's"
        raise UserError(f"{option} with look={look!r} and max_looks={max_looks} leaves nothing out; it is for: {known}")
