"""Faults in a file of items, found by rule. Pure: no image is opened and no token id needed.

A rule is a row of `RULES`: a name, and a function from an item to what is wrong with it. Mending, and the
rules that need pixels, come on top of this; the rows stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from relook.data.items import IMAGE_KEYS, Item, split_ref
from relook.data.records import read_records
from relook.errors import UserError
from relook.looks import Call, parse_calls
from relook.regions import GRID, cells_to_box, widen

# Sizes are not known here, so a crop is held against its cells in the crop's own scale: an image of width W on a grid
# of k has cell edges i*W/k, truncated. See `_crop_fits`.


@dataclass(frozen=True)
class Finding:
    """One fault: the rule, where ("file:line") and what was seen."""

    rule: str
    where: str
    detail: str


@dataclass
class CheckReport:
    """All faults of a file by rule: counts of every one, and the first few in full."""

    path: str
    items: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    keep: int = 100

    @property
    def ok(self) -> bool:
        return not self.counts

    def add(self, finding: Finding) -> None:
        self.counts[finding.rule] += 1
        if len(self.findings) < self.keep:
            self.findings.append(finding)

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "items": self.items,
            "ok": self.ok,
            "counts": dict(self.counts),
            "findings": [vars(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        """One screen: a line for each rule with its count and first example."""
        if self.ok:
            return f"{self.path}: {self.items} items, no fault found"
        first = {finding.rule: finding for finding in reversed(self.findings)}
        lines = [f"{self.path}: {self.items} items, {sum(self.counts.values())} faults"]
        for rule, count in self.counts.most_common():
            example = f"  {first[rule].where}: {first[rule].detail}" if rule in first else ""
            lines.append(f"{count:8d} {rule}{example}")
        return "\n".join(lines)


def check(path: str | Path, grid: int = GRID) -> CheckReport:
    """Check every item of a file; a record that is not an item is a fault too, a file that is not JSON an error."""
    _refuse_pipe(Path(path))
    report = CheckReport(str(path))
    for record in read_records(path):
        where = f"{path}:{record.line}"
        report.items += 1
        try:
            item = Item.from_dict(record.value, where)
        except UserError as error:
            report.add(Finding("form", where, str(error).removeprefix(f"{where}: ")))
            continue
        for rule, find in RULES.items():
            for detail in find(item, grid):
                report.add(Finding(rule, where, detail))
    return report


def _refuse_pipe(path: Path) -> None:
    """Records are found by their place in the file, so it must be one that can be read twice. Opens nothing: a pipe
    that nobody writes into would never open."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: is a pipe or a device, which cannot be read twice; save it as a file and check that")


def _placeholder_counts(item: Item, grid: int) -> Iterator[str]:
    counts = item.placeholder_counts()
    for key in IMAGE_KEYS:
        if counts[key] != len(item.images[key]):
            yield f"{counts[key]} placeholders for {len(item.images[key])} {key}"


def _malformed_calls(item: Item, grid: int) -> Iterator[str]:
    """Calls that do not parse, `<|x_8|>` among them (a box edge on the image's border, floored to 8)."""
    for call in _calls(item, grid):
        if call.problem:
            yield f"{call.look} call: {call.problem}"


def _role_order(item: Item, grid: int) -> Iterator[str]:
    roles = [turn.role for turn in item.messages]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    wanted = ["user", "assistant"] * (len(roles) // 2)
    if not roles or roles != wanted:
        yield f"roles {', '.join(roles)}; expected user and assistant in turn, the last an assistant's"


def _empty_answer(item: Item, grid: int) -> Iterator[str]:
    if item.messages[-1].role == "assistant" and not item.messages[-1].content.strip():
        yield "the last answer is empty"


def _crop_suffixes(item: Item, grid: int) -> Iterator[str]:
    """Crops that no image size would give for the cells of their call (call by call, crop by crop, in order)."""
    calls = [call for call in _calls(item, grid) if call.look == "region" and call.cells and not call.problem]
    crops = [(ref, split_ref(ref)[1]) for ref in item.images["images"] if isinstance(ref, str)]
    boxes = [(ref, box) for ref, box in crops if box is not None]
    if len(calls) != len(boxes):
        yield f"{len(calls)} well-formed region calls for {len(boxes)} crops"
        return
    for call, (ref, box) in zip(calls, boxes, strict=True):
        if box[0] < 0 or box[1] < 0 or box[0] >= box[2] or box[1] >= box[3]:
            yield f"crop of {ref} is empty or starts outside the image"
        elif not any(_crop_fits(box, call, margin, grid) for margin in range(grid)):
            yield f"crop of {ref} is not the region {call.cells}"


def _calls(item: Item, grid: int) -> list[Call]:
    turns = (turn.content for turn in item.messages if turn.role == "assistant" and "<|" in turn.content)
    return [call for content in turns for call in _parsed(content, grid)]


@lru_cache(maxsize=1 << 14)  # a set of any size has few distinct calls: 1296 regions on 8 x 8 cells
def _parsed(content: str, grid: int) -> tuple[Call, ...]:
    return tuple(parse_calls(content, grid))


def _crop_fits(box: tuple[int, int, int, int], call: Call, margin: int, grid: int) -> bool:
    """Whether some image size gives this crop for these cells, widened by `margin`.

    On each axis the far edge e = (c1+1)*W/k truncated leaves W in [e*k/(c1+1), (e+1)*k/(c1+1)); one of those W must
    also give the near edge. For k = 8, cells 1..3 and the crop 80..320: W is 640..641, and 1*640/8 = 80 fits.
    """
    x0, y0, x1, y1 = widen(call.cells, margin, grid)  # type: ignore[arg-type]
    for near, far, low, high in ((box[0], box[2], x0, x1), (box[1], box[3], y0, y1)):
        sides = range(far * grid // (high + 1), (far + 1) * grid // (high + 1) + 2)
        if not any(_edges(side, low, high, grid) == (near, far) for side in sides if side > 0):
            return False
    return True


def _edges(side: int, low: int, high: int, grid: int) -> tuple[int, int]:
    """Near and far pixel edge of cells low..high on an axis of `side` pixels."""
    box = cells_to_box((low, 0, high, 0), (side, grid), grid)
    return box[0], box[2]


RULES: dict[str, Callable[[Item, int], Iterator[str]]] = {
    "placeholder-count": _placeholder_counts,
    "malformed-call": _malformed_calls,
    "role-order": _role_order,
    "empty-answer": _empty_answer,
    "crop-region": _crop_suffixes,
}
