"""Where data comes from: the published sets, the forms of file that can be read, and one way to read them all.

`SOURCES` are published sets, a row each: the 18 splits of spec.md section 8, Visual-CoT, and what others publish that
fits. `FORMATS` are the forms, a row each: how a file is recognised and which function reads it. `read` yields the same
typed things from every form, one at a time: a `Question` (from which the builder makes items), or an `Item` where the
source holds whole conversations.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relook.data.boxed import VG_LISTS, read_coco, read_visual_genome
from relook.data.formats import Found, llava, pope
from relook.data.hub import read_hub
from relook.data.images import IMAGE_SETS, ImageFinder
from relook.data.items import Item, place_image, split_ref
from relook.data.questions import Question, file_size, placed
from relook.data.records import open_input, read_records
from relook.data.remap import relative
from relook.data.stream import holds_items, parquet_files, read_rows
from relook.data.viscot import viscot_question
from relook.errors import RelookError, UserError
from relook.regions import join_crop_suffix

VPT, VISCOT = "rp-yu/VPT_Datasets", "deepcs233/Visual-CoT"
PEEK = 1 << 20  # bytes read to see what a file is


@dataclass(frozen=True)
class Format:
    """One form of file. `seen`: whether a file's first record is of this form (after the rows above it)."""

    name: str
    what: str
    read: Callable[[Path], Iterator[Found]]
    seen: Callable[[dict[str, Any]], bool]


def _records(parse: Callable[[dict[str, Any], str], Found]) -> Callable[[Path], Iterator[Found]]:
    """A reader of a list of records of which `parse` makes one thing each."""

    def read_all(path: Path) -> Iterator[Found]:
        for row in read_rows(path):  # Parquet of items too
            yield parse(row.value, row.where)

    return read_all


def _viscot(data: dict[str, Any]) -> bool:
    images = data.get("image")
    return isinstance(images, list) and len(images) == 2 and "###" in str(images[1])


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("items", '{"messages", "images", ...}', _records(Item.from_dict), lambda data: "messages" in data),
        Format("viscot", '{"image": [path, path###[box]], "conversations"}', _records(viscot_question), _viscot),
        Format("llava", '{"image", "conversations"}', _records(llava), lambda data: "conversations" in data),
        Format("coco", '{"images", "annotations", "categories"}', read_coco, lambda data: "annotations" in data),
        Format(
            "vg",
            '{"regions"}, {"objects"} or {"qas"}',
            read_visual_genome,
            lambda data: bool({*VG_LISTS} & data.keys()),
        ),
        Format("pope", '{"image", "text", "label"}', _records(pope), lambda data: {"text", "label"} <= data.keys()),
        Format(
            "questions",
            '{"image", "question", "answer", "bboxs"}',
            _records(Question.from_dict),
            lambda data: "question" in data,
        ),
        Format("hub", "a dataset with an image column: hub id, folder, parquet", read_hub, lambda data: False),
    )
}


@dataclass(frozen=True)
class Source:
    """One published set: where it is, what is in it, and which image sets it needs (None: not published)."""

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


_MIX = (
    "coco",
    "cub",
    "docvqa",
    "gqa",
    "ocrvqa",
    "openimage",
    "textvqa",
    "vg",
    "vsr",
)  # section 8 less the starred sets
_COT = ("cub", "docvqa", "dude", "flickr30k", "gqa", "openimage", "textvqa", "vsr")  # and sets beyond the eleven


def _split(
    name: str, stage: str, use: str, samples: str, looks: tuple[str, ...], images: tuple[str, ...] | None
) -> Source:
    return Source(name, "items", VPT, f"{name}.json", stage, use, samples, looks, images, "apache-2.0")


