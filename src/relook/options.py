"""The options of `ask`: one checked model for Python, the command line and servers."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf, PlainSerializer
from pydantic.json_schema import SkipJsonSchema

from relook.errors import UserError
from relook.interventions import Intervention
from relook.io import validate
from relook.looks import LOOKS
from relook.regions import Cells, Frame, chain, check_box

AUTO, NONE = "auto", "none"


def _number(value: Any) -> float:
    """Python's numbers and NumPy's; text and bool are none."""
    try:
        if isinstance(value, (bool, str, bytes)) or not math.isfinite(value):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("expected a number, not text and not too large") from None


def _whole(value: Any) -> int:
    if not _number(value).is_integer():
        raise ValueError("expected a whole number")
    return int(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool) and str(getattr(value, "dtype", "")) != "bool":
        raise ValueError("expected True or False")
    return bool(value)


def _four(number: Callable[[Any], float], wanted: str) -> BeforeValidator:
    """Four numbers, also as the text "2,5,6,6"; None stays."""

    def read(value: Any) -> Any:
        if value is None:
            return None
        try:
            if isinstance(value, (bytes, Mapping, set, frozenset)):
                raise TypeError
            a, b, c, d = map(number, map(float, value.split(",")) if isinstance(value, str) else value)
        except (TypeError, ValueError):
            raise ValueError(f"expected {wanted}") from None
        return a, b, c, d

    return BeforeValidator(read)


PixelBox = tuple[float, float, float, float]
Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Instead = Annotated[
    SkipJsonSchema[InstanceOf[Intervention] | None],  # Python's only: it may hold an image
    PlainSerializer(lambda value, info: value.name if value and info.mode == "json" else value),
]


class AskOptions(BaseModel):
    """Options of a question. NumPy's numbers are taken like Python's."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    look: str = AUTO
    """"auto": the model decides. A model that was trained to be asked for a look (a prompted one) is given the
    published sentence that asks for a region (for a re-encoding, where it has no regions); a free-choice model gets the
    question alone. (A question that holds such a sentence keeps it for a prompted model, and loses it where another or
    none belongs.) "none": no sentence, and no look. A look's name ("region", "clip", "detection", "seg"): its sentence,
    and the call's first token is written for the model."""
    region: Annotated[Cells | None, _four(_whole, "four whole cells x0,y0,x1,y1, both ends inclusive")] = None
    """(x0, y0, x1, y1) grid cells, both ends inclusive: the model is made to look there."""
    box: Annotated[PixelBox | None, _four(_number, "four numbers x1,y1,x2,y2 in pixels of the upright image")] = None
    """In place of `region`, (x1, y1, x2, y2) pixels of the upright original, x2 and y2 exclusive: the model is made to
    look at the cells that cover it. Where the model's regions nest (`region_of="last"`), step by step, in at most
    `max_looks` looks (`relook.regions.chain`)."""
    max_looks: Whole | None = Field(None, ge=0)
    """How many times the model may look again (one turn may ask for several regions). 0 is "none"; None is what the
    model was taught, `processor.max_looks`: 1 unless it says otherwise."""
    max_new_tokens: Whole = Field(64, ge=1)
    """Limit on the tokens the model chooses in one turn; a call that was begun is completed."""
    do_sample: Flag = False
    """Draw tokens; greedy without it."""
    temperature: Number | None = Field(None, ge=1e-4, le=1e4)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Whole | None = Field(None, ge=1)
    """With `do_sample`; what is left out is as the model's generation_config.json says."""
    seed: Whole | None = Field(None, ge=0, lt=2**64)
    """With `do_sample`: two runs with one seed draw the same tokens; None draws differently every time."""
    constrain: Flag = True
    """While a call is being written, only tokens that keep it well formed can be chosen. Without it, a malformed call
    is recorded in `answer.looks` with its problem, and the question is asked again with no look allowed."""
    condition: Flag = True
    """For measuring. False: the projector of a re-encoding look gets no condition (c = 0), so that the second look's
    features enter as they are, F in place of F + <F, c> c, and `attention` is None. The control token keeps its hidden
    state. Regions have no projector, hence no condition."""
    blank: Flag = False
    """For measuring. True: the crops of regions are blank images of the same size (`Look.image` shows it)."""
    intervention: Instead = None
    """For measuring: what is shown in place of the crops of regions (`relook.interventions`). `blank=True` is its row
    "blank"."""
    look_at: Whole | None = None
    """Which image looks go to, counted from 0 over the conversation (negative: from its end). Default: the first image
    that came with the latest question that had one."""
    fetch: Flag = False
    """Whether images may be http and https addresses, which are then downloaded."""

    @classmethod
    def of(cls, options: Mapping[str, Any], shared: Mapping[str, Any] | None = None) -> "AskOptions":
        """The options, checked; UserError names the first one that is unknown or wrong, in one sentence.

        Args:
            shared: options of all questions, which are those where `options` says nothing. What it says of where to
                look (`look`, `region`, `box`) replaces all that these say of it.
        """
        placed = any(options.get(name) is not None for name in ("region", "box"))
        elsewhere = options.get("look", AUTO) not in (AUTO, "region")
        replaced = ("look", "region", "box") if placed else ("region", "box") if elsewhere else ()
        left = {name: value for name, value in (shared or {}).items() if name not in replaced}
        checked = validate(cls, {**left, **options}, "ask", "option")
        checked._agree()
        return checked

    def _agree(self) -> None:
        if self.look not in (AUTO, NONE, *LOOKS):
            raise UserError(f"look {self.look!r} is unknown; expected one of {', '.join([AUTO, NONE, *LOOKS])}")
        for name in ("region", "box"):
            if (value := getattr(self, name)) is not None and self.look not in (AUTO, "region"):
                raise UserError(
                    f"{name}={value} was given with look={self.look!r}; leave look out, or make it 'region'"
                )
        if self.region is not None and self.box is not None:
            raise UserError(f"box={self.box} and region={self.region} are two ways to say one thing; leave one out")
        if self.blank and self.intervention is not None:
            raise UserError(f"blank=True and intervention {self.intervention.name!r} change one crop; leave one out")
        if self.max_looks == 0 and self.first_look in LOOKS:
            raise UserError(f"look={self.first_look!r} was asked for with max_looks=0; allow at least 1")
        for name in ("temperature", "top_p", "top_k", "seed"):
            if (value := getattr(self, name)) is not None and not self.do_sample:
                raise UserError(f"{name}={value} has no effect on greedy decoding; add do_sample=True or leave it out")

    @property
    def first_look(self) -> str:
        """The look that is asked for: "region" where cells or a box are given."""
        return self.look if self.region is None and self.box is None else "region"

    @property
    def change(self) -> Intervention | None:
        """What is shown in place of crops; None: the crops."""
        return Intervention("blank") if self.blank else self.intervention

    def calls(self, whole: Frame, looks: int) -> list[Cells]:
        """The region calls that are asked for, the first about the `whole` image; at most `looks` of them.

        Raises:
            UserError: a box that leaves the image, or is no box of pixels.
        """
        if self.box is not None:
            size = whole.box[2:]
            return chain(check_box(self.box, size), size, whole.grid, whole.margin, looks if whole.nested else 1)
        return [] if self.region is None else [self.region]

    def check_left_out(self, looks: list[str]) -> None:
        """Refuse to leave out what none of the looks asked for has: the answer would pass for a measurement."""
        most = 1 if self.max_looks is None else self.max_looks
        free = self.first_look == AUTO or (most > 1 and self.first_look != NONE)
        named = self.intervention and f"intervention {self.intervention.name!r}"
        for option, reencodes, wanted in (
            ("condition=False", True, not self.condition),
            (named or "blank=True", False, self.change is not None),
        ):
            having = [name for name in looks if LOOKS[name].reencodes is reencodes]
            possible = having if free and most > 0 else {self.first_look}.intersection(having)
            if wanted and not possible:
                raise UserError(
                    f"{option} with look={self.first_look!r} and max_looks={most} leaves nothing out; "
                    f"it is for: {', '.join(having) or 'none of this model'}"
                )
