"""The evaluation splits of the paper, built from what they were made of: Visual-CoT's benchmark, and POPE.

One row a split: its published name, the benchmark file with its questions, answers and boxes, and whether it is about
regions or about re-encoding. The two LLaVA-COCO splits are not in the table: nothing published tells which questions
they hold, so only the published files themselves have them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relook.data.builder import BuildReport, build
from relook.data.options import REENCODINGS
from relook.errors import UserError

REGION, ACTION = "region", "action"


@dataclass(frozen=True)
class EvalSplit:
    """One split. `count`: questions in its source; `stated`: how many the published README says there are."""

    name: str
    file: str
    kind: str
    count: int
    stated: str


EVAL_SPLITS: dict[str, EvalSplit] = {
    row.name: row
    for row in (
        EvalSplit("CUB_Birds_action_test", "cub.json", ACTION, 492, "0.5k"),
        EvalSplit("DocVQA_region_test", "docvqa.json", REGION, 888, "0.9k"),
        EvalSplit("DUDE_region_test", "dude.json", REGION, 603, "0.6k"),
        EvalSplit("Flickr30k_action_test", "flickr30k.json", ACTION, 1546, "1.5k"),
        EvalSplit("GQA_region_test", "gqa.json", REGION, 978, "978"),
        EvalSplit("OI_region_test", "openimages.json", REGION, 945, "1k"),
        EvalSplit("POPE_action_test", "coco_pope_*.json", ACTION, 3000, "3k"),
        EvalSplit("TextCap_region_test", "textcap.json", REGION, 853, "8.5k"),
        EvalSplit("TextVQA_region_test", "textvqa.json", REGION, 526, "0.5k"),
        EvalSplit("VSR_region_test", "vsr.json", REGION, 404, "0.4k"),
    )
}


@dataclass
class SplitsReport:
    """One build a split, and the splits whose source file was not there."""

    built: dict[str, BuildReport]
    absent: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        built = {name: report.to_dict() for name, report in self.built.items()}
        return {"built": built, "absent": self.absent}

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
        look = REGION if row.kind == REGION else action
        made = build(files[0], target / f"{row.name}.json", look=look, outside="clamp", **options)
        report.built[row.name] = made
        if made.items != row.count and options.get("limit") is None:
            made.note(f"items, where {row.count} questions were expected", f"{files[0]}: {made.items}")
    if not report.built:
        raise UserError(f"{source}: none of {', '.join(sorted(set(report.absent.values())))} is there")
    return report
