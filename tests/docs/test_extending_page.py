"""docs/extending.md: its example module imports from the working directory, and its commands run."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
import tomllib

import pytest
from support import ROOT
from typer.testing import CliRunner

from relook.cli import app

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[0]


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """The page's module, written into an empty folder that is the working directory."""
    (tmp_path / "shapes.py").write_text(block("python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("shapes")
    sys.modules.pop("shapes", None)


def test_the_task_is_evaluated_and_its_dataset_is_a_function_of_the_seed(shapes):
    (command,) = re.findall(r"^\$ PYTHONPATH=\. relook (evaluate .*)$", PAGE, re.MULTILINE)
    done = CliRunner().invoke(app, [*shlex.split(command), "--n", "2"])
    assert done.exit_code == 0, done.output
    assert "shapes" in done.stdout and "exact" in done.stdout
    one, again, other = (shapes.Shapes(seed).question(3) for seed in (1, 1, 2))
    assert one.boxes == again.boxes and one.image.tobytes() == again.image.tobytes()
    assert one.image.tobytes() != other.image.tobytes()


def test_the_size_is_a_model(shapes):
    from relook.model.new import build

    model, processor = build("shapes:SIZE", seed=1)
    assert model.config.text_config.hidden_size == 48
    assert len(processor.tokenizer.tokenize("What color is the square?")) < 8


def test_entry_points_name_what_the_module_has(shapes):
    for group, rows in tomllib.loads(block("toml"))["project"]["entry-points"].items():
        assert group in PAGE.split("## Entry points")[0]
        for path in rows.values():
            module, _, attribute = path.partition(":")
            assert module == "shapes" and hasattr(shapes, attribute)
