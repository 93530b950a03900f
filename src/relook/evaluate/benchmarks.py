"""The paper's benchmarks as tasks: questions of Visual-CoT's benchmark files, images wherever they lie here.

Neither questions nor images are part of the project. `Places` says where both lie on this machine; images are found by
set and file name (`data.images`), since the published paths are somebody else's. Knows files; not models, not scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from relook.data.questions import Question
from relook.errors import UserError

SOURCE = "https://github.com/deepcs233/Visual-CoT (viscot_benchmark/benchmark)"


@dataclass(frozen=True)
class Places:
    """Where files of tasks lie. data: folder with the benchmark's JSON files; images: folder of each image set."""

    data: Path | None = None
    images: Mapping[str, Path] = field(default_factory=dict)


# task -> (file of the benchmark, what it is); names as in the paper's table
BENCHMARKS: dict[str, tuple[str, str]] = {
    "gqa": ("gqa.json", "relations and attributes in photos"),
    "openimages": ("openimages.json", "relations in photos"),
    "vsr": ("vsr.json", "spatial relations in photos"),
    "flickr30k": ("flickr30k.json", "photos, asked for what they show"),
    "cub": ("cub.json", "birds: attributes of a part"),
    "docvqa": ("docvqa.json", "scanned documents"),
    "textvqa": ("textvqa.json", "text in photos"),
    "textcaps": ("textcap.json", "text in photos, from captions"),
    "dude": ("dude.json", "pages of documents"),
    "sroie": ("sroie.json", "receipts"),
    "infographicsvqa": ("infographicsvqa.json", "infographics"),
    "visual7w": ("visual7w.json", "photos"),
    "emotic": ("emotic.json", "people's feelings in photos"),
}


def benchmark(name: str, places: Places) -> Iterator[Question]:
    """The questions of a row of `BENCHMARKS`, lazily; their sizes are left to the image files.

    An image that is not found keeps its published path below the folder of the questions: asking says which is missing.

    Raises:
        UserError: no folder was given, or it lacks the file.
    """
    from relook.data.images import ImageFinder
    from relook.data.sources import read

    file, _ = BENCHMARKS[name]
    if places.data is None:
        raise UserError(f"task {name} needs {file} of {SOURCE}; give the folder that holds it (--data FOLDER)")
    path = places.data / file
    if not path.is_file():
        raise UserError(f"task {name}: there is no {file} in {places.data}; it is part of {SOURCE}")
    finder = ImageFinder(places.images)
    for found in read(path, "viscot"):
        assert isinstance(found, Question) and isinstance(found.image, str)
        image = finder.find(found.image) or str(path.parent / found.image)
        yield replace(found, image=image, size=None, slack=(0, 0), field=None)
