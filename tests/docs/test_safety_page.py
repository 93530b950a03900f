"""docs/safety.md names every limit with its default."""

import re

import pytest
from support import ROOT
from typer.testing import CliRunner

from relook.cli import app
from relook.serve.fetch import FetchSettings
from relook.serve.limits import Limits
from relook.serve.security import SecuritySettings

PAGE = (ROOT / "docs" / "safety.md").read_text(encoding="utf-8")


def test_limits() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", PAGE, re.MULTILINE)
    written = {name: None if default == "the model's" else float(default.replace(",", "")) for name, default in rows}
    assert written == Limits().model_dump()


def test_other_numbers() -> None:
    settings = FetchSettings()
    assert settings.bytes == 20 * 2**20 and settings.seconds == 10 and settings.redirects == 3
    assert not settings.hosts and not SecuritySettings().keys and not SecuritySettings().origins


@pytest.mark.parametrize("wrong", ["imags=3", "images", "images=x", "images=0", "=", "seconds=inf=3"])
def test_a_wrong_limit_is_one_line(wrong) -> None:
    result = CliRunner().invoke(app, ["serve", "--port", "0", "--limit", wrong])
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
