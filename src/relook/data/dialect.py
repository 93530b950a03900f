"""Whether a file's boxes make sense in the dialect that they are read in (`relook.boxes`), and if not, in which.

A slip here and there is mended and counted by whoever uses the boxes. Where more than a few in a hundred need it, the
numbers are not what they were taken for, and repairs would teach wrong regions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from relook.boxes import ORDERS, Numbers, read_box
from relook.errors import UserError

FEW = 0.03  # share of boxes that may be slips; of ten and more, one may be
HELD = 1000  # boxes that a guess is made of
UNLIKELY = 20  # boxes from which on it is noticed that all of them lie in one corner
LARGEST = {"pixels": float("inf"), "0-1": 1.0, "percent": 100.0, "0-1000": 1000.0}  # numbers of the units to guess from
UNKNOWN = (1000, 1000)  # the size of an image that is not at hand, for a guess


def misfit(box: Sequence[float], size: tuple[int, int] | None) -> str:
    """Why a box in pixels is none of an image of `size`, in words that follow "boxes"; "" where it may be."""
    x1, y1, x2, y2 = box
    width, height = x2 - x1, y2 - y1
    if width < 0 or height < 0:
        return "run backwards"
    if min(width, height) < 1 and max(width, height) <= 1:
        return "are smaller than a pixel"
    if size is None:
        return ""
    over = max(-x1, x2 - size[0]), max(-y1, y2 - size[1])
    return "leave the image" if any(o > max(2, 0.02 * side) for o, side in zip(over, size, strict=True)) else ""


class BoxFit:
    """The boxes of one file, read in one dialect.

    Args:
        said: somebody stated the dialect; otherwise numbers that are merely unlikely in it are noticed, too.
    """

    def __init__(self, said: bool = False) -> None:
        self.said, self.dialect, self.boxes = said, ("pixels", "xyxy"), 0
        self.number, self.at, self.where, self.first = 1, 1, "", ""  # of the record, of the one to show; its numbers
        self.bad: Counter[str] = Counter()
        self.held: list[tuple[Sequence[float], tuple[int, int]]] = []
        self.most, self.least = 0.0, float("inf")  # the larger axis' largest number, the smallest side of an image
        self.reach = 0.0  # the largest number of the other axis

    def add(
        self, dialect: tuple[str, str], values: Sequence[float], box: Numbers, size: tuple[int, int] | None, where: str
    ) -> None:
        """Count a box: its numbers, the pixels that the dialect makes of them, and the size of its image."""
        self.dialect, self.boxes = dialect, self.boxes + 1
        why = misfit(box, size)
        if not self.first or (why and not self.bad):
            self.at, self.where = self.number, where
            self.first = f"[{', '.join(f'{value:g}' for value in values)}]" + (
                f" in {size[0]} x {size[1]}" if size else ""
            )
        if why:
            self.bad[why] += 1
        if len(self.held) < HELD:
            self.held.append((values, size or UNKNOWN))
        low, high = sorted((max(values[0], values[2]), max(values[1], values[3])))
        self.most, self.reach = max(self.most, high), max(self.reach, low)
        self.least = min(self.least, *(size or UNKNOWN))

    def verdict(self) -> str:
        """What is wrong with the dialect, and which one to try; "" where nothing is."""
        few, bad, name = FEW * self.boxes, self.bad.total(), " ".join(self.dialect)
        if bad > (max(few, 1) if self.boxes >= 10 else 0):
            guesses = self._guesses()
            if not guesses and self.bad["run backwards"] <= few:
                return ""  # boxes that leave their images and are of no other dialect, which are counted
            reasons = ", ".join(f"{number} of {self.boxes} boxes {why}" for why, number in self.bad.most_common())
            seen = f"read as {name}, {reasons} ({self.where}: {self.first})"
        elif guesses := self._unlikely():
            seen = f"read as {name}, all lie in one corner of their images: no number is over {self.most:g}"
        else:
            return ""
        options = " or ".join(f'--units "{guess.removesuffix(" xyxy")}"' for guess in guesses)
        guess = f"boxes look like {options} of relook data build or convert" if guesses else "numbers of no dialect"
        return f"{guess}; {seen}"

    def refuse(self, path: object) -> None:
        """Raise UserError with the verdict, where there is one."""
        if why := self.verdict():
            raise UserError(f"{path}: {why}")

    def _guesses(self) -> list[str]:
        """The dialects of the first units in which all but a few of the boxes are possible."""
        for units, largest in LARGEST.items():
            if units == "pixels" and self._scale(0.5):
                continue
            found = [order for order in ORDERS if self._possible(units, order)] if self.most <= largest else []
            if found:
                turned = ["stored"] if (units, found[0]) == ("pixels", "yxyx") else []  # sides swapped, either way
                return turned + [f"{units} {order}" for order in (found[:1] if found[0] == "xyxy" else found)]
        return []

    def _possible(self, units: str, order: str) -> bool:
        if (units, order) == self.dialect:
            return False
        bad = sum(bool(misfit(read_box(values, size, units, order), size)) for values, size in self.held)
        return bad <= FEW * len(self.held)

    def _unlikely(self) -> list[str]:
        """The dialect of pixels that are all in one corner, where nobody said that they are pixels."""
        scale = "" if self.said or self.dialect[0] != "pixels" else self._scale(0.8)
        return [f"{scale} {self.dialect[1]}"] if scale else []

    def _scale(self, share: float) -> str:
        """The scale of which the numbers use a share, and with which they end, though images do not; "" for none."""
        if self.boxes < UNLIKELY:
            return ""
        ends = ((units, LARGEST[units]) for units in ("percent", "0-1000"))
        return next((u for u, end in ends if share * end < self.reach <= self.most <= end < self.least / 1.3), "")
