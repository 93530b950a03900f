"""Hugging Face datasets with an image column: a hub id, a saved folder, or parquet files, streamed.

Images come as the bytes they were stored as. A build writes each once, named by its content, into a folder beside the
items; otherwise they stay in memory. Which column is what is seen from the usual names, or told.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from relook.data.questions import Question
from relook.errors import RelookError, UserError

COLUMNS: dict[str, tuple[str, ...]] = {  # ours: the names that others give it
    "image": ("image", "img", "picture"),
    "question": ("question", "query", "text", "caption", "prompt"),
    "answer": ("answer", "answers", "label", "response"),
    "bboxs": ("bboxs", "bboxes", "bbox", "boxes", "box"),
}


def read_hub(
    source: str | Path, split: str = "train", columns: Mapping[str, str] | None = None, folder: Path | None = None
) -> Iterator[Question]:
    """The questions of a dataset, lazily.

    Args:
        source: a hub id ("org/name"), a folder of a dataset, or a parquet file.
        columns: our names to its own, where they are not the usual ones: {"question": "prompt_en"}.
        folder: where images are written; their paths are then NAME-OF-FOLDER/FILE. None keeps them in memory (PIL).

    Raises:
        UserError: no such column, or a row that is no question, with its number.
        RelookError: the dataset could not be had.
    """
    try:
        from datasets import ClassLabel, Image
    except ImportError:
        raise UserError(
            f"{source}: needs the package datasets, which is not installed; pip install 'relook[train]'"
        ) from None
    rows = _load(source, split)
    names = {ours: _column(ours, rows.column_names or [], columns or {}, source) for ours in COLUMNS}
    features = rows.features or {}
    _refuse_lists(features.get(names["image"]), names["image"], source)
    labels = features.get(names["answer"])
    rows = rows.cast_column(names["image"], Image(decode=False))
    for number, row in enumerate(rows, start=1):
        where = f"{source}: row {number}"
        boxes = row.get(names["bboxs"]) if names["bboxs"] else None
        if boxes and not isinstance(boxes[0], list):
            boxes = [boxes]
        answer = row.get(names["answer"])
        if isinstance(labels, ClassLabel) and isinstance(answer, int) and 0 <= answer < labels.num_classes:
            answer = labels.int2str(answer)
        line = {"image": "-", "question": row.get(names["question"]), "bboxs": boxes}
        question = Question.from_dict(
            line | {"answer": answer if answer is None or isinstance(answer, list) else str(answer)}, where
        )
        yield Question(
            _image(row[names["image"]], Path(source), folder, where),
            question.text,
            question.answers,
            question.boxes,
            where=where,
        )


def _load(source: str | Path, split: str) -> Any:
    from datasets import load_dataset, load_from_disk

    _refuse_json(Path(source))
    try:
        if Path(source).is_file():
            return load_dataset("parquet", data_files=str(source), split="train", streaming=True)
        if (Path(source) / "dataset_info.json").is_file():
            return load_from_disk(str(source)).to_iterable_dataset()
        if (Path(source) / "dataset_dict.json").is_file():
            parts = load_from_disk(str(source))
            if split not in parts:
                raise UserError(f"{source}: has no split {split!r}; its splits: {', '.join(parts)}")
            return parts[split].to_iterable_dataset()
        return load_dataset(str(source), split=split, streaming=True)
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


def _column(ours: str, there: list[str], told: Mapping[str, str], source: str | Path) -> str:
    """The dataset's name of a column; "" for boxes where there are none."""
    wanted = (told[ours],) if ours in told else COLUMNS[ours]
    for name in wanted:
        if name in there:
            return name
    if ours == "bboxs" and ours not in told:
        return ""
    raise UserError(f"{source}: no column for {ours!r} among {', '.join(there)}; say --columns {ours}=NAME")


def _refuse_lists(feature: Any, name: str, source: str | Path) -> None:
    from datasets import Image, Value

    if feature is not None and not isinstance(feature, Image | Value | dict):
        raise UserError(
            f"{source}: column {name!r} is {type(feature).__name__}; expected one image a row; "
            "say --columns image=NAME, or write the set out as items"
        )


def _stored(path: str, source: Path, where: str) -> bytes:
    """The bytes of an image that a dataset names: a path from its own folder, or an address (hf://, zip://)."""
    import fsspec

    if "://" not in path and source.exists():
        path = str((source if source.is_dir() else source.parent) / path)
    try:
        with fsspec.open(path, "rb") as file:
            return bytes(file.read())
    except (OSError, ValueError, KeyError) as error:  # KeyError: no such member of an archive
        raise UserError(f"{where}: no image at {path} ({' '.join(str(error).split())[:100]})") from None


def _image(value: Any, source: Path, folder: Path | None, where: str) -> Any:
    """A PIL image, or the path of the file that now holds its bytes."""
    from PIL import Image, UnidentifiedImageError

    data = (value or {}).get("bytes")
    if data is None and (value or {}).get("path"):
        data = _stored(value["path"], source, where)
    if data is None:
        raise UserError(f"{where}: has no image")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise UserError(f"{where}: its image cannot be read") from None
    if folder is None:
        return image
    name = f"{hashlib.sha256(data).hexdigest()[:20]}.{(image.format or 'png').lower()}"
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f"{name}.part"
        aside.write_bytes(data)
        os.replace(aside, path)
    return f"{folder.name}/{name}"