SOURCES: dict[str, Source] = {
    row.name: row
    for row in (
        _split("MixVRT_CLIP_Full", "instruct", "train", "829k", ("region", "clip"), _MIX),
        _split("MixVRT_Detection_Full", "instruct", "train", "829k", ("region", "detection"), _MIX),
        _split("MixVRT_Seg_Full", "instruct", "train", "829k", ("region", "seg"), _MIX),
        _split("llava_alignment_detection_qwen_response_train", "align", "train", "585k", ("detection",), None),
        _split("llava_alignment_seg_qwen_response_train", "align", "train", "585k", ("seg",), None),
        _split("llava_alignment_detection_qwen_response_eval", "align", "eval", "5k", ("detection",), None),
        _split("llava_alignment_seg_qwen_response_eval", "align", "eval", "5k", ("seg",), None),
        _split("CUB_Birds_action_test", "instruct", "eval", "0.5k", ("clip", "detection", "seg"), ("cub",)),
        _split("DocVQA_region_test", "instruct", "eval", "0.9k", ("region",), ("docvqa",)),
        _split("DUDE_region_test", "instruct", "eval", "0.6k", ("region",), ("dude",)),
        _split("Flickr30k_action_test", "instruct", "eval", "1.5k", ("clip", "detection", "seg"), ("flickr30k",)),
        _split("LLaVA_COCO_free_action_test", "instruct", "eval", "1k", ("clip", "detection", "seg"), ("coco",)),
        _split("LLaVA_COCO_single_action_test", "instruct", "eval", "1k", ("clip", "detection", "seg"), ("coco",)),
        _split("OI_region_test", "instruct", "eval", "1k", ("region",), ("openimage",)),
        _split("POPE_action_test", "instruct", "eval", "3k", ("clip", "detection", "seg"), ("coco",)),
        _split("TextCap_region_test", "instruct", "eval", "853 (8.5k stated)", ("region",), ("textvqa",)),
        _split("TextVQA_region_test", "instruct", "eval", "0.5k", ("region",), ("textvqa",)),
        _split("VSR_region_test", "instruct", "eval", "0.4k", ("region",), ("vsr",)),
        Source("viscot_363k", "viscot", VISCOT, "viscot_363k.json", "any", "train", "363k", ("region",), _COT,
               "apache-2.0"),
        Source("viscot_metadata", "questions", VISCOT, "metadata/", "any", "train", "438k", ("region",), _COT,
               "apache-2.0"),
        Source("viscot_benchmark", "viscot", "https://github.com/deepcs233/Visual-CoT", "viscot_benchmark/benchmark/",
               "any", "eval", "9937", ("region",), _COT, "apache-2.0"),
        Source("llava_mix665k", "llava", "liuhaotian/LLaVA-Instruct-150K", "llava_v1_5_mix665k.json", "any", "train",
               "665k", (), ("coco", "gqa", "ocrvqa", "textvqa", "vg"), "cc-by-4.0"),
    )
}  # fmt: skip


def read(
    source: str | Path,
    format: str | None = None,
    *,
    image_folder: str | Path | None = None,
    split: str | None = None,
    columns: dict[str, str] | None = None,
) -> Iterator[Found]:
    """The questions and items of a source, one at a time; images with paths as written.

    Args:
        source: a file, a dataset (see `hub`), or the name of a row of `SOURCES`, which is then downloaded.
        format: a row of `FORMATS`; seen from the file unless told.
        image_folder: the items file of a build; images of datasets are written beside it, into `NAME_images`. Without
            it they stay in memory.
        split ("train" unless told), columns: of a dataset, and of nothing else.

    Raises:
        UserError: no such file, a form that is not known, or a record that is not of it; with file and line.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    path = fetch(source)
    name = format or recognise(path)
    if name == "hub":
        beside = None if image_folder is None else Path(image_folder)
        folder = None if beside is None else beside.with_name(f"{beside.stem}_images")
        return read_hub(path, split or "train", columns, folder)
    if split or columns:
        raise UserError(f"{path}: read as {name}, which has no {'split' if split else 'columns'}; only datasets have")
    return FORMATS[name].read(Path(path))


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


def recognise(source: str | Path) -> str:
    """The form of a source, from its first record (a megabyte at most is read)."""
    if is_dataset(source):
        return "hub"
    path = Path(source)
    if parquet_files(path):
        return "items"
    first = _first_record(path)
    for row in FORMATS.values():
        if row.seen(first):
            return row.name
    raise UserError(
        f"{path}: not of a known form (its first record has {', '.join(first) or 'nothing'}); "
        f"known: {'; '.join(f'{row.name} {row.what}' for row in FORMATS.values())}"
    )


def is_dataset(source: str | Path) -> bool:
    """Whether a source is one for `hub`: a folder, a parquet file, or what looks like a hub id and is no file.

    Parquet of items, as `relook data convert` writes it, is none.
    """
    path = Path(source)
    if path.exists():
        return (path.is_dir() or path.suffix == ".parquet") and not holds_items(path)
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None and not path.suffix.startswith(".json")


def _first_record(path: Path) -> dict[str, Any]:
    with open_input(path) as file:
        head = file.read(PEEK)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    line, newline, _ = text.partition(b"\n")
    if text.startswith(b"{") and (newline or len(head) < PEEK):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            return value
    if (text.startswith(b"{") and b'"annotations"' in head) or (text.startswith(b"{") and b'"images"' in head):
        return {"annotations": None}  # one object over many lines, or one line longer than this: COCO's form
    return next((record.value for record in read_records(path)), {})


def placing(
    source: str | Path,
    target: str | Path,
    image_root: str | Path | None,
    images: dict[str, Path] | None,
    note: Callable[[str, str], None],
    format: str | None = None,
) -> Callable[[Found], Found | None]:
    """A function that gives a thing the paths and the size it has for a build into `target`; None leaves it out.

    Images named in `images` are found by dataset and name. The size of an image at hand is taken from its file: a
    stated one that disagrees is an error, an estimated one that could not be it leaves the question out.
    """
    home = Path(source) if Path(source).is_dir() else Path(source).parent
    if format == "hub" or (format is None and is_dataset(source)):
        home = Path(target).parent
    root = Path(image_root) if image_root is not None else home
    finder = ImageFinder(images or {})
    sizes: dict[str, tuple[int, int] | None] = {}

    def target_path(path: str) -> tuple[str, str]:
        """Where the image is from here, and what the item says."""
        if found := finder.find(path):
            return found, relative(found, Path(target).parent)
        here = os.path.normpath(os.path.join(root, path))
        if image_root is not None or os.path.isabs(path):
            return here, path
        return here, relative(here, Path(target).parent)

    def question(thing: Question) -> Question | None:
        if not isinstance(thing.image, str):
            return thing
        if image_root is not None and not finder.find(thing.image):
            placed(thing, root, strict=True)
        here, written = target_path(thing.image)
        if here not in sizes:
            sizes[here] = file_size(here, thing.where)
            if sizes[here] is None:
                note("images not at hand, sizes not held against them", f"{thing.where}: {here}")
        sized = _sized(thing, sizes[here], here, note)
        return None if sized is None else replace(sized, image=written)

    def place(thing: Found) -> Found | None:
        if isinstance(thing, Question):
            return question(thing)
        if image_root is not None:
            _refuse_leaving(thing, root, finder)
        lists = {key: tuple(_crop(ref, target_path) for ref in refs) for key, refs in thing.images.items()}
        return replace(thing, images=lists)

    return place


def _refuse_leaving(item: Item, root: Path, finder: ImageFinder) -> None:
    """Raise where an image of the item is neither found by its dataset nor below the root; with file and line."""
    for refs in item.images.values():
        for ref in refs:
            if isinstance(ref, str) and not finder.find(split_ref(ref)[0]):
                try:
                    place_image(ref, root, strict=True)
                except UserError as error:
                    raise UserError(f"{item.where}: {error}") from None


def _crop(ref: Any, target_path: Callable[[str], tuple[str, str]]) -> Any:
    """An item's image entry with its file moved and its crop kept."""
    if not isinstance(ref, str):
        return ref
    path, box = split_ref(ref)
    moved = target_path(path)[1]
    return moved if box is None else join_crop_suffix(moved, box)


