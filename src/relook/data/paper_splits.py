"""The paper's evaluation splits, built from the files of Visual-CoT's benchmark and of POPE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relook.data.build import BuildReport, build
from relook.data.published import EVAL_SPLITS
from relook.data.rules import REENCODINGS
from relook.errors import UserError


@dataclass
class SplitsReport:
    """One build a split, and the splits whose source file was not there."""

    built: dict[str, BuildReport]
    absent: dict[str, str]

    def __str__(self) -> str:
        lines = []
        for name, report in self.built.items():
            row = EVAL_SPLITS[name]
            lines.append(f"{name}: {report.items} items (stated {row.stated}) from {row.file}")
            lines += [f"    {line}" for line in str(report).splitlines()[1:]]
        return "\n".join(lines + [f"{name}: not built, no {file}" for name, file in self.absent.items()])


def build_splits(
    source: str | Path, target: str | Path, *, action: str = "clip", names: list[str] | None = None, **options: Any
) -> SplitsReport:
    """Build the evaluation splits whose source files lie in `source` into `target`/NAME.json.

    Every question comes out, as in the paper's counts: a box that is empty or outside its image names the nearest cell.

    Args:
        action: the re-encoding look of the action splits ("clip", "detection" or "seg"), which depends on the model.
        names: only these splits.
        options: of `build` (images, image_root, limit, and the fields of `BuildOptions`).

    Raises:
        UserError: no such split, none of the files, or several files for one split.
    """
    source, target = Path(source), Path(target)
    if action not in REENCODINGS:
        raise UserError(f"the action splits look by {action!r}; expected one of {', '.join(REENCODINGS)}")
    if not source.is_dir():
        raise UserError(f"{source}: is no folder; give the folder that holds the benchmark's files")
    unknown = sorted(set(names or ()) - set(EVAL_SPLITS))
    if unknown:
        raise UserError(f"no split {unknown[0]!r}; expected one of {', '.join(EVAL_SPLITS)}")
    report = SplitsReport({}, {})
    for row in EVAL_SPLITS.values():
        if names and row.name not in names:
            continue
        files = sorted(source.glob(row.file))
        if not files:
            report.absent[row.name] = row.file
            continue
        if len(files) > 1:
            raise UserError(
                f"{row.name}: which of {', '.join(each.name for each in files)} it was is not published; "
                f"leave one of them in {source}"
            )
        look = "region" if row.kind == "region" else action
        made = build(files[0], target / f"{row.name}.json", look=look, outside="clamp", **options)
        report.built[row.name] = made
        if made.items != row.count and options.get("limit") is None:
            made.note(f"items, where {row.count} questions were expected", f"{files[0]}: {made.items}")
    if not report.built:
        raise UserError(f"{source}: none of {', '.join(sorted(set(report.absent.values())))} is there")
    return report
