"""Evaluation folders on disk: read again, and kept in a small form.

`run` writes records.jsonl and results.json; `keep` makes of them what a repository can hold: records.jsonl.gz (about
a twentieth of the size: without transcripts and seconds per stage, floats to six digits) and the head of results.json.
`read_folder` takes both. Knows files; refuses to know what a score means.
"""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relook.errors import UserError
from relook.io import replacing

Record = Mapping[str, Any]

RECORDS, RESULTS = "records.jsonl", "results.json"
PACKED = RECORDS + ".gz"
NEEDED = frozenset(
    ("task", "look", "index", "where", "image", "field", "question", "accepted")
    + ("scores", "looks", "recall", "iou", "usage", "seconds", "failed", "skipped")
)
DROPPED = ("transcript",)


@dataclass(frozen=True)
class Folder:
    """One evaluation: its folder's name, what was run (results.json's `run`; empty where that is missing), its records
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
    return Folder(path.resolve().name, path, _run(path / RESULTS), tuple(records[key] for key in sorted(records)))


def keep(folder: Folder, target: str | Path) -> Path:
    """Write a folder's records, small, into `target` (made where missing); the same records give the same bytes."""
    target = Path(target)
    text = "".join(
        json.dumps(_slim(record), ensure_ascii=False, separators=(",", ":")) + "\n"
        for record in sorted(folder.records, key=lambda record: (record["task"], record["index"], record["look"]))
    )
    packed = io.BytesIO()
    with gzip.GzipFile("", "wb", 9, packed, mtime=0) as file:
        file.write(text.encode())
    write_bytes({target / PACKED: packed.getvalue()})
    with replacing(target / RESULTS) as results:
        json.dump({"run": folder.run}, results, indent=1, ensure_ascii=False)
        results.write("\n")
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


def write_bytes(contents: Mapping[Path, bytes]) -> None:
    """Write files aside and rename them once all are written.

    Raises:
        UserError: a place that cannot be written; nothing of the old files is lost then.
    """
    asides = {path: path.with_name(path.name + ".part") for path in contents}
    try:
        for path, data in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            asides[path].write_bytes(data)
        for path, aside in asides.items():
            os.replace(aside, path)
    except OSError as error:
        for aside in asides.values():
            if aside.is_file():
                aside.unlink()
        where = error.filename or next(iter(contents))
        raise UserError(f"{where}: cannot be written ({error.strerror}); choose another folder") from error


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


def _run(file: Path) -> Mapping[str, Any]:
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
