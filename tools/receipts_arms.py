"""Trains the arms of docs/receipts.md, asks each of them the same questions, and writes the table and the figures.

    python tools/receipts_arms.py                          all arms, seed 1
    python tools/receipts_arms.py --arms region direct --seeds 1 2 3 --minutes 9

What is finished is skipped (a stage of training, an evaluation), so the command can be stopped and given again; with
`--minutes` it starts nothing new after that time. Arms, looks and tasks are recipes/receipts-arms.yaml's; further
KEY=VALUE go to every recipe, for another scale or machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
RUNS, DOCS = Path("runs/receipts-arms"), Path("docs/receipts")


def main() -> None:
    plan = yaml.safe_load((ROOT / "recipes/receipts-arms.yaml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=plan["arms"], default=list(plan["arms"]))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing new after this time")
    parser.add_argument("--no-report", action="store_true", help="train and ask only (another process reports)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every recipe")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    for seed in options.seeds:
        for name in options.arms:
            if time.monotonic() > end:
                sys.exit(f"out of time before {name}, seed {seed}; give the command again to go on")
            model = train(plan, name, seed, options.overrides)
            ask(plan, name, seed, model)
    if not options.no_report:
        relook("report", DOCS / "arms.yaml", "--out", DOCS)


def train(plan: dict[str, Any], name: str, seed: int, overrides: list[str]) -> Path:
    """The folder of an arm's finished model."""
    folder = RUNS / f"{name}-s{seed}"
    changes = [f"{key}={yaml.safe_dump(value, default_flow_style=True).strip()}" for key, value in set_by(plan, name)]
    relook("train", plan["recipe"], *changes, f"seed={seed}", *overrides, f"out={folder}")
    return folder / "final"


def set_by(plan: dict[str, Any], name: str) -> list[tuple[str, Any]]:
    return list(plan["arms"][name]["set"].items())


def ask(plan: dict[str, Any], name: str, seed: int, model: Path) -> None:
    """Evaluate an arm and keep its records beside the report, unless they are there."""
    kept = DOCS / "records" / f"{name}-s{seed}"
    if (kept / "results.json").is_file():
        return
    folder = RUNS / kept.name / "evaluation" / kept.name
    looks = plan["arms"][name]["looks"]
    relook("evaluate", "-m", model, "--tasks", *plan["tasks"], "--looks", *looks, "--n", plan["n"], "--out", folder)
    relook("report", folder, "--keep", DOCS / "records")


def relook(*arguments: Any) -> None:
    command = [sys.executable, "-m", "relook", *map(str, arguments)]
    print("+ relook", *command[3:], file=sys.stderr, flush=True)
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(f"stopped: {' '.join(command[3:])} failed")


if __name__ == "__main__":
    main()
