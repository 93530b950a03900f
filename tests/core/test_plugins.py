"""Plugins: user-defined rows found by dotted path and by entry point, and the error where the zoo is not installed."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from support.synthetic import TASK
from typer.testing import CliRunner

from relook import plugins
from relook.cli import app
from relook.errors import UserError


def installed(monkeypatch, **rows: str) -> None:
    """Pretend that the packages installed here have these entry points, whatever their group."""
    entries = [EntryPoint(name, value, "relook.tasks") for name, value in rows.items()]
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries)


def test_a_row_is_found_in_the_table_by_entry_point_and_by_dotted_path(monkeypatch):
    installed(monkeypatch, pages="support.synthetic:TASK")
    assert plugins.find("task", "mine", {"mine": 7}) == 7
    assert plugins.find("task", "mine", {"mine": "support.synthetic:TASK"}) is TASK
    assert plugins.find("task", "pages", {}) is plugins.find("task", "support.synthetic:TASK", {}) is TASK
    assert plugins.names("task", {"mine": 7}) == ["mine", "pages"]


def test_relooks_own_rows_come_before_installed_ones(monkeypatch):
    installed(monkeypatch, mine="support.synthetic:TASK")
    assert plugins.find("task", "mine", {"mine": 7}) == 7


def test_a_module_in_the_working_directory_is_found(monkeypatch, tmp_path: Path):
    (tmp_path / "row_of_a_user.py").write_text("ROW = 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [place for place in sys.path if place])  # as for an installed command
    assert plugins.find("task", "row_of_a_user:ROW", {}) == 7


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("page", "did you mean 'pages'"),
        ("support.synthetic:NO_SUCH", "NO_SUCH"),
        ("no.such.module:TASK", "no.such.module:TASK"),
        ("gone", "'gone' cannot be imported"),
        (":", "cannot be imported"),
    ],
)
def test_what_cannot_be_found_is_said_with_the_nearest_name(monkeypatch, name, words):
    installed(monkeypatch, pages="support.synthetic:TASK", gone="uninstalled.package:TASK")
    with pytest.raises(UserError, match=words):
        plugins.find("task", name, {})


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "-m", "cards-tiny", "--tasks", "cards"],
        ["models", "assemble", "text", "target", "--vision", "cards-tiny"],
        ["train", "zoo/recipes/cards-tiny.yaml"],
    ],
)
def test_from_a_wheel_the_checkout_is_named(monkeypatch, tmp_path: Path, command):
    """Without the zoo, what only a checkout can do ends with exit code 2 and says so."""
    installed(monkeypatch)
    command = [str(Path(__file__).parents[2] / part) if part.endswith(".yaml") else part for part in command]
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and "checkout" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "-m", "cards-tiny", "--tasks", "support.synthetic:TINY"],
        ["train", "own.yaml", "stages.tune.objective=support.synthetic:Pages"],
        ["train", "own.yaml", "data.world=support.synthetic:TASK"],
        ["train", "own.yaml", "model.size=support.synthetic:TASK"],
    ],
)
def test_a_row_of_another_kind_is_an_error_of_one_line(monkeypatch, tmp_path: Path, command):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(
        "{name: r, model: {size: 'support.synthetic:TINY'}, data: {world: 'support.synthetic:Pages'},"
        " stages: [{name: tune, objective: 'support.synthetic:Dialogues', samples: 1}]}"
    )
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and " and no " in done.stderr and done.stderr.count("\n") == 1
