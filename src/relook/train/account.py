"""What was left out of training, and why: counted, named in a file, and a reason to stop where it is too much.

Knows examples that could not be had; not where they come from, nor what is learnt from the others.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from relook.data.access import Unread
from relook.errors import RelookError
from relook.io import replacing
from relook.train import ranks

EARLY = 200  # examples: a share is not judged on fewer
SHOWN = 5  # examples that are named on stderr; the file names all

Reason = str  # "too long", "broken" or "unread"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An example that could not be had: its number in the stage, why, where its record lies, and what was wrong.

    The number is -1 for a record that has no place among the examples because it cannot be read.
    """

    example: int
    reason: Reason
    where: str
    what: str


def pack_up(left_out: list[LeftOut]) -> str:
    """As text, to travel from the process that drew a batch to the one that learns from it."""
    return json.dumps([asdict(one) for one in left_out]) if left_out else ""


def check_share(broken: int, seen: int, what: str, most: float, first: str) -> None:
    """Refuse to go on where more than a share `most` of what was seen is broken, or all of it.

    Raises:
        RelookError: it is; names the first.
    """
    if broken > most * max(seen, EARLY) or broken == seen:
        raise RelookError(
            f"{broken} of {seen} {what} could not be read, more than data.max_broken allows ({most:g}); "
            f"the first: {first}; mend the set (relook data check says what is wrong with it), or raise data.max_broken"
        )


class Account:
    """Counts examples that were taught and left out.

    Args:
        most_broken: share of broken examples at which a run stops; being too long is no fault of an example.
        unread: records that cannot be read and so are no example at all; they are named, too.
    """

    def __init__(self, most_broken: float, unread: Sequence[Unread] = ()) -> None:
        self.most_broken, self.unread = most_broken, unread
        self.taught = 0
        self.left_out: Counter[Reason] = Counter()
        self.path: Path | None = None
        self._first: dict[Reason, str] = {}
        self._own: tuple[int, list[LeftOut]] = 0, []  # of this process, until `settle`

    def open(self, path: Path, begun: int) -> None:
        """Name examples in this file (JSON lines) from here on; `begun` are behind, those named among them stay."""
        self.path, kept = path, []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                one = LeftOut(**json.loads(line))
            except (ValueError, TypeError):
                continue  # a line that a killed run left unfinished
            if 0 <= one.example < begun:
                kept.append(one)
                self._count(one)
        self.taught = begun - len(kept)
        unread = [LeftOut(-1, "unread", one.where, one.why) for one in self.unread]
        for one in unread[:SHOWN]:
            ranks.say(f"left out ({one.reason}): {one.where}: {one.what}")
        if ranks.main() and (path.is_file() or unread):
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
        self._own = before + taught, kept + [LeftOut(**one) for one in json.loads(left_out or "[]")]
        if ranks.count() == 1:
            self.settle([self.own()])

    def own(self) -> tuple[int, list[LeftOut]]:
        """What this process counted since it was last asked."""
        own, self._own = self._own, (0, [])
        return own

    def settle(self, counted: Sequence[tuple[int, list[LeftOut]]]) -> None:
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
                ranks.say(f"left out ({one.reason}): {one.where}: {one.what}")
        if self.path is not None and ranks.main():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(one)) + "\n" for one in found)
        self._check()

    def _count(self, one: LeftOut) -> None:
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
        count = len(self.unread)
        said += [f"{count} record{'s' * (count > 1)} could not be read"] if count else []
        return "; ".join([*said, f"named in {self.path}"] if said and self.path is not None else said)
