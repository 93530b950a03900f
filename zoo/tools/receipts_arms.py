"""Train all settings of zoo/receipts.md, evaluate them on the same questions, and write the table and the figures.

    python zoo/tools/receipts_arms.py                          all settings, seed 1
    python zoo/tools/receipts_arms.py --arms region direct --seeds 1 2 3 --minutes 9

Finished stages and evaluations are skipped, so the command can be interrupted and repeated; after `--minutes` it starts
nothing new. Settings, looks and tasks are read from zoo/tools/receipts_arms.yaml; further KEY=VALUE arguments go to the
recipe of every setting. A scale without a `tower:` trains a vision encoder first.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCS = Path("zoo/receipts")


def main() -> None:
    plan = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=plan["arms"], default=list(plan["arms"]))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--scale", choices=plan["scales"], default="tiny")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing new after this time")
    parser.add_argument("--only", choices=("train", "ask"), help="one half of the work (two machines, two cores)")
    parser.add_argument("--no-report", action="store_true", help="train and ask only")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for the recipe of every arm")
    options = parser.parse_args()
    work = Arms(plan, options.scale, options.overrides)
    end = time.monotonic() + 60 * options.minutes
    jobs = [("tower", work.train_tower, ())]
    for seed in options.seeds:
        for name in options.arms:
            halves = {"train": work.train, "ask": work.ask}
            jobs += [
                (f"{name}, seed {seed}", do, (name, seed)) for k, do in halves.items() if options.only in (None, k)
            ]
    for title, job, arguments in jobs:
        if time.monotonic() > end:
            sys.exit(f"out of time before {title}; give the command again to go on")
        job(*arguments)
    if not options.no_report and options.scale == "tiny":
        relook("report", DOCS / "arms.yaml", "--out", DOCS, "--no-page")


class Arms:
    """The jobs of one scale; each writes its result to a folder and is skipped if that exists."""

    def __init__(self, plan: dict[str, Any], scale: str, overrides: list[str]) -> None:
        self.plan, self.sizes, self.overrides = plan, plan["scales"][scale], overrides
        self.tower = Path(self.sizes.get("tower", f"runs/receipts-tower-{scale}/final"))
        self.runs = Path(f"runs/receipts-arms-{scale}")
        self.records = DOCS / "records" if scale == "tiny" else self.runs / "records"

    def train_tower(self) -> None:
        if "tower" not in self.sizes and not (ROOT / self.tower / "model.safetensors").is_file():
            relook("train", self.plan["tower"], f"model.size={self.sizes['small']}", f"out={self.tower.parent}")

    def train(self, name: str, seed: int) -> None:
        arm = self.plan["arms"][name]
        changes = {
            **arm["set"],
            **{f"stages.{stage}.seed": seed for stage in self.plan["seeded"]},
            "model.size": self.sizes[arm.get("size", "small")],
            "model.visual": str(self.tower),
        }
        written = [f"{key}={yaml.safe_dump(value, default_flow_style=True).strip()}" for key, value in changes.items()]
        written = [text.removesuffix("\n...") for text in written]  # YAML's end marker of a scalar document
        self.take_over(name, seed)
        relook("train", self.plan["recipe"], *written, *self.overrides, f"out={self.folder(name, seed)}")

    def take_over(self, name: str, seed: int) -> None:
        """Copy the stages that all settings of a size share from a run that has finished them."""
        mine = ROOT / self.folder(name, seed) / "stages"
        arms = self.plan["arms"]
        alike = [other for other in arms if arms[other].get("size") == arms[name].get("size")]
        for other in alike:
            for done in sorted((ROOT / self.runs).glob(f"{other}-s*/stages/*/done.json")):
                common = done.parent.name.partition("-")[2] not in self.plan["seeded"]
                if common and not (mine / done.parent.name).exists():
                    shutil.copytree(done.parent, mine / done.parent.name)

    def ask(self, name: str, seed: int) -> None:
        """Evaluate a setting and keep its records beside the report."""
        if (ROOT / self.records / f"{name}-s{seed}" / "results.json").is_file():
            return
        folder = self.folder(name, seed)
        out = folder / "evaluation" / folder.name
        looks, plan = self.plan["arms"][name]["looks"], self.plan
        asked = ["--tasks", *plan["tasks"], "--looks", *looks, "--n", plan["n"]]
        relook("evaluate", "-m", folder / "final", *asked, "--out", out)
        relook("report", out, "--keep", self.records)

    def folder(self, name: str, seed: int) -> Path:
        return self.runs / f"{name}-s{seed}"


def relook(*arguments: Any) -> None:
    command = [sys.executable, "-m", "relook", *map(str, arguments)]
    print("+ relook", *command[3:], file=sys.stderr, flush=True)
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(f"stopped: relook {' '.join(command[3:])} failed")


if __name__ == "__main__":
    main()
