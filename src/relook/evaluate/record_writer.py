"""The records of a run as they come: appended, synced, and read again where the run was stopped.

    run.json               what the records depend on: a run is continued only if all of this is the same
    records.jsonl.part     grows by the answers to one batch under one setting at a time; records.jsonl in the end
    records.jsonl.part-1   the same of the second of several processes that share a run, and so on

A run may be killed at any moment and continued with any number of processes: each reads what all have left. A batch
that was not written whole is asked again, so that batches are the same as in a run without an interruption.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relook.errors import UserError
from relook.evaluate.records import RECORDS, Record, holds_records, read_run, to_lines
from relook.io import append_lines, read_lines, replacing

HEAD, PART = "run.json", RECORDS + ".part"
Key = tuple[str, str, int]  # task, look, index of a record


class RecordWriter:
    """Records of one run. Without a folder it keeps nothing.

    Args:
        folder: of the run; made where missing.
        about: what decides the records (model, tasks, looks, ...), as JSON.
        rank: which of the processes that share the run this is. The first opens its writer before the others do.
        overwrite: whether the folder may hold a finished run, which is replaced when this one ends.

    Raises:
        UserError: the folder cannot be written, holds a finished run, or an unfinished one about something else.
    """

    def __init__(
        self, folder: str | Path | None, about: Mapping[str, Any], rank: int = 0, overwrite: bool = False
    ) -> None:
        self.folder, self.about = None if folder is None else Path(folder), json.loads(json.dumps(about))
        self.records: dict[Key, Record] = {}
        if self.folder is not None:
            self.part = self.folder / (PART if rank == 0 else f"{PART}-{rank}")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._open(self.folder, rank == 0, overwrite)
            except OSError as error:
                raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error

    @property
    def taken_up(self) -> int:
        """How many records earlier starts of this run left."""
        return len(self.records)

    def known(self, task: str, look: str, numbers: Sequence[int]) -> list[Record] | None:
        """The records of these questions, if an earlier start of the run has them all."""
        keys = [(task, look, number) for number in numbers]
        return [self.records[key] for key in keys] if all(key in self.records for key in keys) else None

    def add(self, records: Sequence[Record]) -> Sequence[Record]:
        """Append the records of one batch under one setting; on the disk when this returns."""
        if self.folder is not None:
            append_lines(self.part, records)
        return records

    def finish(self, records: Sequence[Record]) -> None:
        """Write the records of the whole run, in this order, under their final name.

        Called by the first process when everything else is written: until then the run can be continued. Killed in the
        midst of this, what is left is still all of the run.
        """
        if self.folder is not None:
            others = [part for part in parts(self.folder) if part != self.part]
            with replacing(self.part) as text:
                text.write(to_lines(records))
            for part in others:
                part.unlink()
            os.replace(self.part, self.folder / RECORDS)

    def discard(self) -> None:
        """Remove what the run left, so that it is not continued."""
        for part in parts(self.folder) if self.folder is not None else ():
            part.unlink()

    def _open(self, folder: Path, first: bool, overwrite: bool) -> None:
        before = begun(folder)
        if before is None:
            if first:
                if holds_records(folder) and not overwrite:
                    raise UserError(
                        f"{folder} holds a finished evaluation of {_finished(folder, self.about)}; choose another "
                        "folder, or give --overwrite (overwrite=True) to replace it"
                    )
                with replacing(folder / HEAD) as text:
                    json.dump(self.about, text, indent=1, ensure_ascii=False)
            self.part.open("wb").close()
        elif before != self.about:
            raise UserError(
                f"{folder} holds an unfinished run that differs in {_difference(before, self.about)}; give its "
                "settings again to go on with it, or choose another folder"
            )
        for part in parts(folder):
            self.records |= {(record["task"], record["look"], record["index"]): record for record in read_lines(part)}


def parts(folder: Path) -> list[Path]:
    """The parts of an unfinished run, that of the first process first."""
    ranks = {path: path.name.removeprefix(PART + "-") for path in folder.glob(PART + "-*")}
    others = sorted((path for path in ranks if ranks[path].isdigit()), key=lambda path: int(ranks[path]))
    return [path for path in (folder / PART, *others) if path.is_file()]


def begun(folder: str | Path | None) -> dict[str, Any] | None:
    """What an unfinished run in a folder is about (empty where that cannot be read); None where there is none."""
    if folder is None or not any(part.stat().st_size for part in parts(Path(folder))):
        return None
    try:
        found = json.loads((Path(folder) / HEAD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def finished_alike(folder: str | Path, now: Mapping[str, Any]) -> bool:
    """Whether a finished run lies in a folder, no unfinished one beside it, and all that decides its records is so."""
    path, run = Path(folder), read_run(Path(folder))
    now = json.loads(json.dumps(now))
    return holds_records(path) and begun(path) is None and all(run.get(name) == now[name] for name in now)


def _finished(folder: Path, now: Mapping[str, Any]) -> str:
    """What a finished run is about, beside what is to be run now."""
    run = read_run(folder)
    before = {name: run[name] for name in now if name in run}
    name = _short(run.get("model", "an unnamed model"))
    other = _difference(before, {key: now[key] for key in before})
    return f"{name}, which differs in {other}" if other else f"{name} with the same settings"


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if not before:
        return f"everything ({HEAD} is missing or broken)"
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} ({_short(before.get(name))}, now {_short(now.get(name))})" for name in names[:3])


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
