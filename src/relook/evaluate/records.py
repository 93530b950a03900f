"""Evaluation records and the folders they are in: read, and kept in a small form.

A run writes records.jsonl (a `Record` a line) and results.json; `keep` makes of them what a repository can hold:
records.jsonl.gz (about a twentieth of the size: without transcripts and seconds per stage, floats to six digits) and
the `run` part of results.json. `read_folder` reads both.
"""

import gzip
import io
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from relook.errors import UserError
from relook.io import replacing, replacing_file

RECORDS, RESULTS = "records.jsonl", "results.json"
PACKED = RECORDS + ".gz"


class Record(TypedDict):  # annotations of this module are not postponed: NotRequired would be lost
    """One question under one setting: what was asked, what was answered, and what the answer is worth.

    Boxes are x1, y1, x2, y2 in pixels of the upright original, x2 and y2 exclusive. A question that failed has no
    scores and says why in `failed`; one that the setting does not apply to, in `skipped`.
    """

    task: str
    look: str  # the setting's name
    index: int  # of the question in its task
    where: str  # file:line, or which page of a synthetic dataset
    image: str | None  # path; None for an image in memory
    pixels: NotRequired[str | None]  # hash of an image in memory
    field: str | None
    question: str
    accepted: list[str]
    boxes: NotRequired[list[list[int]]]
    located: NotRequired[dict[str, Any]]  # how the boxes were found, where they were not annotated
    size: NotRequired[list[int] | None]  # width, height of the upright image
    seen: NotRequired[list[int]]  # width, height at which the model saw it first, where that is known
    other: NotRequired[dict[str, Any]]  # the question whose image was shown: index, where, image, size
    grid: NotRequired[int | None]
    answer: NotRequired[str | None]
    scores: dict[str, float]
    looks: list[dict[str, Any]]  # kind, cells, box (that was shown), problem, attention; frame where not whole
    recall: float | None  # share of the annotated area that was seen
    iou: float | None  # of the cells named and the annotated boxes
    first_recall: NotRequired[float | None]  # where regions nest: of the first look; the others are of the last one
    usage: dict[str, Any] | None
    transcript: NotRequired[list[dict[str, Any]]]
    seconds: float | None
    failed: str | None
    skipped: str | None
    judged: NotRequired[dict[str, Any]]


NEEDED = Record.__required_keys__
DROPPED = ("transcript",)  # from the small form


def answered(record: Record) -> bool:
    return record["failed"] is None and record["skipped"] is None


def image_key(record: Record) -> str:
    """What identifies an image: its path, or of a page drawn in memory which page."""
    return str(record["image"] or record["where"])


def cluster_key(record: Record) -> str:
    """What identifies an image's content in statistics: its hash where it was in memory (one may be asked about in
    several rows of a file), else `image_key`."""
    return record.get("pixels") or image_key(record)


def to_lines(records: Iterable[Record]) -> str:
    """The records as they are written into records.jsonl."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@dataclass(frozen=True)
class Folder:
    """One evaluation: its folder's name, what was run (`run` of results.json; empty where that is missing), its records
    sorted by task, look and number of the question."""

    name: str
    path: Path
    run: Mapping[str, Any]
    records: tuple[Record, ...]

    def under(self, task: str, look: str) -> list[Record]:
        return [record for record in self.records if (record["task"], record["look"]) == (task, look)]


def holds_records(path: Path) -> bool:
    """Whether a finished evaluation lies in this folder."""
    return (path / RECORDS).is_file() or (path / PACKED).is_file()


def read_folder(path: str | Path) -> Folder:
    """The evaluation in a folder; plain records come before packed ones where both are there.

    Raises:
        UserError: no evaluation there, a broken or incomplete record (file and line), one question recorded twice.
    """
    path = Path(path)
    if not holds_records(path):
        raise UserError(
            f"{path}: no {RECORDS} or {PACKED} in it; give a folder that `relook evaluate --out` wrote (records appear "
            "when the run has ended)"
        )
    file = path / RECORDS if (path / RECORDS).is_file() else path / PACKED
    records: dict[tuple[str, str, int], Record] = {}
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        record = _record(line, f"{file}:{number}")
        key = record["task"], record["look"], record["index"]
        if key in records:
            raise UserError(
                f"{file}:{number}: question {key[2]} of {key[0]} under {key[1]} is there twice; evaluate again"
            )
        records[key] = record
    return Folder(path.resolve().name, path, read_run(path), tuple(records[key] for key in sorted(records)))


def keep(folder: Folder, target: str | Path) -> Path:
    """Write a folder's records, small, into `target` (made where missing); the same records give the same bytes."""
    target = Path(target)
    ordered = sorted(folder.records, key=lambda record: (record["task"], record["index"], record["look"]))
    text = "".join(json.dumps(_slim(each), ensure_ascii=False, separators=(",", ":")) + "\n" for each in ordered)
    packed = io.BytesIO()
    with gzip.GzipFile("", "wb", 9, packed, mtime=0) as file:
        file.write(text.encode("utf-8", "backslashreplace"))
    with replacing_file(target / PACKED) as aside, replacing(target / RESULTS) as results:
        aside.write_bytes(packed.getvalue())
        results.write(json.dumps({"run": folder.run}, indent=1, ensure_ascii=False) + "\n")
    return target


def keep_all(folders: Iterable[Folder], target: str | Path) -> list[Path]:
    """`keep` each folder as `target`/NAME; UserError where two have one name, or one would be kept over itself."""
    places: dict[Path, Folder] = {}
    for folder in folders:
        place = Path(target) / folder.name
        if place in places:
            raise UserError(f"{folder.path} and {places[place].path} would both be kept as {place}; rename one")
        if place.resolve() == folder.path.resolve():
            raise UserError(f"{place} would be kept over itself; choose another folder")
        places[place] = folder
    return [keep(folder, place) for place, folder in places.items()]


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write files aside and rename them once all are written; UserError where one cannot be."""
    with ExitStack() as stack:
        for path, data in contents.items():
            stack.enter_context(replacing_file(path)).write_bytes(data)


def _lines(file: Path) -> list[str]:
    try:
        data = file.read_bytes()
        return (gzip.decompress(data) if file.suffix == ".gz" else data).decode().split("\n")
    except (EOFError, OSError, ValueError) as error:  # cut short, not gzip or unreadable, not UTF-8
        raise UserError(f"{file}: cannot be read ({error}); copy it again, or evaluate again") from error


def _record(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: broken JSON ({error}); copy the file again, or evaluate again") from None
    missing = NEEDED - record.keys() if isinstance(record, dict) else NEEDED
    if missing:
        raise UserError(
            f"{where}: a record without {', '.join(sorted(missing)[:3])}; expected what `relook evaluate` writes"
        )
    return record


def read_run(folder: Path) -> Mapping[str, Any]:
    """`run` of a folder's results.json; empty where that is missing.

    Raises:
        UserError: it is not the results of an evaluation.
    """
    file = folder / RESULTS
    if not file.is_file():
        return {}
    try:
        run = json.loads(file.read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not the results of an evaluation ({error}); evaluate again") from error
    if not isinstance(run, dict):
        raise UserError(f"{file}: 'run' is {run!r}; expected what `relook evaluate` writes")
    return run


def _slim(record: Record) -> dict[str, Any]:
    slim = {key: _rounded(value) for key, value in record.items() if key not in DROPPED}
    if slim["usage"]:
        slim["usage"] = {key: value for key, value in slim["usage"].items() if key != "seconds"}
    return slim


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return {key: _rounded(each) for key, each in value.items()} if isinstance(value, dict) else value
