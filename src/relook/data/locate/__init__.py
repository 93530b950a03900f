"""Boxes for questions that have none: `relook data locate` finds where the answer stands, and says how it found out.

    {"image": "a.jpg", "question": "Who?", "answer": "ACME", "bboxs": [[100, 120, 300, 240]],
     "located": {"by": "ocr", "with": "rapidocr-onnxruntime 1.4.4", "score": 0.97}}

A line of the output is the question of the same number, with the box that was found. Several equally good places are
listed and none of them is chosen (`located` has `candidates`); boxes that were annotated stay.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relook.data.build import BuildReport, things
from relook.data.forms import Source
from relook.data.items import Item, Question, item_question
from relook.data.locate.locators import OCR, Locator, find_locator
from relook.data.placing import Placer
from relook.data.remap import question_line
from relook.data.settings import LOCATED
from relook.errors import RelookError, UserError
from relook.io import append_lines, locked_file, replacing_file

SHOWN = 20  # questions with several places, or none, that a report names
_SAME = ("image", "question", "answer")  # of a line that was written before


@dataclass
class LocateReport:
    """How many questions there are of each kind, and those without a box that was found, in words."""

    path: str
    counts: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)
    read: BuildReport = field(default_factory=BuildReport)  # on records that could not be used

    def add(self, line: dict[str, Any], where: str) -> None:
        """Count a line of the output."""
        found = line.get(LOCATED, {})
        several, answer = found.get("candidates", ()), line["answer"]
        answer = answer if isinstance(answer, str) else answer[0]
        if "error" in found:
            self.counts["failed"] += 1
            self.named.append(f"{where}: {found['error']}")
        elif several:
            self.counts["several"] += 1
            seen = ", ".join(f"{each['text']!r} at {','.join(map(str, each['box']))}" for each in several[:3])
            self.named.append(f"{where}: {answer!r} at {len(several)} places: {seen}")
        elif not line.get("bboxs"):
            self.counts["none"] += 1
            self.named.append(f"{where}: {answer!r} was not found")
        else:
            self.counts["found" if found else "annotated"] += 1

    def to_dict(self) -> dict[str, Any]:
        kinds = ("found", "several", "none", "failed", "annotated")
        return {"path": self.path, "questions": self.counts.total()} | {kind: self.counts[kind] for kind in kinds}

    def __str__(self) -> str:
        kinds = {
            "found": "found",
            "several": "at several places, none of them chosen",
            "none": "not found",
            "failed": "failed",
            "annotated": "with boxes already",
        }
        said = ", ".join(f"{self.counts[kind]} {words}" for kind, words in kinds.items() if self.counts[kind])
        lines = [f"{self.counts.total()} questions: {said}", *(f"    {each}" for each in self.named[:SHOWN])]
        lines += ["    ..."] * (len(self.named) > SHOWN)
        if left := self.read.left_out:
            lines.append(f"{len(left)} records left out, the first: {left[0]}")
        return "\n".join(lines)


def locate(
    src: str | Path,
    dst: str | Path,
    by: str | Locator = OCR,
    *,
    threshold: float = 0.3,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    **reading: Any,
) -> LocateReport:
    """Write the questions of `src` with boxes to `dst` (JSON lines), one line after another; a rerun goes on.

    What failed before is tried again.

    Args:
        src: questions in any form.
        by: "ocr", the folder of a detector, or a locator.
        threshold: least score of a detection.
        progress: called with a name, the number of questions done and how many there are.
        reading: of `forms.Source`: image_root, format, columns, ask, split, units.

    Raises:
        UserError: a file that cannot be read, lines in `dst` of other questions, another run that writes there.
    """
    src, dst = Path(src), Path(dst)
    if src.resolve() == dst.resolve():
        raise UserError(f"{dst} is the file of questions; give another place for those with boxes")
    report = LocateReport(str(dst))
    asked = list(_questions(Source(src, **reading), dst, report.read))
    with locked_file(dst):
        before = _written(dst, asked)
        failed = [number for number, line in enumerate(before) if "error" in line.get(LOCATED, {})]
        waiting = failed or len(before) < len(asked)
        locator = by if not isinstance(by, str) else find_locator(by, threshold) if waiting else None
        if failed and locator is not None:
            before = [
                asked[n][1] | _located(asked[n][0], locator) if n in failed else line for n, line in enumerate(before)
            ]
            with replacing_file(dst) as aside:
                append_lines(aside, before)
        for number, (question, line) in enumerate(asked):
            progress(src.name, number, len(asked))
            if number >= len(before):
                line = line if question.boxes or locator is None else line | _located(question, locator)
                append_lines(dst, [line])
            report.add(line if number >= len(before) else before[number], question.where)
    progress(src.name, len(asked), len(asked))
    return report


def _located(question: Question, locator: Locator) -> dict[str, Any]:
    """What a line says of where its answer stands."""
    try:
        found = locator.places(question)
    except RelookError as error:
        return {LOCATED: {**locator.source, "error": str(error)}}
    if len(found) == 1:
        return {"bboxs": [list(found[0].box)], LOCATED: {**locator.source, "score": found[0].score}}
    several = [{"box": list(place.box), "score": place.score, "text": place.text} for place in found]
    return {LOCATED: locator.source | ({"candidates": several} if several else {})}


def _questions(source: Source, dst: Path, report: BuildReport) -> Iterator[tuple[Question, dict[str, Any]]]:
    """Each question with its image as it is found from here, and its line with the image as it is found from `dst`."""
    report.fit = source.fit
    of_dataset, root = source.form.name == "hub", source.reading.root
    place = Placer(dst.parent if of_dataset else root, dst, None, None, report)
    for thing in things(source, dst, report):
        question = item_question(thing) if isinstance(thing, Item) else thing
        if question is None or not isinstance(question.image, str):
            report.left_out.append(f"{thing.where}: no question about an image that is a file")
        elif isinstance(placed := place(question), Question):
            yield placed.under(dst.parent), question_line(placed)
    source.fit.refuse(source.path)


def _written(dst: Path, asked: list[tuple[Question, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The lines that an earlier run wrote; a last one that was cut short is removed.

    Raises:
        UserError: the lines of another file, which is left as it is.
    """
    if dst.is_dir():
        raise UserError(f"{dst}: is a folder; give the place of a file")
    *whole, cut = (dst.read_bytes() if dst.is_file() else b"").split(b"\n")
    lines = []
    for number, text in enumerate([*whole, cut] if cut else whole):
        said = asked[number][1] if number < len(asked) else {}
        begins = json.dumps(said, ensure_ascii=False)[:-1].encode("utf-8", "backslashreplace")
        try:
            line = json.loads(text) if number < len(whole) else said if begins[: len(cut)] == cut[: len(begins)] else {}
        except ValueError:
            line = {}
        if not said or not isinstance(line, dict) or any(line.get(key) != said[key] for key in _SAME):
            raise UserError(
                f"{dst}:{number + 1}: is not line {number + 1} of these questions with its box; choose another place"
            )
        lines.append(line)
    if cut:
        with dst.open("r+b") as file:
            file.truncate(sum(len(text) + 1 for text in whole))
    return lines[: len(whole)]
