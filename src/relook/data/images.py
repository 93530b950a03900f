"""The image sets that the published data stands on, and finding their files wherever somebody keeps them.

`IMAGE_SETS` is the manifest: where each set is published, what its archives are called, and, where somebody has
published it, how large they are and what they sum to. `None` means that no publication was found, and is shown as
"not published": nothing here is measured or guessed. `by` says whose figure it is, since most official pages give none.

The published JSON holds the absolute paths of whoever made it. `ImageFinder` takes such a path apart: the deepest
folder name that a set is known by says which set it is of, the file name says which image. This module knows paths, and
refuses to know items and pixels.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from relook.errors import UserError

_YEAR = re.compile(r"^COCO_(train|val)2014_")  # what COCO's images were called before 2017
PICTURES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")


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
    """One of the eleven sets. `aliases`: folder names (lower case) by which published paths call it."""

    name: str
    title: str
    page: str
    archives: tuple[Archive, ...]
    aliases: tuple[str, ...]
    images: int | None = None  # image files in all archives
    licence: str | None = None
    note: str = ""


_VG = "copy BAAI/DataOptim on the hub"
_HUB = "copy on the hub"

IMAGE_SETS: dict[str, ImageSet] = {
    row.name: row
    for row in (
        ImageSet(
            "coco",
            "COCO 2017",
            "https://cocodataset.org/#download",
            (Archive("train2017.zip", "18 GB", by="official page"), Archive("val2017.zip", "1 GB", by="official page")),
            ("coco", "coco2017", "train2017", "val2017", "train2014", "val2014"),
            118287 + 5000,
            licence="cc-by-4.0 (annotations); images by Flickr's terms of use",
            note="POPE's questions are on val2014 images, which are among those of 2017 under shorter names",
        ),
        ImageSet(
            "cub",
            "CUB-200-2011",
            "https://www.vision.caltech.edu/datasets/cub_200_2011/",
            (
                Archive(
                    "CUB_200_2011.tgz",
                    "1.1 GB",
                    checksum="md5:97eceeb196236b17998738112f37df78",
                    by="public loaders of the set",
                ),
            ),
            ("cub", "cub_200_2011", "cub_birds"),
            11788,
        ),
        ImageSet(
            "docvqa",
            "DocVQA (single page)",
            "https://www.docvqa.org/datasets/docvqa",
            (Archive("spdocvqa_images.tar.gz", "8.58 GB", by=_HUB),),
            ("docvqa", "spdocvqa", "spdocvqa_images"),
            12767,
            note="registration at rrc.cvc.uab.es (challenge 17)",
        ),
        ImageSet(
            "dude",
            "DUDE",
            "https://huggingface.co/datasets/jordyvl/DUDE_loader",
            (Archive("DUDE_train-val-test_binaries.tar.gz", "21.2 GB", by="official hub page, V1.0.7"),),
            ("dude",),
            licence="cc-by-4.0",
            note="PDF files: the published paths are those of rendered pages, DOCUMENT_PAGE.jpg",
        ),
        ImageSet(
            "flickr30k",
            "Flickr30k",
            "https://shannon.cs.illinois.edu/DenotationGraph/",
            (Archive("flickr30k-images.zip", "4.39 GB", by=_HUB),),
            ("flickr30k", "flickr30k-images", "flickr30k_images"),
            31783,
            note="on request, by a form on the page",
        ),
        ImageSet(
            "gqa",
            "GQA",
            "https://cs.stanford.edu/people/dorarad/gqa/download.html",
            (Archive("images.zip", "21.8 GB", by=_HUB),),
            ("gqa",),
        ),
        ImageSet(
            "ocrvqa",
            "OCR-VQA",
            "https://ocr-vqa.github.io/",
            (),
            ("ocrvqa", "ocr_vqa", "ocr-vqa"),
            note="a script downloads one cover after another; Visual-CoT and LLaVA save all of them as .jpg",
        ),
        ImageSet(
            "openimage",
            "Open Images",
            "https://github.com/cvdfoundation/open-images-dataset",
            tuple(
                Archive(f"train_{i}.tar.gz", size, by=_HUB)
                for i, size in enumerate(("49.3 GB", "36.9 GB", "35.4 GB", "34.1 GB", "33.2 GB", "33.5 GB"))
            ),
            ("openimage", "openimages", "open_images", "oi"),
            licence="cc-by-4.0 (annotations); images listed as cc-by-2.0",
            note="Visual-CoT uses the parts 0 to 5",
        ),
        ImageSet(
            "textvqa",
            "TextVQA (TextCaps has the same images)",
            "https://textvqa.org/dataset/",
            (Archive("train_val_images.zip", "7.07 GB", by=_HUB),),
            ("textvqa", "textcap", "textcaps", "train_images"),
            licence="cc-by-4.0",
        ),
        ImageSet(
            "vg",
            "Visual Genome",
            "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html",
            (
                Archive(
                    "images.zip",
                    "9.73 GB",
                    9731705982,
                    "sha256:51c682d2721f880150720bb416e0346a4c787e4c55d7f80dfd1bd3f73ba81646",
                    by=_VG,
                ),
                Archive(
                    "images2.zip",
                    "5.47 GB",
                    5471658058,
                    "sha256:99da1a0ddf87011319ff3b05cf9176ffee2731cc3c52951162d9ef0d68e3cfb5",
                    by=_VG,
                ),
            ),
            ("vg", "vg_100k", "vg_100k_2", "visualgenome", "visual_genome"),
            108077,
            licence="cc-by-4.0",
        ),
        ImageSet(
            "vsr",
            "Visual Spatial Reasoning",
            "https://github.com/cambridgeltl/visual-spatial-reasoning",
            (Archive("vsr_images.zip", "1.07 GB", by=_HUB),),
            ("vsr", "vsr_images"),
            licence="apache-2.0 (annotations); the images are COCO's",
        ),
    )
}


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


def dataset_of(path: str, names: tuple[str, ...] | None = None) -> str | None:
    """The image set a published path belongs to, by its deepest telling folder; None where none tells.

    >>> dataset_of("/root/data/cot/gqa/images/1.jpg"), dataset_of("/a/coco/train2017/1.jpg"), dataset_of("x/1.jpg")
    ('gqa', 'coco', None)
    """
    known = {alias: row.name for row in IMAGE_SETS.values() for alias in row.aliases}
    known |= {name: name for name in names or ()}
    folders = PurePosixPath(path.replace("\\", "/")).parts[:-1]
    return next((known[part.lower()] for part in reversed(folders) if part.lower() in known), None)


@dataclass
class ImageFinder:
    """Finds published paths in folders of one's own, by dataset and file name. Each folder is listed once, on use.

    Several files of that name: the one whose folders agree longest with the published path, from the end; equally long
    ones are not guessed between. None of that name: COCO's short one of 2017 for its long one of 2014, or the same name
    with another ending (OCR-VQA as .jpg).
    """

    folders: Mapping[str, Path]
    _listed: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def find(self, path: str) -> str | None:
        """The file of a published path, or None."""
        name = dataset_of(path, tuple(self.folders))
        if name is None or name not in self.folders:
            return None
        parts = PurePosixPath(path.replace("\\", "/")).parts
        listed = self._list(name)
        file = parts[-1]
        short = _YEAR.sub("", file)
        found = listed.get(file) or listed.get(short) or listed.get(_stem(file)) or listed.get(_stem(short)) or []
        ranked = sorted(((_shared_tail(parts, PurePosixPath(each).parts), each) for each in found), reverse=True)
        if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
            return None
        return os.path.join(self.folders[name], ranked[0][1])

    def _list(self, name: str) -> dict[str, list[str]]:
        """Relative paths by file name, and by stem (with a "/" at its end, which no file name has)."""
        if name not in self._listed:
            listed: dict[str, list[str]] = {}
            for folder, files in _walk(self.folders[name]):
                inside = os.path.relpath(folder, self.folders[name])
                for file in files:
                    if file.lower().endswith(PICTURES):
                        path = Path(inside, file).as_posix()
                        listed.setdefault(file, []).append(path)
                        listed.setdefault(_stem(file), []).append(path)
            self._listed[name] = listed
        return self._listed[name]


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder below `root` once, with its files; through links, though not in circles."""
    seen = set()
    for folder, inside, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        yield folder, sorted(files)


