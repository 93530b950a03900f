"""Hand-made evaluation records, folders of them, and a runner of the command line on them."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from relook.cli import app


def record(index: int, exact: float | None, image: str = "", look: str = "none", **changes) -> dict:
    """One record as `relook evaluate` writes it; `exact=None` is a failed one."""
    answered = exact is not None
    return {
        "task": "own",
        "look": look,
        "index": index,
        "where": f"own.jsonl:{index + 1}",
        "image": image or f"{index}.png",
        "field": "total" if index % 2 else "date",
        "question": "What is it?",
        "accepted": [f"answer {index}"],
        "boxes": [],
        "answer": "x" if answered else None,
        "scores": {"exact": exact, "anls": exact / 2} if exact is not None else {},
        "looks": [],
        "recall": None,
        "iou": None,
        "usage": {"lm_positions": 100 + index, "vision_patches": 8, "seconds": {"prefill": 0.1}} if answered else None,
        "transcript": [{"role": "user", "text": "What is it?", "sampled": False}] if answered else [],
        "seconds": 0.25,
        "failed": None if answered else "out of memory",
        "skipped": None,
        **changes,
    }


def save(folder: Path, records: list[dict], **run) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    (folder / "results.json").write_text(json.dumps({"run": run, "results": []}))
    return folder


def call(*argv: object, code: int = 0):
    result = CliRunner().invoke(app, [str(arg) for arg in argv])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result
