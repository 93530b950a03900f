"""The table of faults (`relook.data.faults`) run over a file: counted, named with file and line, mended into a copy.

One pass: each item is read, checked by every row, mended where a copy is wanted, and written. What is kept is a hash
and a number for each item, the facts of each image file, and the first findings of each row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from relook.data.build import BuildReport, as_item
from relook.data.faults import RULES, Context, found_faults
from relook.data.forms import Source
from relook.data.images import FactsBelow, near, split_ref
from relook.data.items import COLUMNS, Item, LeftOut, Question
from relook.data.reader import folder_of, read_records, readable, write_records
from relook.data.remap import mover
from relook.data.rules import BuildOptions
from relook.data.settings import model_settings
from relook.errors import UserError
from relook.regions import GRID

KEPT = 100  # findings of a rule that are kept in full
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
    """All faults of a file by rule: counts of every one, and the first `KEPT` of each rule in full.

    Where a mended copy was written (`target`): the items in it, how often each rule's mend was used, how many items
    each rule cost, and the faults that are still in it.
    """

    path: str
    items: int = 0
    images: int = 0  # image files looked at
    compared: int = 0  # evaluation images that these were compared with
    not_compared: list[str] = field(default_factory=list)  # those that could not be read
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    target: str | None = None
    written: int = 0
    mended: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    remaining: Counter[str] = field(default_factory=Counter)
    notes: BuildReport = field(default_factory=BuildReport)  # of questions: what did not come out as the file has it

    @property
    def ok(self) -> bool:
        """True where nothing is wrong, in the mended copy where there is one."""
        return not self.counts if self.target is None else not self.remaining

    def add(self, rule: str, where: str, detail: str, item: int | None = None) -> None:
        self.counts[rule] += 1
        if self.counts[rule] <= KEPT:
            self.findings.append(Finding(rule, where, item or self.items, _printable(detail)))

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "path": self.path,
            "items": self.items,
            "images": self.images,
            "against": {"images": self.compared, "unreadable": self.not_compared},
            "ok": self.ok,
            "counts": dict(self.counts),
            "notes": dict(self.notes.counts),
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
        lines = [_cut(f"{self.path}: {self.items} items{looked}, {faults}", keep_end=True)]
        first = {finding.rule: finding for finding in reversed(self.findings)}
        for rule, count in self.counts.most_common():
            seen = first[rule]
            place = f"item {seen.item}, line {seen.where.rpartition(':')[2].partition(',')[0]}"
            lines.append(_cut(f"{count:8d} {rule:<17} {place}: {seen.detail}"))
        lines += [
            _cut(f"{n:8d} {what} (first: {self.notes.examples[what][0]})") for what, n in self.notes.counts.items()
        ]
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
    grid: int | None = None,
    *,
    model: str | None = None,
    images: bool = True,
    image_root: str | Path | None = None,
    against: Sequence[str | Path] = (),
    looks: Sequence[str] | None = None,
    fix: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
    **reading: Any,
) -> CheckReport:
    """Hold every item of a file against the table; write a mended copy where `fix` names a place for it.

    Args:
        path: items, or a source of any form, of whose questions items are made as training does.
        grid: cells per side; the model's, or what the first item stores, unless given.
        model: that is to learn: its settings and looks are what items must be built for. Without, all items must be
            built as the first one.
        images: decode every image file that items name. Without, only what the items themselves say is checked.
        image_root: folder of the image paths, which may not leave it; without it, the file's own folder.
        against: files of evaluation items or questions, whose images must not be among these; they are looked for
            below `image_root`, then below the folder of their file.
        looks: of the model that is to learn; others in an item are a fault.
        fix: where the mended copy goes (`.json`: an array, else JSON lines), written aside and then renamed. Paths in
            it are rewritten to hold from its folder, unless `image_root` is given.
        progress: called with the number of items now and then.
        reading: of `forms.Source`: format, columns, ask, split, units.

    Raises:
        UserError: a file that is not JSON (file and line), `fix` is the file itself, or nothing would be left in it.
    """
    path, report, strict = Path(path), CheckReport(str(path)), image_root is not None
    root = str(folder_of(path) if image_root is None else image_root)
    source = Source(path, image_root=image_root, **reading)
    settings, known = (source.settings(), None) if model is None else model_settings(model)
    grid = grid or settings.get("grid", GRID)
    context = Context(grid=grid, root=root, strict=strict, looks=looks or known, settings={**settings, "grid": grid})
    facts = FactsBelow(context.root, strict, look=bool(against))
    if images or against:
        context.facts = facts.__getitem__
    if against:
        context.other_file, context.other_look = _evaluation_images(against, image_root, report)
    report.notes.fit = source.fit
    items = _mended(source, report, context, progress)
    if fix is not None:
        report.target = str(fix)
        if Path(fix).resolve() == path.resolve():
            raise UserError(f"{fix} is the file itself; give another place for the mended copy")
        move = (lambda item: item) if strict else mover(folder_of(path), Path(fix).parent)
        report.written = write_records(fix, (move(item).to_dict() for item in _some(items, path, report)))
    for _ in items:
        pass
    if why := source.fit.verdict():
        report.add("box-units", source.fit.where, why, source.fit.at)
    report.images = sum(found is not None for found in facts.values())
    return report


class _NotAnItem(UserError):
    """A question where items were to be mended."""


def _mended(
    source: Source, report: CheckReport, context: Context, progress: Callable[[int], None] | None
) -> Iterator[Item]:
    """The items without their faults, those left out missing; everything is noted in the report on the way."""
    options = BuildOptions(**{"grid": context.grid, **context.settings}, no_box="direct")
    for record in source.scan():
        report.items += 1
        context.number = source.fit.number = report.items
        if progress is not None and report.items % 1000 == 0:
            progress(report.items)
        try:
            thing = source.thing(readable(record))
            if report.target is not None and not isinstance(thing, Item):
                why = "a question, of which `relook data build` makes an item; mend items"
                raise _NotAnItem(f"{record.where}: {why}")
            item = as_item(thing, options, context, report.notes)
        except _NotAnItem:
            raise
        except UserError as error:
            rule = error.rule if isinstance(error, LeftOut) else "form"
            report.add(rule, record.where, str(error).removeprefix(f"{record.where}: "))
            report.left_out[rule] += 1
            continue
        for name, detail in found_faults(item, context):
            report.add(name, record.where, detail)
        mended = item if report.target is None else _mend(item, report, context)
        if mended is not None:
            yield mended


def _mend(item: Item, report: CheckReport, context: Context) -> Item | None:
    """The item mended row by row until none of them finds a fault it can mend; None where one leaves it out."""
    used: Counter[str] = Counter()
    name = "form"
    for _ in range(_ROUNDS):
        faults = dict.fromkeys(name for name, _ in found_faults(item, context))
        mends = [(name, mend) for name in faults if (mend := RULES[name].mend) is not None]
        if not mends:
            report.mended += used
            report.remaining.update(faults.keys())
            return item
        name, mend = mends[0]
        mended = mend(item, context)
        if mended is None or mended == item:
            break
        item, used[name] = mended, used[name] + 1
    report.left_out[name] += 1
    return None


def _evaluation_images(
    against: Sequence[str | Path], image_root: str | Path | None, report: CheckReport
) -> tuple[Callable[[bytes], str | None], Callable[[bytes], str | None]]:
    """Functions that name the evaluation image with these bytes (by their digest), and the one that looks like this."""
    import numpy as np

    by_digest: dict[bytes, str] = {}
    looks: dict[str, bytes] = {}
    for path in map(Path, against):
        beside, before = FactsBelow(folder_of(path), strict=False, look=True), report.compared
        places = [beside] if image_root is None else [FactsBelow(image_root, strict=True, look=True), beside]
        for name in _image_files(path):
            found = (facts[name] for facts in places)
            known = next((each for each in found if each is not None and each.problem is None), None)
            if known is None:
                report.not_compared.append(name)
                continue
            report.compared += 1
            if by_digest.setdefault(known.digest, name) is name and known.look is not None:
                looks[name] = known.look
        if report.compared == before:
            roots = " or ".join(str(facts.root) for facts in places)
            raise UserError(f"{path}: none of its images can be read below {roots}; give the folder that holds them")
    names, all_looks = list(looks), np.frombuffer(b"".join(looks.values()), dtype=np.uint8).reshape(-1, 72)

    @cache
    def nearest(look: bytes) -> str | None:
        at = near(look, all_looks)
        return None if at is None else names[at]

    return by_digest.get, nearest


def _image_files(path: Path) -> Iterator[str]:
    """The image files that a file of any form names, each once; of records, those without a question, too."""
    met: set[str] = set()
    for ref in _image_refs(path):
        file = split_ref(ref.partition("###")[0])[0] if isinstance(ref, str) else None  # Visual-CoT: path###box
        if file and file not in met:
            met.add(file)
            yield file


def _image_refs(path: Path) -> Iterator[Any]:
    source = None
    with suppress(UserError):  # of no known form, it may name images all the same
        source = Source(path)
    if source is not None and source.form.read is not None:
        yield from (thing.image for thing in source.things() if isinstance(thing, Question))
        return
    for record in read_records(path):
        for key, value in record.value.items():
            if key in COLUMNS["image"] or key.endswith("images"):
                yield from value if isinstance(value, list) else [value]


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


def _cut(line: str, keep_end: bool = False) -> str:
    """The line, as much of it as fits the screen: its beginning, or its end where that says more than a path."""
    if len(line) <= _WIDTH:
        return line
    return "…" + line[1 - _WIDTH :] if keep_end else line[: _WIDTH - 1] + "…"
