"""Rows of a table with an image column: Hugging Face datasets (hub id, saved folder, Parquet), and rows in training.

Which column is which is seen from the usual names (`COLUMNS`), or given. Images come as the bytes they were stored as.
A build writes each once, named by its content, into a folder beside the items; otherwise they stay in memory.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from relook.data.items import COLUMNS, Question, column
from relook.data.records import import_datasets, is_saved_dataset, saved_dataset
from relook.errors import RelookError, UserError
from relook.files import reading
from relook.io import replacing_file


def row_question(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Question:
    """The question of a row (or record); its image may be an undecoded column, which stays in memory."""
    for ours in COLUMNS:
        if ours != "bboxs" and column(row, ours, columns) is None:
            raise UserError(f"{where}: has no {ours!r} among {', '.join(row)}; name it under columns:")
    image = stored_image(column(row, "image", columns), where)
    return Question.from_dict({**row, "image": image}, where, {k: v for k, v in columns.items() if k != "image"})


def stored_image(value: Any, where: str) -> Any:
    """An image entry; of an undecoded image column ({"bytes", "path"}) the path or a PIL image, which decodes later."""
    if not isinstance(value, dict) or not {"bytes", "path"} & set(value):
        return value
    return value.get("path") if value.get("bytes") is None else _pil(value["bytes"], where)


def _pil(data: Any, where: str) -> Any:
    from PIL import Image

    if not isinstance(data, bytes):
        raise UserError(f"{where}: 'bytes' of its image is a {type(data).__name__}; expected those of an image file")
    with reading(io.BytesIO(data), f"{where}: its image"):
        return Image.open(io.BytesIO(data))


# -- datasets of the hub


def read_hub(
    source: str | Path, split: str = "train", columns: Mapping[str, str] | None = None, folder: Path | None = None
) -> Iterator[Question]:
    """The questions of a dataset, lazily.

    Args:
        source: a hub id ("org/name"), a folder of a dataset, or a Parquet file.
        columns: our names to its own, where they are not the usual ones: {"question": "prompt_en"}.
        folder: where images are written; their paths are then NAME-OF-FOLDER/FILE. None keeps them in memory (PIL).

    Raises:
        UserError: no such column, or a row that is no question, with its number.
        RelookError: the dataset could not be had.
    """
    datasets = import_datasets(source)
    rows = _load(datasets, source, split)
    names = {ours: _column(ours, rows.column_names or [], columns or {}, source) for ours in COLUMNS}
    features = rows.features or {}
    feature, labels = features.get(names["image"]), features.get(names["answer"])
    if feature is not None and not isinstance(feature, datasets.Image | datasets.Value | dict):
        raise UserError(
            f"{source}: column {names['image']!r} is {type(feature).__name__}; expected one image a row; "
            "say --columns image=NAME, or write the set out as items"
        )
    for number, row in enumerate(rows.cast_column(names["image"], datasets.Image(decode=False)), start=1):
        where = f"{source}: row {number}"
        line = {ours: row[name] for ours, name in names.items() if name}
        answer = line["answer"]
        if isinstance(labels, datasets.ClassLabel) and isinstance(answer, int) and 0 <= answer < labels.num_classes:
            line["answer"] = labels.int2str(answer)
        elif isinstance(answer, int | float):
            line["answer"] = str(answer)
        data = _bytes(line["image"], Path(source), where)
        image = _pil(data, where)
        question = Question.from_dict(line | {"image": image}, where)
        yield question if folder is None else replace(question, image=_written(data, image, folder))


def _load(datasets: Any, source: str | Path, split: str) -> Any:
    _refuse_json(Path(source))
    try:
        if Path(source).is_file():
            return datasets.load_dataset("parquet", data_files=str(source), split="train", streaming=True)
        if is_saved_dataset(Path(source)):
            return saved_dataset(Path(source), split).to_iterable_dataset()
        return datasets.load_dataset(str(source), split=split, streaming=True)
    except UserError:
        raise
    except (ValueError, OSError, RuntimeError) as error:  # what datasets and the hub raise for what is not there
        kind = UserError if Path(source).exists() else RelookError  # a file that is none; a hub that does not answer
        raise kind(f"{source}: could not be loaded as a dataset ({' '.join(str(error).split())[:200]})") from error


def _refuse_json(folder: Path) -> None:
    """A folder of JSON files would load as one table of whatever is in them; one of them is what was meant."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    rows = [file.name for file in files if file.suffix in (".json", ".jsonl")]
    known = ("dataset_info.json", "dataset_dict.json", "metadata.jsonl")  # of datasets, and of folders of images
    if rows and not any(name in known for name in rows) and not any(folder.glob("**/*.parquet")):
        shown = ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
        raise UserError(f"{folder}: is a folder of files; give one of them: {shown}")


def _column(ours: str, there: list[str], given: Mapping[str, str], source: str | Path) -> str:
    """The dataset's name of a column; "" for boxes where there are none."""
    for name in (given[ours],) if ours in given else COLUMNS[ours]:
        if name in there:
            return name
    if ours == "bboxs" and ours not in given:
        return ""
    raise UserError(f"{source}: no column for {ours!r} among {', '.join(there)}; say --columns {ours}=NAME")


def _bytes(value: Any, source: Path, where: str) -> bytes:
    """The bytes of an image entry: stored, or of the file it names: from the dataset's folder, or an address (zip://)."""
    import fsspec

    data, path = (value or {}).get("bytes"), (value or {}).get("path")
    if data is not None:
        return data
    if not path:
        raise UserError(f"{where}: has no image")
    if "://" not in path and source.exists():
        path = str((source if source.is_dir() else source.parent) / path)
    try:
        with fsspec.open(path, "rb") as file:
            return bytes(file.read())
    except (OSError, ValueError, KeyError) as error:  # KeyError: no such member of an archive
        raise UserError(f"{where}: no image at {path} ({' '.join(str(error).split())[:100]})") from None


def _written(data: bytes, image: Any, folder: Path) -> str:
    """The path, from beside `folder`, of the file that holds these bytes; it is named by them and written once."""
    name = f"{hashlib.sha256(data).hexdigest()[:20]}.{(image.format or 'png').lower()}"
    if not (folder / name).exists():
        with replacing_file(folder / name) as aside:
            aside.write_bytes(data)
    return f"{folder.name}/{name}"
