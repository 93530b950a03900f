"""The shipped cards-tiny looks and reads correctly on held-out pages, and cannot answer without a look."""

from functools import cache

import relook
from relook.model.loading import resolve
from relook.regions import covered
from zoo.worlds import make_world

PAGES = 12
PAIRS = [
    (page.image, page.qas[i % len(page.qas)])
    for i, page in enumerate(map(make_world("cards", 4321).sample, range(PAGES)))
]


@cache
def vlm():
    return relook.load("cards-tiny")


def answers(look: str):
    return vlm().ask_many([(image, qa.question) for image, qa in PAIRS], look=look)


def right(found) -> int:
    return sum(answer.text == qa.answer for answer, (_, qa) in zip(found, PAIRS, strict=True))


def test_its_own_region_holds_the_box_and_the_answer_is_read() -> None:
    found = answers("auto")
    assert all(len(a.looks) == 1 and a.looks[0].kind == "region" for a in found)
    held = sum(covered(a.looks[0].box, qa.boxes[0]) == 1.0 for a, (_, qa) in zip(found, PAIRS, strict=True))
    assert held >= PAGES - 1
    assert right(found) >= PAGES - 2


def test_the_reencoding_look_reads_too() -> None:
    found = answers("clip")
    assert all(a.looks[0].kind == "clip" and a.looks[0].attention is not None for a in found)
    assert right(found) >= PAGES - 2


def test_without_a_look_it_guesses() -> None:
    found = answers("none")
    assert not any(a.looks for a in found)
    assert right(found) <= 1


def test_it_says_where_it_comes_from_and_is_small() -> None:
    folder = resolve("cards-tiny")
    provenance = vlm().model.config.provenance
    assert provenance["recipe"] == "cards-tiny" and provenance["samples"] == sum(
        stage["samples"] for stage in provenance["stages"]
    )
    assert vlm().model.config.domain == "cards"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 8 * 2**20
    assert (folder / "README.md").is_file()
