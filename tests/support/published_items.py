"""The items recorded from the published data pipeline."""

from __future__ import annotations

import json

import pytest

from support import ROOT

PIPELINE = next(
    (
        folder
        for folder in (ROOT / "tests/fixtures/parity/data", ROOT / "../shared/parity/data")
        if (folder / "data_pipeline.json").is_file()
    ),
    None,
)

needs_pipeline = pytest.mark.skipif(PIPELINE is None, reason="no data_pipeline.json in the fixtures or ../shared")


def recorded_samples() -> dict[str, dict]:
    """The recorded samples by name."""
    assert PIPELINE is not None
    data = json.loads((PIPELINE / "data_pipeline.json").read_text(encoding="utf-8"))
    return {sample["name"]: sample for sample in data["samples"]}
