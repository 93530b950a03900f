"""What a build and a recipe may choose about data, checked before anything is read; and what it means for boxes.

`BuildOptions` are the choices of `relook data build`; `Data` is what stands under `data:` in a recipe.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from relook.boxes import parse_units
from relook.data.items import Question, image_size
from relook.errors import UserError
from relook.looks import LOOKS
from relook.regions import GRID, Box, Cells, box_to_cells, cells_in, cells_of, chain, clamp_box, iou, union

BoxRule = Literal["each", "union", "merge"]
OutsideRule = Literal["drop", "clamp"]
Note = Callable[[str, str], None]  # counts something that did not come out as given: what, and where ("file:line")
REENCODINGS = tuple(name for name, spec in LOOKS.items() if spec.reencodes)
DIRECT = "none"  # the look of an item that answers at once


@dataclass(frozen=True)
class BuildOptions:
    """How items are made.

    look: a row of the look table, "none" for direct answers, or shares of several ("region=0.5,clip=0.3,none=0.2"):
        each question then gets the look that a hash of its text and of its image's name draws, whatever the order of
        the file and the folders.
    grid: cells per side (8 in the published models).
    margin: cells by which the *crop* is widened on each side; the tokens always name the cells of the box itself.
    free_choice: leave out the sentence that asks for the look, so that the model learns to decide.
    answer_prefix: open the answer after a look with the published "Now answer the question.\\n".
    question_first: write the question before the image, for models that were trained so (the tiny ones).
    align: alignment pairs: the re-encoded view in place of the image, no call, no second turn.
    boxes: "each" box is a region of its own (boxes in the same cells are one), their "union" is one region, or those
        that overlap are "merge"d until none do.
    outside: a box that is empty or outside the image is "drop"ped, or "clamp"ed to the nearest pixel inside.
    no_box: what to do with a question without a usable box under look="region": "skip" it (counted), make it a
        "direct" answer, stop with an "error", or look by re-encoding ("clip", "detection", "seg").
    whole: a box that covers this share of the image or more turns the question into a direct answer; None: never.
    seed: of the shares of `look`.
    max_looks: how many region looks lead to a box, each counting cells of the view before it (`regions.chain`).
    """

    look: str = "region"
    grid: int = GRID
    margin: int = 0
    free_choice: bool = False
    answer_prefix: bool = False
    question_first: bool = False
    align: bool = False
    boxes: BoxRule = "each"
    outside: OutsideRule = "drop"
    no_box: str = "skip"
    whole: float | None = None
    seed: int = 0
    max_looks: int = 1

    def __post_init__(self) -> None:
        for name in self.shares:
            _one_of("look", name, [*LOOKS, DIRECT])
        _one_of("boxes", self.boxes, ["each", "union", "merge"])
        _one_of("outside", self.outside, ["drop", "clamp"])
        _one_of("no_box", self.no_box, ["skip", "direct", "error", *REENCODINGS])
        if self.grid < 1 or not 0 <= self.margin < self.grid:
            raise UserError(
                f"grid {self.grid} with margin {self.margin}; expected a grid of 1 or more and 0 <= margin < grid"
            )
        if self.max_looks < 1:
            raise UserError(f"max_looks is {self.max_looks}; expected 1 or more")
        if self.whole is not None and not 0 < self.whole <= 1:
            raise UserError(f"whole is {self.whole}; expected a share of the image, over 0 and at most 1")
        if self.align and not all(LOOKS[name].reencodes for name in self.shares if name in LOOKS):
            raise UserError(f"align with look {self.look!r}; expected a look that re-encodes: {', '.join(REENCODINGS)}")

    @property
    def shares(self) -> dict[str, float]:
        """Looks and their shares, which add up to 1: {"region": 0.5, "none": 0.5}."""
        if "=" not in self.look:
            return {self.look: 1.0}
        shares = {}
        for part in self.look.split(","):
            name, _, share = part.partition("=")
            try:
                shares[name.strip()] = float(share)
            except ValueError:
                raise UserError(f"look {self.look!r}: {share!r} is no share; expected region=0.5,none=0.5") from None
        if abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) < 0:
            raise UserError(f"look {self.look!r}: the shares add up to {sum(shares.values()):g}; expected 1")
        return shares

    def look_of(self, question: Question) -> str:
        """The look of this question: the only one, or the one drawn by its share."""
        shares = self.shares
        name = os.path.basename(question.image) if isinstance(question.image, str) else question.where
        point = draw(f"{self.seed}|{name}|{question.text}") if len(shares) > 1 else 0.0
        return next(
            (look for look, end in zip(shares, accumulate(shares.values()), strict=True) if point < end), [*shares][-1]
        )


def draw(key: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same on every machine and in every order."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def _one_of(name: str, value: str, known: list[str]) -> None:
    if value not in known:
        raise UserError(f"{name} is {value!r}; expected one of {', '.join(known)}")


# -- boxes


def question_boxes(question: Question, options: BuildOptions, note: Note) -> list[Box]:
    """The usable boxes of a question: pixels, inside the image, joined as the options say."""
    if not question.boxes:
        return []
    size = image_size(question)
    found = [_usable(box, size, question.where, options.outside, note) for box in question.boxes]
    boxes = [box for box in found if box is not None]
    if options.boxes == "union" and boxes:
        return [union(boxes)]
    return merged(boxes) if options.boxes == "merge" else boxes


def region_turns(
    boxes: Sequence[Box], question: Question, options: BuildOptions, note: Note
) -> list[list[tuple[Cells, Box]]]:
    """The turns that lead to the boxes: of every region call its cells, and the box of the image that it shows.

    The last turn has the cells of each box, in order and without repeats; those before it lead to all of them together.
    """
    size, grid, margin = image_size(question), options.grid, options.margin
    frame: Box = (0, 0, *size)
    turns: list[list[tuple[Cells, Box]]] = []
    for around in chain(union(boxes), size, grid, margin, options.max_looks)[:-1]:
        frame = cells_in(around, frame, grid, margin)
        turns.append([(around, frame)])
    named = dict.fromkeys(cells_of(box, frame, grid) for box in boxes)
    turns.append([(each, cells_in(each, frame, grid, margin)) for each in named])
    cells = [box_to_cells(box, size, grid) for box in boxes]
    if question.slack != (0, 0):
        widths, heights = ([max(s - off, 1), s + off] for s, off in zip(size, question.slack, strict=True))
        others = [(width, height) for width in widths for height in heights]
        if any(box_to_cells(box, other, grid) not in cells for box in boxes for other in others):
            note("regions that an image of another possible size would move by a cell", question.where)
    return turns


def merged(boxes: Sequence[Box]) -> list[Box]:
    """The boxes with every group of overlapping ones as the smallest box around it, until none overlap.

    >>> merged([(0, 0, 4, 4), (3, 3, 8, 8), (10, 0, 12, 2)])
    [(0, 0, 8, 8), (10, 0, 12, 2)]
    """
    out: list[Box] = []
    for box in boxes:
        while touching := [other for other in out if iou(box, other) > 0]:
            box = union([box, *touching])  # which may touch others that neither touched before
            out = [other for other in out if other not in touching]
        out.append(box)
    return out


def _usable(box: Box, size: tuple[int, int], where: str, outside: str, note: Note) -> Box | None:
    """The part of the box inside the image, min and max in order; None where nothing is left. Changes are counted."""
    x1, y1, x2, y2 = min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3])
    if (x1, y1, x2, y2) != box:
        note("boxes with min and max swapped, put in order", where)
    inside = max(x1, 0), max(y1, 0), min(x2, size[0]), min(y2, size[1])
    if inside[0] < inside[2] and inside[1] < inside[3]:
        if inside != (x1, y1, x2, y2):
            note("boxes cut at the image's border", where)
        return inside
    if outside == "clamp":
        note("boxes empty or outside the image, moved to its nearest pixel", where)
        return clamp_box((x1, y1, x2, y2), size)
    note("boxes empty or outside the image, left out", where)
    return None


# -- data of a recipe


def val_path(dst: str | Path) -> Path:
    """Where the validation items of a build go: `items.json` -> `items.val.json`."""
    return Path(dst).with_suffix(f".val{Path(dst).suffix}")


class Strict(BaseModel):
    """A pydantic model in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def relative_path(path: str | None) -> str | None:
    """The path, or a ValueError where it is absolute (recipes are to run on any machine)."""
    if path is not None and Path(path).is_absolute():
        raise ValueError(f"{path!r} is an absolute path; give it relative to the folder you start from")
    return path


