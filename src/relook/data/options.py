"""How items are made from questions: every choice of a build, checked at the door, and the draw that shares go by."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Literal

from relook.data.questions import Question
from relook.data.variants import DIRECT
from relook.errors import UserError
from relook.looks import LOOKS
from relook.regions import GRID

BoxRule = Literal["each", "union", "merge"]
OutsideRule = Literal["drop", "clamp"]
REENCODINGS = tuple(name for name, spec in LOOKS.items() if spec.reencodes)


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
        for name, share in shares.items():
            point -= share
            if point < 0:
                return name
        return name


def draw(key: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same on every machine and in every order."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def _one_of(name: str, value: str, known: list[str]) -> None:
    if value not in known:
        raise UserError(f"{name} is {value!r}; expected one of {', '.join(known)}")
