"""The table of faults (`relook.data.faults`) run over a file: counted, named with file and line, mended into a copy.

One pass: each item is read, checked by every row, mended where a copy is wanted, and written. What is kept is a hash
and a number for each item, the facts of each image file, and the first findings of each row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from relook.data.faults import RULES, Context
from relook.data.images import ImageFacts, facts_below, near, split_ref
from relook.data.items import Item
from relook.data.reader import Record, Unreadable, folder_of, read_records, scan, write_records
from relook.data.remap import mover
from relook.errors import UserError
from relook.regions import GRID

_WIDTH = 118  # columns of the summary
_ROUNDS = 2 * len(RULES)  # a mend may uncover another fault; more rounds than that go in circles


@dataclass(frozen=True)
class Finding:
    """One fault: the rule, where ("file:line"), which item (from 1) and what was seen."""

    rule: str
    where: str
    item: int
    detail: str


@dataclass
class CheckReport:
    """All faults of a file by rule: counts of every one, and the first `keep` of each rule in full.

    Where a mended copy was written: its path, the items in it, how often each rule's mend was used, how many items
    each rule cost, and the faults that are still in it.
    """

    path: str
    items: int = 0
    images: int = 0  # image files looked at
    compared: int = 0  # evaluation images that these were compared with
    not_compared: list[str] = field(default_factory=list)  # those that could not be read
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    keep: int = 100
    target: str | None = None
    written: int = 0
    mended: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    remaining: Counter[str] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        """True where nothing is wrong, in the mended copy where there is one."""
        return not self.counts if self.target is None else not self.remaining

    def add(self, rule: str, where: str, detail: str) -> None:
        self.counts[rule] += 1
        if self.counts[rule] <= self.keep:
            self.findings.append(Finding(rule, where, self.items, _printable(detail)))

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "path": self.path,
            "items": self.items,
            "images": self.images,
            "against": {"images": self.compared, "unreadable": self.not_compared},
            "ok": self.ok,
            "counts": dict(self.counts),
            "findings": [vars(finding) for finding in self.findings],
        }
        if self.target is not None:
            counts = {"mended": self.mended, "left_out": self.left_out, "remaining": self.remaining}
            found["fixed"] = {"path": self.target, "items": self.written} | {k: dict(v) for k, v in counts.items()}
        return found

    def __str__(self) -> str:
        """One screen: a line for each rule with its count and first example; what was mended."""
        looked = f", {self.images} images" if self.images else ""
        total = sum(self.counts.values())
        faults = f"{total} fault{'s' * (total != 1)}" if total else "no fault found"
        lines = [_cut(f"{self.path}: {self.items} items{looked}, {faults}")]
        first = {finding.rule: finding for finding in reversed(self.findings)}
        for rule, count in self.counts.most_common():
            seen = first[rule]
            place = f"item {seen.item}, line {seen.where.rpartition(':')[2].partition(',')[0]}"
            lines.append(_cut(f"{count:8d} {rule:<17} {place}: {seen.detail}"))
        if self.compared:
            lost = self.not_compared
            but = f"; {len(lost)} could not be read (first: {_printable(lost[0])})" if lost else ""
            lines.append(_cut(f"held against {self.compared} evaluation images{but}"))
        if self.target is not None:
            lines.append(_cut(f"written: {self.target}, {self.written} items"))
            groups = (("mended", self.mended), ("left out", self.left_out), ("still there", self.remaining))
            lines += [
                _cut(f"{what:>11}: " + ", ".join(f"{count} {rule}" for rule, count in counts.most_common()))
                for what, counts in groups
                if counts
            ]
        return "\n".join(lines)


def check(
    path: str | Path,
    grid: int = GRID,
    *,
    images: bool = True,
    image_root: str | Path | None = None,
    against: Sequence[str | Path] = (),
    fix: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> CheckReport:
    """Hold every item of a file against the table; write a mended copy where `fix` names a place for it.

    Args:
        path: items: a JSON array, JSON lines, or Parquet written by `relook data convert`.
        images: decode every image file that items name. Without, only what the items themselves say is checked.
        image_root: folder of the image paths, which may not leave it; without it, the file's own folder.
        against: files of evaluation items or questions, whose images must not be among these; they are looked for
            below `image_root`, then below the folder of their file.
        fix: where the mended copy goes (`.json`: an array, else JSON lines), written aside and then renamed. Paths in
            it are rewritten to hold from its folder, unless `image_root` is given.
        progress: called with the number of items now and then.

    Raises:
        UserError: a file that is not JSON (file and line), `fix` is the file itself, or nothing would be left in it.
    """
    path = Path(path)
    report = CheckReport(str(path))
    context = _context(path, grid, images or bool(against), image_root, against, report)
    if fix is None:
        for _ in _mended(path, report, context, progress):
            pass
        return report
    report.target = str(fix)
    if Path(fix).resolve() == path.resolve():
        raise UserError(f"{fix} is the file itself; give another place for the mended copy")
    move = (lambda item: item) if image_root is not None else mover(folder_of(path), Path(fix).parent)
    items = map(move, _mended(path, report, context, progress))
    report.written = write_records(fix, (item.to_dict() for item in _some(items, path, report)))
    return report


def _mended(
    path: Path,
    report: CheckReport,
    context: Context,
    progress: Callable[[int], None] | None,
) -> Iterator[Item]:
    """The items without their faults, those left out missing; everything is noted in the report on the way."""
    for record in scan(path):
        report.items += 1
        context.number = report.items
        if progress is not None and report.items % 1000 == 0:
            progress(report.items)
        item = _checked(record, report, context)
        if item is not None and report.target is not None:
            item = _mend(item, report, context)
        if item is not None:
            yield item


def _checked(record: Record | Unreadable, report: CheckReport, context: Context) -> Item | None:
    """The item of a record, its faults noted; None where it is none."""
    if isinstance(record, Unreadable):
        why = record.why
    else:
        try:
            item = Item.from_dict(record.value, record.where)
        except UserError as error:
            why = str(error).removeprefix(f"{record.where}: ")
        else:
            for name, rule in RULES.items():
                for detail in rule.find(item, context) if rule.find else ():
                    report.add(name, record.where, detail)
            return item
    report.add("form", record.where, why)
    report.left_out["form"] += 1
    return None


def _mend(item: Item, report: CheckReport, context: Context) -> Item | None:
    """The item mended row by row until none of them finds a fault it can mend; None where one leaves it out."""
    used: Counter[str] = Counter()
    for _ in range(_ROUNDS):
        faults = [name for name, rule in RULES.items() if rule.find and any(rule.find(item, context))]
        name = next((name for name in faults if RULES[name].mend is not None), None)
        if name is None:
            report.mended += used
            report.remaining.update(faults)
            return item
        mend = RULES[name].mend
        mended = mend(item, context) if mend else None
        if mended is None or mended == item:
            report.left_out[name] += 1
            return None
        item, used[name] = mended, used[name] + 1
    report.left_out[name or "form"] += 1
    return None


def _context(
    path: Path,
    grid: int,
    images: bool,
    image_root: str | Path | None,
    against: Sequence[str | Path],
    report: CheckReport,
) -> Context:
    root = str(folder_of(path) if image_root is None else image_root)
    context = Context(grid=grid, root=root, strict=image_root is not None)
    if images or against:
        met: set[str] = set()
        facts_of = facts_below(root, context.strict, look=bool(against))

        def counted(file: str) -> ImageFacts | None:
            facts = facts_of(file)
            if facts is not None:
                met.add(file)
                report.images = len(met)
            return facts

        context.facts = counted
    if against:
        context.other_file, context.other_look = _evaluation_images(against, image_root, report)
    return context


def _evaluation_images(
    against: Sequence[str | Path], image_root: str | Path | None, report: CheckReport
) -> tuple[Callable[[bytes], str | None], Callable[[bytes], str | None]]:
    """Functions that name the evaluation image with these bytes (by their digest), and the one that looks like this."""
    import numpy as np

    by_digest: dict[bytes, str] = {}
    looks: dict[str, np.ndarray] = {}
    for path in map(Path, against):
        roots = [folder_of(path)] if image_root is None else [Path(image_root), folder_of(path)]
        facts_of = [facts_below(root, strict=root is not roots[-1], look=True) for root in roots]
        before = report.compared
        for name in _image_files(path):
            found = (facts(name) for facts in facts_of)
            facts = next((each for each in found if each is not None and each.problem is None), None)
            if facts is None:
                report.not_compared.append(name)
                continue
            report.compared += 1
            if by_digest.setdefault(facts.digest, name) is name and facts.look is not None:
                looks[name] = np.frombuffer(facts.look, dtype=np.uint8)
        if report.compared == before:
            places = " or ".join(map(str, roots))
            raise UserError(f"{path}: none of its images can be read below {places}; give the folder that holds them")
    names, all_looks = list(looks), np.stack([*looks.values()]) if looks else np.empty((0, 72), dtype=np.uint8)

    @cache
    def nearest(look: bytes) -> str | None:
        at = near(look, all_looks)
        return None if at is None else names[at]

    return by_digest.get, nearest


def _image_files(path: Path) -> Iterator[str]:
    """The image files that items or questions name, each once; Visual-CoT's "image" is a path and a path###box."""
    met: set[str] = set()
    for record in read_records(path):
        lists = (value for key, value in record.value.items() if key == "image" or key.endswith("images"))
        refs = [ref for value in lists for ref in (value if isinstance(value, list) else [value])]
        for ref in refs:
            file = split_ref(ref.partition("###")[0])[0] if isinstance(ref, str) else None
            if file and file not in met:
                met.add(file)
                yield file


def _some(items: Iterator[Item], path: Path, report: CheckReport) -> Iterator[Item]:
    """The items, or an error instead of an empty copy."""
    count = 0
    for count, item in enumerate(items, start=1):  # noqa: B007
        yield item
    if not count:
        why = ", ".join(f"{number} {rule}" for rule, number in report.left_out.most_common()) or "it holds none"
        raise UserError(f"{path}: no item would be left in a mended copy ({why}); check the file and the image root")


def _printable(text: str) -> str:
    """Without control characters and half characters, which paths and answers of others may hold."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _cut(line: str) -> str:
    return line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"
