"""Rows of a table with an image column: Hugging Face datasets (hub id, saved folder, Parquet), and rows in training.

Which column is which is seen from the usual names (`COLUMNS`), or given. Images come as the bytes they were stored as.
A build writes each once, named by its content, into a folder beside the items; otherwise they stay in memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from relook.data.items import COLUMNS, IMAGE_KEYS, Item, LeftOut, Message, Question, column, missing
from relook.data.reader import import_pyarrow, parquet_files
from relook.data.records import import_datasets, is_saved_dataset, saved_dataset
from relook.errors import RelookError, UserError, naming
from relook.files import reading
from relook.io import replacing_file

CORNERS = (  # columns (or keys of a box) that are x1, y1, x2, y2
    ("x1", "y1", "x2", "y2"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("left", "top", "right", "bottom"),
)

SIDES = ("width", "height", "resized_width", "resized_height")


def row_question(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Question:
    """The question of a row (or record); its image may be an undecoded column, which stays in memory."""
    with naming(where):
        image, boxes = (column(row, ours, columns) for ours in ("image", "bboxs"))
        if image is None and "image" not in row:
            raise UserError(missing("image", row))
        if isinstance(image, list):
            if len(image) != 1:
                raise LeftOut(where, "form", f"{len(image)} images, and which one its boxes are of is not said")
            (image,) = image
        boxes = _row_box(row) if boxes is None else _boxes(boxes)
        sides = {key: _number(row[key]) for key in SIDES if isinstance(row.get(key), str)}
    line = {**row, **sides, "image": stored_image(image, where)} | ({} if boxes is None else {"bboxs": boxes})
    return Question.from_dict(line, where, {k: v for k, v in columns.items() if k not in ("image", "bboxs")})


def several_images(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Item | None:
    """The item of a row with several images and no box: all of them, the question, the answer; None for other rows."""
    with naming(where):
        images, boxes = (column(row, ours, columns) for ours in ("image", "bboxs"))
    if not isinstance(images, list) or len(images) < 2 or boxes:
        return None
    first = {k: v for k, v in columns.items() if k != "image"}
    question = Question.from_dict({**row, "image": stored_image(images[0], where)}, where, first)
    turns = (Message("user", f"{'<image>' * len(images)}\n{question.text}"), Message("assistant", question.answer))
    shown = tuple(stored_image(image, where) for image in images)
    return Item(turns, {key: shown if key == "images" else () for key in IMAGE_KEYS}, {}, where)


def has_corners(row: Mapping[str, Any]) -> bool:
    """Whether a row has columns that are a box."""
    return any(all(row.get(name) is not None for name in names) for names in CORNERS)


def _row_box(row: Mapping[str, Any]) -> Any:
    """The box in a row's own columns, None where it has none. What is half a box, or no corners, is refused."""
    if not has_corners(row):
        for names in CORNERS:
            there = [name for name in names if row.get(name) is not None]
            if len(there) > 1:
                lacking = ", ".join(name for name in names if name not in there)
                raise UserError(f"has {', '.join(there)} and no {lacking}; give all four, or none of them")
        for names in (("x", "y", "w", "h"), ("x", "y", "width", "height")):
            if all(row.get(name) is not None for name in names):
                units = "x1, y1, x2, y2 and say --units xywh"
                raise UserError(f"{', '.join(names)} are no corners; call these columns {units}")
    return _boxes(row)


def _boxes(value: Any) -> Any:
    """Boxes as lists of numbers: of a row's own corners, of objects with corners, of text ("[1, 2, 3, 4]", "1 2 3 4").

    None for a row without corners; what is no box comes out as it is.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = [_number(part) for part in re.split(r"[\s,;]+", value.strip())]
    if isinstance(value, Mapping):
        names = next((names for names in CORNERS if all(value.get(name) is not None for name in names)), None)
        return None if names is None else [[_number(value[name]) for name in names]]
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        found = [_boxes(each) for each in value]
        return value if None in found else [box for (box,) in found]
    return value


def _number(value: Any) -> Any:
    """A number that is written as text; other things as they are."""
    if not isinstance(value, str):
        return value
    try:
        return int(value) if value.strip().isdigit() else float(value)
    except ValueError as error:
        raise UserError(f"{error}; expected a number") from None


def stored_image(value: Any, where: str) -> Any:
    """An image entry; of an undecoded image column ({"bytes", "path"}) the path or a PIL image, which decodes later."""
    if not isinstance(value, dict) or not {"bytes", "path"} & set(value):
        return value
    return value.get("path") if value.get("bytes") is None else _pil(value["bytes"], where)


def _pil(data: Any, where: str) -> Any:
    from PIL import Image

    if not isinstance(data, bytes):
        raise UserError(f"{where}: 'bytes' of its image is a {type(data).__name__}; expected those of an image file")
    with reading(io.BytesIO(data), f"{where}: its image") as image:
        if image.format == "PDF":  # which Pillow does not open
            image.load()
            return image
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
    own = {ours: name for ours, name in (columns or {}).items() if ours != "image"}
    labels = {name: kind for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    feature = features.get(names["image"])
    if feature is not None and not isinstance(feature, datasets.Image | datasets.Value | dict):
        raise UserError(
            f"{source}: column {names['image']!r} is {type(feature).__name__}; expected one image a row; "
            "say --columns image=NAME, or write the set out as items"
        )
    for number, row in enumerate(rows.cast_column(names["image"], datasets.Image(decode=False)), start=1):
        where = f"{source}: row {number}"
        data = _bytes(row[names["image"]], Path(source), where)
        image = _pil(data, where)
        classes = {name: _class_name(kind, row[name]) for name, kind in labels.items()}
        question = row_question({**row, **classes, "image": image}, own, where)
        yield question if folder is None else replace(question, image=write_image(data, image, folder))


def _class_name(kind: Any, value: Any) -> Any:
    """The name of a class label; what is none (-1, null) as it is."""
    return kind.int2str(value) if isinstance(value, int) and 0 <= value < kind.num_classes else value


def class_names(path: Path, split: str) -> dict[str, list[str]]:
    """The columns of a dataset (Parquet, or a saved one) that hold class labels, with the classes' names."""
    datasets = import_datasets(path)
    if is_saved_dataset(path):
        features = saved_dataset(path, split).features
    elif files := parquet_files(path):
        features = datasets.Features.from_arrow_schema(import_pyarrow()[1].read_schema(files[0]))
    else:
        return {}
    return {name: kind.names for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}


def _load(datasets: Any, source: str | Path, split: str) -> Any:
    _refuse_json(Path(source))
    try:
        if Path(source).is_file():
            if Path(source).suffix != ".parquet":
                raise UserError(f"{source}: is no dataset but a {Path(source).suffix} file; leave out --format hub")
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


def write_image(data: bytes, image: Any, folder: Path) -> str:
    """The path, from beside `folder`, of the file that holds these bytes; it is named by them and written once."""
    name = f"{hashlib.sha256(data).hexdigest()[:20]}.{(image.format or 'png').lower()}"
    if not (folder / name).exists():
        with replacing_file(folder / name) as aside:
            aside.write_bytes(data)
    return f"{folder.name}/{name}"
