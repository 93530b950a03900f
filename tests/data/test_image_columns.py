"""Files of other kinds in image columns: built as they are asked."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from support.item_folder import call
from support.scripted_model import picture

from relook.views import open_image


@pytest.mark.parametrize("form", [[], ["--format", "hub"]])
def test_a_pdf_in_a_column_is_built_as_it_is_asked(tmp_path, form):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("pypdfium2")
    file = io.BytesIO()
    picture().save(file, "PDF")
    image = {"bytes": file.getvalue(), "path": "a.pdf"}
    row = {"image": image, "question": "Q?", "answer": "A", "bboxs": [[1, 2, 30, 40]]}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "q.parquet")
    call("data", "build", tmp_path / "q.parquet", tmp_path / "items.json", *form)
    (item,) = json.loads((tmp_path / "items.json").read_text())
    assert item["images"][0].endswith(".pdf")
    assert np.array_equal(open_image(tmp_path / item["images"][0]), open_image(file))