class ItemSource(Strict):
    """One set of items: JSON, JSON lines, Parquet (a file or a folder), or a folder that datasets' save_to_disk wrote.

    Records that are questions (image, question, answer, boxes) become items with the look `look`.
    """

    path: str
    image_root: str | None = Field(None, description="folder that image paths are relative to and may not leave")
    weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="share of the draws, over that of all sources; not with mix: concat"
    )
    split: str = Field("train", description="of a saved dataset")
    look: str = Field("region", description="of questions: region, clip, detection, seg, none, or shares of them")
    columns: dict[str, str] = Field({}, description="image, question, answer, bboxs -> the columns' own names")
    format: str | None = Field(None, description="form of the file (relook data sources); seen from it by default")
    units: str | None = Field(None, description="of questions' boxes, such as 0-1000 xywh; pixels unless the form says")
    ask: str | None = Field(None, description="question about a label of annotated regions: 'What is the {label}?'")

    @field_validator("path", "image_root")
    @classmethod
    def _relative(cls, value: str | None) -> str | None:
        return relative_path(value)

    @property
    def val(self) -> str | None:
        """The validation items that `relook data build --val` wrote beside these; None where there is no such file."""
        beside = val_path(self.path)
        return str(beside) if beside.is_file() else None

    @field_validator("units")
    @classmethod
    def _dialect(cls, value: str | None) -> str | None:
        return value if value is None else " ".join(parse_units(value))

    @field_validator("look")
    @classmethod
    def _known(cls, value: str) -> str:
        return BuildOptions(look=value).look