def _sized(
    thing: Question, real: tuple[int, int] | None, here: str, note: Callable[[str, str], None]
) -> Question | None:
    stated = thing.size
    if real is None:
        if stated is None and thing.boxes:
            raise UserError(
                f"{thing.where}: no image at {here} and no width and height; give the images, or state the size"
            )
        return thing
    if stated is not None and any(abs(r - s) > off for r, s, off in zip(real, stated, thing.slack, strict=True)):
        what = f"{here} is {real[0]} x {real[1]}, but width and height say {stated[0]} x {stated[1]}"
        if thing.slack == (0, 0):
            raise UserError(f"{thing.where}: {what}; boxes of another size would name the wrong cells")
        note("images of another size than their boxes were drawn on, left out", f"{thing.where}: {here}")
        return None
    return replace(thing, size=real, slack=(0, 0))


def listing() -> dict[str, Any]:
    """Both tables for machines, and where the images of each source come from."""
    rows = [vars(row) | {"pages": [IMAGE_SETS[name].page for name in row.images or ()]} for row in SOURCES.values()]
    return {"sources": rows, "formats": [{"name": row.name, "what": row.what} for row in FORMATS.values()]}


def table() -> str:
    """Both tables for people: the sources under where they are published and their licence."""
    head = ("", "samples", "stage", "use", "looks", "images")
    groups: dict[str, list[tuple[str, ...]]] = {}
    for row in SOURCES.values():
        images = "not published" if row.images is None else " ".join(row.images)
        line = (f"  {row.name}", row.samples, row.stage, row.use, "/".join(row.looks) or "-", images)
        groups.setdefault(f"{row.hub} (licence: {row.licence or 'not published'})", []).append(line)
    lines = [head, *(line for group in groups.values() for line in group)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    out: list[str] = []
    for title, group in groups.items():
        out += [title] if out else [_columns(head, widths), title]
        out += [_columns(line, widths) for line in group]
    out += ["", "images from"] + [f"  {row.name:10} {row.page}" for row in IMAGE_SETS.values()]
    out += ["", "forms of file"] + [f"  {row.name:10} {row.what}" for row in FORMATS.values()]
    return "\n".join(out)


def _columns(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join([*(f"{cell:{w}}" for cell, w in zip(cells, widths, strict=False)), cells[-1]])
