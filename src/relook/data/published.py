"""What others have published, as tables (`published.yaml`): sets of data, their image sets, evaluation splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relook.errors import RelookError, UserError
from relook.io import read_yaml


@dataclass(frozen=True)
class Archive:
    """One file to download: its name, size in words or bytes and checksum ("md5:..."), and whose figures these are."""

    name: str
    size: str | None = None
    bytes: int | None = None
    checksum: str | None = None
    by: str = ""


@dataclass(frozen=True)
class ImageSet:
    """An image set. `aliases`: folder names (lower case) by which published paths call it; `images`: how many files."""

    name: str
    title: str
    page: str
    archives: tuple[Archive, ...]
    aliases: tuple[str, ...]
    images: int | None = None
    licence: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Source:
    """A published set: where it is, what is in it, and which image sets it needs (None: not published)."""

    name: str
    format: str
    hub: str
    file: str
    stage: str  # instruct | align | any
    use: str  # train | eval
    samples: str
    looks: tuple[str, ...]
    images: tuple[str, ...] | None
    licence: str | None


@dataclass(frozen=True)
class EvalSplit:
    """A split: region or action (`kind`), questions in its source (`count`), what the README says (`stated`)."""

    name: str
    file: str
    kind: str
    count: int
    stated: str


def _typed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}


_TABLES = read_yaml(Path(__file__).with_name("published.yaml"))
IMAGE_SETS: dict[str, ImageSet] = {
    name: ImageSet(name, **_typed(row | {"archives": [Archive(**each) for each in row.get("archives", ())]}))
    for name, row in _TABLES["image_sets"].items()
}
SOURCES: dict[str, Source] = {name: Source(name, **_typed(row)) for name, row in _TABLES["sources"].items()}
EVAL_SPLITS: dict[str, EvalSplit] = {name: EvalSplit(name, **row) for name, row in _TABLES["splits"].items()}


def fetch(source: str | Path) -> str | Path:
    """The source as it is, or the downloaded file where it is the name of a published set and no file of that name."""
    row = SOURCES.get(str(source))
    if row is None or Path(source).exists():
        return source
    if "://" in row.hub or row.file.endswith("/"):
        raise UserError(f"{row.name} is several files: get {row.file} of {row.hub}, and give one of them")
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(row.hub, row.file, repo_type="dataset")
    except (OSError, ValueError) as error:  # what the hub raises without a network, a file, or the right to it
        raise RelookError(
            f"{row.file} of {row.hub} could not be downloaded ({' '.join(str(error).split())[:160]})"
        ) from error


def dataset_of(path: str, names: tuple[str, ...] = ()) -> str | None:
    """The image set (or one of `names`) that a published path belongs to, by its deepest telling folder; else None.

    >>> dataset_of("/root/data/cot/gqa/images/1.jpg"), dataset_of("/a/coco/train2017/1.jpg"), dataset_of("x/1.jpg")
    ('gqa', 'coco', None)
    """
    known = {alias: row.name for row in IMAGE_SETS.values() for alias in row.aliases} | {name: name for name in names}
    folders = path.replace("\\", "/").split("/")[:-1]
    return next((known[part.lower()] for part in reversed(folders) if part.lower() in known), None)


def parse_folders(pairs: list[str]) -> dict[str, Path]:
    """`["coco=/data/coco", "gqa=/data/gqa"]` as folders by dataset. Names beyond the eleven stand for themselves."""
    folders: dict[str, Path] = {}
    for pair in pairs:
        name, sign, folder = pair.partition("=")
        if not sign or not name or not folder:
            raise UserError(f"--images {pair!r}: expected NAME=FOLDER; names: {', '.join(IMAGE_SETS)}")
        if not Path(folder).is_dir():
            raise UserError(f"--images {pair}: {folder} is not a folder; give the folder with the images of {name}")
        folders[name.lower()] = Path(folder)
    return folders


def listing(formats: Mapping[str, str]) -> dict[str, Any]:
    """Sources (with the pages of their images) and file formats (name -> what it is), for machines."""
    rows = [vars(row) | {"pages": [IMAGE_SETS[name].page for name in row.images or ()]} for row in SOURCES.values()]
    return {"sources": rows, "formats": [{"name": name, "what": what} for name, what in formats.items()]}


def table(formats: Mapping[str, str]) -> str:
    """The same for people: the sources under where they are published and their licence."""
    groups: dict[str, list[tuple[str, ...]]] = {"": [("", "samples", "stage", "use", "looks", "images")]}
    for row in SOURCES.values():
        images = "not published" if row.images is None else " ".join(row.images)
        line = (f"  {row.name}", row.samples, row.stage, row.use, "/".join(row.looks) or "-", images)
        groups.setdefault(f"{row.hub} (licence: {row.licence or 'not published'})", []).append(line)
    widths = [
        max(map(len, column)) for column in zip(*(line for group in groups.values() for line in group), strict=True)
    ]
    out: list[str] = []
    for title, group in groups.items():
        out += [title] if title else []
        out += ["  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in group]
    out += ["", "images from", *(f"  {row.name:10} {row.page}" for row in IMAGE_SETS.values())]
    out += ["", "forms of file", *(f"  {name:10} {what}" for name, what in formats.items())]
    return "\n".join(out)


def image_rows() -> list[dict[str, Any]]:
    """The image sets for machines; null where nothing is published."""
    return [asdict(row) for row in IMAGE_SETS.values()]


def image_table() -> str:
    """The image sets for people: page, number of images, licence, archives."""
    lines = []
    for row in IMAGE_SETS.values():
        note = f"; {row.note}" if row.note else ""
        lines.append(f"{row.name}  {row.title}  {row.page}")
        lines.append(f"    images: {row.images or 'not published'}; licence: {row.licence or 'see the page'}{note}")
        for archive in row.archives:
            size = f"{archive.size} ({archive.by})" if archive.size else "size not published"
            lines.append(f"    {archive.name}  {size}  {archive.checksum or 'checksum not published'}")
    return "\n".join(lines)