def _stem(file: str) -> str:
    return f"{PurePosixPath(file).stem}/"


def _shared_tail(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """How many folders agree from the end, the file's own name left out."""
    count = 0
    for one, other in zip(reversed(a[:-1]), reversed(b[:-1]), strict=False):
        if one.lower() != other.lower():
            break
        count += 1
    return count


@dataclass(frozen=True)
class SetCheck:
    """A local copy of one set against the manifest: what was found, and every fault in words."""

    name: str
    folder: str
    images: int
    archives: int
    faults: tuple[str, ...]
    unknown: tuple[str, ...]  # what could not be checked, since nobody published it

    def __str__(self) -> str:
        head = f"{self.name}: {self.folder}: {self.images} image files, {self.archives} archives"
        lines = [f"    wrong: {fault}" for fault in self.faults] + [f"    not checked: {what}" for what in self.unknown]
        return "\n".join([head, *lines])


def check_copy(name: str, folder: str | Path) -> SetCheck:
    """Hold a folder against the manifest's row: archives lying in it by size and checksum, image files by number.

    Reads every archive that has a published checksum from end to end.
    """
    if name not in IMAGE_SETS:
        raise UserError(f"{name!r} is none of the image sets; expected one of {', '.join(IMAGE_SETS)}")
    row, folder = IMAGE_SETS[name], Path(folder)
    faults: list[str] = []
    unknown: list[str] = []
    archives: dict[str, Path] = {}
    images = 0
    wanted = {archive.name for archive in row.archives}
    for place, files in _walk(folder):
        images += sum(file.lower().endswith(PICTURES) for file in files)
        archives |= {file: Path(place, file) for file in files if file in wanted}
    for archive in row.archives:
        if archive.name not in archives:
            if not images:
                faults.append(f"no image, and no {archive.name}")
            continue
        path = archives[archive.name]
        if archive.bytes is not None and path.stat().st_size != archive.bytes:
            faults.append(f"{path} has {path.stat().st_size} bytes, {archive.bytes} are published ({archive.by})")
        elif archive.checksum is None:
            unknown.append(f"{archive.name}: no checksum is published")
        elif (found := _checksum(path, archive.checksum.partition(":")[0])) != archive.checksum:
            faults.append(f"{path} sums to {found}, published is {archive.checksum} ({archive.by})")
    if not row.archives and not images:
        faults.append("no image")
    if images and row.images is None:
        unknown.append("how many images there are is not published")
    elif images and row.images is not None and images < row.images:
        faults.append(f"{images} image files of {row.images}")
    return SetCheck(name, str(folder), images, len(archives), tuple(faults), tuple(unknown))


def _checksum(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return f"{kind}:{hashlib.file_digest(file, kind).hexdigest()}"


def rows() -> list[dict[str, Any]]:
    """The manifest for machines; null where nothing is published."""
    return [asdict(row) for row in IMAGE_SETS.values()]


def manifest() -> str:
    """The manifest for people."""
    lines = []
    for row in IMAGE_SETS.values():
        count = "not published" if row.images is None else str(row.images)
        lines.append(f"{row.name}  {row.title}  {row.page}")
        lines.append(
            f"    images: {count}; licence: {row.licence or 'see the page'}{'; ' if row.note else ''}{row.note}"
        )
        for archive in row.archives:
            size = f"{archive.size} ({archive.by})" if archive.size else "size not published"
            lines.append(f"    {archive.name}  {size}  {archive.checksum or 'checksum not published'}")
    return "\n".join(lines)
