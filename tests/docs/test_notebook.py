"""examples/own_data.ipynb runs from top to bottom, as somebody runs it who opens it in the checkout."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from support import ROOT


@pytest.mark.slow
def test_the_notebook_of_own_data(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel", reason="needs relook[notebook]")
    pytest.importorskip("rapidocr_onnxruntime", reason="needs relook[ocr]", exc_type=ImportError)
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name in ("recipes", "zoo"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "examples").mkdir()
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    notebook = nbformat.read(ROOT / "examples/own_data.ipynb", as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(tmp_path / "examples")}}
    ).execute()
    printed = [
        out.get("text") or out["data"].get("text/plain", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for out in cell.outputs
        if out.output_type in ("stream", "display_data", "execute_result")
    ]
    said = "\n".join(printed)
    right, _, found, *_ = next(text for text in printed if "boxes, for" in text).split()
    assert int(right) >= 0.9 * int(found) > 20, "OCR finds answers where they were drawn"
    assert "auto" in said and "oracle" in said and "none" in said
    assert (tmp_path / "examples/own/run/final/config.json").is_file()