class Data(Strict):
    """Where examples come from: pages of a synthetic `world`, or published items of one `path` or several `sources`.

    `source` says which of the two ("json" stands for items of any form) and follows from what else is given.
    """

    source: Literal["world", "json"] = "world"
    world: str | None = Field(None, description="a synthetic dataset: installed (relook.sources) or module:attribute")
    path: str | None = Field(None, description="items in the published format: JSON, JSON lines, Parquet, a dataset")
    image_root: str | None = Field(None, description="folder the items' image paths are relative to")
    sources: list[ItemSource] = Field([], description="in place of path: several sets")
    mix: Literal["concat", "interleave_under", "interleave_over"] = Field(
        "concat", description="concat: all of every source; interleave: by weight, until the first (all) ran out once"
    )
    streaming: bool = Field(False, description="read from front to back, shuffled through a buffer")
    buffer: int = Field(16384, gt=0, description="records in the shuffle buffer of a stream")
    max_broken: float = Field(0.01, ge=0, le=1, description="share of examples that cannot be read that stops a run")
    as_built: bool = Field(False, description="take items that were built for a model of other settings")
    free_choice: bool = Field(False, description="items lose the sentences that ask for a look; the model decides")

    @field_validator("path", "image_root")
    @classmethod
    def _relative(cls, value: str | None) -> str | None:
        return relative_path(value)

    @model_validator(mode="before")
    @classmethod
    def _told(cls, raw: Any) -> Any:
        implied = isinstance(raw, dict) and "source" not in raw and not raw.get("world")
        return {**raw, "source": "json"} if implied and (raw.get("path") or raw.get("sources")) else raw

    @model_validator(mode="after")
    def _complete(self) -> Data:
        if self.source == "world" and not self.world:
            raise ValueError("source is 'world' but no world is named; add e.g. world: cards")
        theirs = [key for key in ("path", "sources", "image_root", "streaming") if getattr(self, key)]
        if self.world and theirs:
            raise ValueError(
                f"data.world ({self.world}) and data.{theirs[0]} ({getattr(self, theirs[0])}) exclude each other; leave"
                " one out: data.world=null data.source=json for items, data.path=null for the synthetic dataset"
            )
        if self.source == "json" and (self.path is None) == (not self.sources):
            raise ValueError("source is 'json': give exactly one of path: items.json and sources: [{path: ...}, ...]")
        if self.sources and self.image_root is not None:
            raise ValueError("image_root belongs to each of the sources: sources: [{path: ..., image_root: ...}]")
        if self.mix == "concat" and any(source.weight != 1 for source in self.sources):
            raise ValueError(
                "weights need mix: interleave_under (or interleave_over); concat takes all of every source"
            )
        return self

    def all_sources(self) -> list[ItemSource]:
        """Every set, however many."""
        return self.sources or [ItemSource.model_validate({"path": self.path, "image_root": self.image_root})]
