"""docs/extending.md: its example module imports from the working directory, and its commands run."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
import tomllib

import pytest
from support import ROOT
from typer.testing import CliRunner

from relook.cli import app

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")


def blocks(language: str) -> str:
    """All code blocks of a language, one after the other."""
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """The page's module, written into an empty folder that is the working directory."""
    (tmp_path / "shapes.py").write_text(blocks("python"))
    (tmp_path / "shapes.yaml").write_text(blocks("yaml"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("shapes")
    sys.modules.pop("shapes", None)


def test_the_task_is_evaluated_and_its_dataset_is_a_function_of_the_seed(shapes):
    (command,) = re.findall(r"^\$ relook (evaluate .*)$", PAGE, re.MULTILINE)
    done = CliRunner().invoke(app, [*shlex.split(command), "--n", "2"])
    assert done.exit_code == 0, done.output
    assert "shapes" in done.stdout and "exact" in done.stdout
    one, again, other = (shapes.Shapes(seed).question(3) for seed in (1, 1, 2))
    assert one.boxes == again.boxes and one.image.tobytes() == again.image.tobytes()
    assert one.image.tobytes() != other.image.tobytes()


def test_the_objective_trains_the_size_on_the_dataset(shapes, tmp_path):
    (command,) = re.findall(r"^\$ relook (train .*)$", PAGE, re.MULTILINE)
    short = ["stages.learn.samples=8", "stages.learn.batch=4", "evaluate_every=2"]
    done = CliRunner().invoke(app, [*shlex.split(command), *short])
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "runs/shapes/final/config.json").read_text())
    assert config["text_config"]["hidden_size"] == 48
    log = [json.loads(line) for line in (tmp_path / "runs/shapes/log.jsonl").read_text().splitlines()]
    assert any("eval_loss" in entry for entry in log) and any("token_x0" in entry for entry in log)


def test_an_option_that_the_objective_lacks_is_an_error(shapes):
    done = CliRunner().invoke(app, ["train", "shapes.yaml", "stages.learn.options.lok=clip"])
    assert done.exit_code == 2 and "look" in done.output


def test_entry_points_name_what_the_module_has(shapes):
    for group, rows in tomllib.loads(blocks("toml"))["project"]["entry-points"].items():
        assert group in PAGE.split("## Entry points")[0]
        for path in rows.values():
            module, _, attribute = path.partition(":")
            assert module == "shapes" and hasattr(shapes, attribute)
