"""The skipped-sample report: what was left out of training and why, counted, named in a file, and a reason to stop."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from relook.data.collate import SkippedSample
from relook.data.dataset import check_share
from relook.data.reader import Unreadable
from relook.errors import RelookError
from relook.io import replacing
from relook.train import distributed

SHOWN = 5  # examples that are named on stderr; the file names all


class SkippedReport:
    """Counts examples that were taught and left out.

    Args:
        most_broken: share of broken examples at which a run stops; being too long is no fault of an example.
        unreadable: records that cannot be read and so are no example at all; they are named, too.
    """

    def __init__(self, most_broken: float, unreadable: Sequence[Unreadable] = ()) -> None:
        self.most_broken, self.unreadable = most_broken, unreadable
        self.taught = 0
        self.left_out: Counter[str] = Counter()
        self.path: Path | None = None
        self._first: dict[str, str] = {}
        self._own: tuple[int, list[SkippedSample]] = 0, []  # of this process, until `settle`

    def open(self, path: Path, begun: int) -> None:
        """Name examples in this file (JSON lines) from here on; `begun` are behind, those named among them stay."""
        self.path, kept = path, []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                one = SkippedSample(**json.loads(line))
            except (ValueError, TypeError):
                continue  # a line that a killed run left unfinished
            if 0 <= one.example < begun:
                kept.append(one)
                self._count(one)
        self.taught = begun - len(kept)
        unread = [SkippedSample(-1, "unread", one.where, one.why) for one in self.unreadable]
        for one in unread[:SHOWN]:
            distributed.say(f"left out ({one.reason}): {one.where}: {one.what}")
        if distributed.main() and (path.is_file() or unread):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.writelines(json.dumps(asdict(one)) + "\n" for one in (*unread, *kept))

    def add(self, taught: int, left_out: str) -> None:
        """Count a batch: how many examples it taught, and those left out as `pack_up` wrote them.

        Where several processes train, each counts its own until all `settle`.

        Raises:
            RelookError: too many are broken.
        """
        before, kept = self._own
        self._own = before + taught, kept + [SkippedSample(**one) for one in json.loads(left_out or "[]")]
        if distributed.count() == 1:
            self.settle([self.own()])

    def own(self) -> tuple[int, list[SkippedSample]]:
        """What this process counted since it was last asked."""
        own, self._own = self._own, (0, [])
        return own

    def settle(self, counted: Sequence[tuple[int, list[SkippedSample]]]) -> None:
        """Count what the processes counted (`own` of each); all of them come to the same account.

        Raises:
            RelookError: too many are broken.
        """
        self.taught += sum(taught for taught, _ in counted)
        found = sorted((one for _, left_out in counted for one in left_out), key=lambda one: one.example)
        if not found:
            return
        for one in found:
            self._count(one)
            if sum(self.left_out.values()) <= SHOWN:
                distributed.say(f"left out ({one.reason}): {one.where}: {one.what}")
        if self.path is not None and distributed.main():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(one)) + "\n" for one in found)
        self._check()

    def _count(self, one: SkippedSample) -> None:
        self.left_out[one.reason] += 1
        self._first.setdefault(one.reason, f"{one.where}: {one.what}")

    def _check(self) -> None:
        broken, seen = self.left_out["broken"], self.taught + sum(self.left_out.values())
        if broken:
            check_share(broken, seen, "examples", self.most_broken, self._first["broken"])
        if self.left_out["too long"] and not self.taught:
            raise RelookError(
                f"all {seen} examples so far are longer than the cutoff; the first: {self._first['too long']}; raise "
                "max_length, or let images be smaller"
            )

    def say(self) -> str:
        """In one line: how many were left out, why, and where they are named; "" for none."""
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        total = sum(self.left_out.values())
        said = [f"{total} of {self.taught + total} examples were left out ({counts})"] if total else []
        count = len(self.unreadable)
        said += [f"{count} record{'s' * (count > 1)} could not be read"] if count else []
        return "; ".join([*said, f"named in {self.path}"] if said and self.path is not None else said)
