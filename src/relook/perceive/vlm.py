"""The public interface: ask a model about images, get a typed record.

All input is checked here, before the model runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from PIL import Image

from relook.errors import UserError
from relook.options import AUTO, NONE, AskOptions
from relook.regions import check_cells
from relook.trace import Answer, Event, Finished
from relook.views import open_image

from .conversation import Conversation
from .engine import Request
from .loop import Recorder, run
from .row import Row
from .sampling import Vocabulary, generation_defaults

MOST_CHARACTERS = 16  # of a token, on the mean of a text
ROWS_AT_ONCE = 8  # how many questions `ask_many` works on side by side


def domain_warnings(name: str, domain: str | None) -> list[str]:
    """What answers of a model that was trained on one domain carry."""
    said = f"{name or 'this model'} was trained on {domain} only; on anything else its answers mean nothing."
    return [said] if domain else []


def untrained_looks(config: Any) -> list[str]:
    """Looks that no training of the model has taught, as far as its provenance goes back and says which were."""
    taught, at = set[str](), getattr(config, "provenance", None) or {}
    while stages := at.get("stages"):
        if any("looks" not in stage for stage in stages):
            return []
        taught |= {look for stage in stages for look in stage["looks"]}
        if "start" not in at:  # all of the model was drawn here
            return [look for look in config.looks if look not in taught]
        at = at["start"]
    return [look for look in config.looks if look not in taught] if "base" in at else []


class VLM:
    """A vision-language model that may look again.

    Stateless: several conversations, also from several threads, do not affect each other.

    Args:
        model: a `VPTQwen2VLForConditionalGeneration`, in eval mode.
        processor: its `VPTQwen2VLProcessor`.
        name: what answers call it.

    Attributes:
        looks: names of the looks this model can take.
        domain: what a small model was trained on ("receipts", "cards"); None for a general one.
        context_limit: tokens that a conversation may have, where these are fewer than the model's.
    """

    def __init__(self, model: Any, processor: Any, name: str = ""):
        self.context_limit: int | None = None
        self.model, self.processor, self.name = model.eval(), processor, name
        self.sampling, self.logits_processors, ends = generation_defaults(model)
        size = model.lm_head.weight.shape[0]
        self.vocabulary = Vocabulary(
            processor.tokenizer, size, model.config.looks, processor.grid_size, model.device, ends
        )

    @property
    def looks(self) -> list[str]:
        return list(self.model.config.looks)

    @property
    def context(self) -> int:
        """Tokens that a conversation may have."""
        own = self.model.config.get_text_config().max_position_embeddings
        return own if self.context_limit is None else min(own, self.context_limit)

    @property
    def domain(self) -> str | None:
        return getattr(self.model.config, "domain", None)

    @property
    def warnings(self) -> list[str]:
        """Warnings that apply to every answer of this model, whatever its image."""
        return domain_warnings(self.name, self.domain)

    def look_warnings(self, kinds: Iterable[str]) -> list[str]:
        """Warnings that apply to an answer with looks of these kinds."""
        untrained = untrained_looks(self.model.config)
        name = self.name or "this model"
        return [
            f"the {kind} look of {name} is untrained: nothing that it learned from took one"
            for kind in dict.fromkeys(kinds)
            if kind in untrained
        ]

    def with_settings(self, **settings: Any) -> VLM:
        """The same model with other settings of the processor (`first_look`, `region_margin`, ...), all else shared.

        This VLM and its processor stay as they are.
        """
        other = copy.copy(self)
        other.processor = copy.copy(self.processor)
        for name, value in settings.items():
            setattr(other.processor, name, value)
        return other

    # -- asking ------------------------------------------------------------------------------------------------------

    def ask(self, image: Any, question: str, **options: Any) -> Answer:
        """Answer one question about one image, or about several (a list).

        Args:
            image: a path (of one page: "scan.pdf#page=2"), a PIL image, an array or tensor, the bytes of an image file,
                an open file, a data URL, or a list of these (`relook.views.open_image`). What was given is what is
                looked at, also when the caller changes it afterwards.
            question: in words; asked as it is.
            options: see `relook.options.AskOptions`: `look`, `region`, `box`, `max_looks`, `max_new_tokens`,
                `do_sample`, `temperature`, `top_p`, `top_k`, `seed`, `constrain`, `condition`, `blank`, `look_at`,
                `fetch`.

        Raises:
            UserError: an image that cannot be read, an empty question, an unknown option, a look the model lacks, a
                region off the grid, a box that leaves the image, a condition or a crop to leave out of a look that has
                none.
        """
        return last_answer(self.stream(image, question, **options))

    def stream(self, image: Any, question: str, **options: Any) -> Iterator[Event]:
        """As `ask`, event by event: TextDelta, LookTaken, and at the end Finished with the answer.

        The text pieces of the last turn add up to `answer.text`. (What a model writes before a call in the same turn is
        given out too; it is in the transcript, not in the answer.)
        """
        return self.chat().stream(question, image, **options)

    def ask_many(
        self, pairs: Iterable[Sequence[Any] | Mapping[str, Any]], *, batch_size: int = ROWS_AT_ONCE, **options: Any
    ) -> list[Answer]:
        """Answer several questions side by side, in order. Each answer is the one `ask` gives.

        Args:
            pairs: (image, question), or (image, question, options), or dicts {"image": .., "question": .., options..}.
                Read and opened batch by batch, each pair before the next.
            batch_size: how many at once.
            options: for all of them, as in `ask`; a pair's own options win.
        """
        check_pairs(pairs, batch_size)
        answers: list[Answer] = []
        rest = enumerate(pairs)
        while rows := [self._numbered_row(number, pair, options) for number, pair in islice(rest, batch_size)]:
            done = {i: event.answer for i, event in run(self, rows) if isinstance(event, Finished)}
            answers += [done[i] for i in range(len(rows))]
        return answers

    def chat(self, image: Any = None) -> Chat:
        """A conversation about an image (or a list of images), for questions that build on each other."""
        return Chat(self, opened_images(image))

    # -- inside ------------------------------------------------------------------------------------------------------

    def _begin(self, shared: Any = None) -> Conversation:
        return Conversation.begin(self.processor, self.model.device, shared)

    def _numbered_row(self, number: int, pair: Any, shared: Mapping[str, Any]) -> Row:
        try:
            image, question, own = unpack(pair)
            options = AskOptions.of(own, shared)
            return self._row(self._begin(), opened_images(image, options.fetch), question, options)
        except UserError as error:
            raise UserError(f"question {number}: {error}") from error

    def _row(self, conversation: Conversation, images: list[Image.Image], question: str, options: AskOptions) -> Row:
        """The row of a question, checked; raises UserError as `ask` says."""
        if not conversation.images and not images:
            raise UserError("no image was given; give a path, a PIL image, an array, bytes, or a list of these")
        return self._row_of(Request(question, tuple(images), options), conversation)

    def _row_of(self, request: Request, conversation: Conversation | None = None) -> Row:
        question, options = checked_question(request.question), self._fitted(request.options)
        request.check(conversation.images if conversation else ())
        if (characters := request.characters) > MOST_CHARACTERS * self.context:  # encoding them would take long
            raise UserError(
                f"question and what was said before have {characters:,} characters, and the model takes {self.context} "
                "tokens; ask something shorter"
            )
        request = replace(request, question=question, options=options)
        return Row(self, conversation or self._begin(), request).ask()

    def _fitted(self, options: AskOptions) -> AskOptions:
        """The options, checked against the model's looks and grid; what they leave open is the model's."""
        offered = [AUTO, NONE, *self.looks]
        if options.first_look not in offered:
            raise UserError(f"this model has no {options.first_look!r} look; expected one of {', '.join(offered)}")
        if options.region is not None:
            check_cells(options.region, self.processor.grid_size)
        own = {"max_looks": self.processor.max_looks, **(self.sampling if options.do_sample else {})}
        own = {name: value for name, value in own.items() if getattr(options, name) is None}
        options = AskOptions.of({**options.model_dump(), **own}) if own else options
        options.check_left_out(self.looks)
        return options


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

    def ask(self, question: str, image: Any = None, **options: Any) -> Answer:
        """The next question; `image` adds images to the conversation. Options as in `VLM.ask`.

        `usage` counts what this question cost, except `sequence_length`, which is the whole conversation's: over all
        questions, `lm_positions` add up to it.
        """
        return last_answer(self.stream(question, image, **options))

    def stream(self, question: str, image: Any = None, **options: Any) -> Iterator[Event]:
        """As `ask`, event by event."""
        checked = AskOptions.of(options)
        images = self._new_images + opened_images(image, checked.fetch)
        return self._run(self._vlm._row(self._conversation, images, question, checked))

    def _run(self, row: Row, record: Recorder | None = None) -> Iterator[Event]:
        for _, event in run(self._vlm, [row], record):
            if isinstance(event, Finished):
                self._conversation, self._new_images = row.conversation, []
                self._conversation.target = row.target
            yield event


def check_pairs(pairs: Any, batch_size: int) -> None:
    if isinstance(batch_size, bool) or not hasattr(batch_size, "__index__") or batch_size < 1:
        raise UserError(f"batch_size={batch_size!r} is not a whole number of at least 1")
    if not isinstance(pairs, Iterable):
        raise UserError(f"ask_many was given a {type(pairs).__name__}; expected pairs of image and question")


def last_answer(events: Iterator[Event]) -> Answer:
    *_, finished = events
    assert isinstance(finished, Finished)  # every row finishes
    return finished.answer


def opened_images(image: Any, fetch: bool = False) -> list[Image.Image]:
    """Opened images of whatever was given, none of them the caller's own; [] for None."""
    if image is None:
        return []
    opened = [(one, open_image(one, fetch)) for one in (image if isinstance(image, (list, tuple)) else [image])]
    return [ours.copy() if ours is given else ours for given, ours in opened]


def unpack(pair: Sequence[Any] | Mapping[str, Any]) -> tuple[Any, str, dict[str, Any]]:
    if isinstance(pair, Mapping):
        options = dict(pair)
        if "image" not in options or "question" not in options:
            raise UserError(f"a question needs 'image' and 'question', got {', '.join(map(str, options)) or 'nothing'}")
        return options.pop("image"), options.pop("question"), options
    own = pair[2] if isinstance(pair, (list, tuple)) and len(pair) == 3 else {}
    if not isinstance(pair, (list, tuple)) or len(pair) not in (2, 3) or not isinstance(own, Mapping):
        raise UserError(f"expected (image, question) or (image, question, options), got {str(pair)[:80]}")
    return pair[0], pair[1], dict(own)


def checked_question(question: str) -> str:
    if not isinstance(question, str):
        raise UserError(f"the question is a {type(question).__name__}; expected text")
    if not question.strip():
        raise UserError("the question is empty; ask something about the image")
    if any("\ud800" <= character <= "\udfff" for character in question):
        raise UserError("the question holds half a character (a lone surrogate); give text in Unicode")
    return question.strip()
