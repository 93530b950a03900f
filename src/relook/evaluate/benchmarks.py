"""Others' benchmarks as tasks: where their questions are published, in which files, and how an answer is scored.

Neither questions nor images are part of the project. `Places` says where both lie on this machine. Images are found by
set and file name (`data.images`), since published paths are somebody else's; else beside the questions. A benchmark is
a row of `BENCHMARKS`. Knows files; not models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from relook.data.items import Question
from relook.errors import UserError
from relook.evaluate import benchmark_readers as readers

Reader = Callable[[Path], Iterator[Question]]

VPT = "rp-yu/VPT_Datasets on the Hugging Face hub"
VISCOT = "https://github.com/deepcs233/Visual-CoT (viscot_benchmark/benchmark)"
POPE = "https://github.com/RUCAIBox/POPE (output/coco)"


@dataclass(frozen=True)
class Places:
    """Where files of tasks lie. data: folder with the benchmarks' files; images: folder of each image set."""

    data: Path | None = None
    images: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """One row.

    files    (pattern, how a file of it is read), the first that is there counts; below the folder or one level deeper.
             Several files of one pattern are asked one after the other
    source   where they are published
    tokens   that a turn may take, where answers are long (None: as usual)
    """

    name: str
    about: str
    files: tuple[tuple[str, Reader], ...]
    source: str
    scores: tuple[str, ...]
    tokens: int | None = None


TEXT = ("exact", "vqa_exact", "anls")


def _paper(name: str, about: str, split: str, file: str, reader: Reader = readers.viscot) -> Benchmark:
    """A row of the paper's table: the published split, or else what it was made of."""
    files = ((f"{split}*.json", readers.published), (file, reader))
    return Benchmark(name, about, files, f"{VPT} ({split}.json) or {VISCOT} ({file})", TEXT)


def _viscot(name: str, about: str, *scores: str) -> Benchmark:
    return Benchmark(name, about, ((f"{name}.json", readers.viscot),), VISCOT, (*TEXT, *scores))


def _llava(kind: str, about: str) -> Benchmark:
    split = f"LLaVA_COCO_{kind}_action_test"
    return Benchmark(
        f"llava-{kind}",
        about,
        ((f"{split}*.json", readers.published),),
        f"{VPT} ({split}.json)",
        ("rouge_l",),
        512,
    )


def _pope(name: str, about: str, *files: tuple[str, Reader]) -> Benchmark:
    return Benchmark(name, about, files, POPE, ("yes_no",))


def _hr_bench(size: str) -> Benchmark:
    files = tuple((f"hr_bench_{size}.{kind}", readers.hr_bench) for kind in ("parquet", "tsv"))
    about = f"small things in images of {size.upper()} pixels, multiple choice"
    return Benchmark(f"hr-bench-{size}", about, files, "DreamMr/HR-Bench on the Hugging Face hub", ("choice",))


BENCHMARKS: dict[str, Benchmark] = {
    row.name: row
    for row in (
        _paper("gqa", "relations and attributes in photos", "GQA_region_test", "gqa.json"),
        _paper("openimages", "relations in photos", "OI_region_test", "openimages.json"),
        _paper("vsr", "spatial relations in photos", "VSR_region_test", "vsr.json"),
        _llava("free", "questions about photos, answered at length"),
        _llava("single", "questions about photos, answered shortly"),
        _paper("flickr30k", "photos, asked for what they show", "Flickr30k_action_test", "flickr30k.json",
               readers.viscot_again),
        _paper("cub", "birds: attributes of a part", "CUB_Birds_action_test", "cub.json", readers.viscot_again),
        _paper("docvqa", "scanned documents", "DocVQA_region_test", "docvqa.json"),
        _paper("textvqa", "text in photos", "TextVQA_region_test", "textvqa.json"),
        _paper("textcaps", "text in photos, from captions", "TextCap_region_test", "textcap.json"),
        _paper("dude", "pages of documents", "DUDE_region_test", "dude.json"),
        _pope("pope", "is something there that is not", ("POPE_action_test*.json", readers.published),
              ("coco_pope_*.json", readers.pope)),
        *(
            _pope(f"pope-{kind}", f"the same, {kind} things", (f"coco_pope_{kind}.json", readers.pope))
            for kind in ("random", "popular", "adversarial")
        ),
        Benchmark("vstar", "V*Bench: small things in large photos, multiple choice",
                  (("test_questions.jsonl", readers.vstar),), "craigwu/vstar_bench on the Hugging Face hub",
                  ("choice",)),
        _hr_bench("4k"),
        _hr_bench("8k"),
        Benchmark("cv-bench", "counting, relations, depth and distance, multiple choice",
                  (("test_[23]d.jsonl", readers.cv_bench), ("test_[23]d.parquet", readers.cv_bench)),
                  "nyu-visionx/CV-Bench on the Hugging Face hub", ("choice",)),
        _viscot("sroie", "receipts", "amount"),
        _viscot("infographicsvqa", "infographics"),
        _viscot("visual7w", "photos"),
        _viscot("emotic", "people's feelings in photos"),
    )
}  # fmt: skip


def benchmark(name: str, places: Places) -> Iterator[Question]:
    """The questions of a row of `BENCHMARKS`, lazily.

    An image that is not found keeps its published path below the folder of the questions: asking says which is missing.

    Raises:
        UserError: no folder was given, or it lacks the files.
    """
    from relook.data.images import ImageFinder

    row = BENCHMARKS[name]
    finder = ImageFinder(places.images)
    paths, read = _files(row, places.data)
    for path in paths:
        for found in read(path):
            if isinstance(found.image, str):
                found = replace(found, image=finder.find(found.image) or str(path.parent / found.image))
            yield found


def _files(row: Benchmark, folder: Path | None) -> tuple[list[Path], Reader]:
    patterns = [pattern for pattern, _ in row.files]
    wanted = " or ".join(patterns)
    if folder is None:
        raise UserError(
            f"task {row.name} needs {wanted} of {row.source}; give the folder that holds it (--data FOLDER)"
        )
    for pattern, read in row.files:
        if found := sorted(folder.glob(pattern)) or sorted(folder.glob(f"*/{pattern}")):
            return found, read
    raise UserError(f"task {row.name}: there is no {wanted} in {folder}; it is part of {row.source}")
