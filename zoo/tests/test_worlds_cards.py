"""The cards dataset, tested on pixels: same pages, correct boxes, codes illegible at first and legible in a look."""

import numpy as np
import pytest
from PIL import Image

from relook.errors import UserError
from relook.io import rng
from zoo.worlds import make_world
from zoo.worlds.cards import COLORS, SIDE, UNIT, Cards

PAGES = [Cards(3).sample(i) for i in range(12)]


def test_pages_depend_on_seed_and_index_alone() -> None:
    world = make_world("cards", 3)
    again = [world.sample(i) for i in reversed(range(12))][::-1]
    for page, same in zip(PAGES, again, strict=True):
        assert np.array_equal(page.image, same.image)
        assert page.qas == same.qas
    assert not np.array_equal(PAGES[0].image, PAGES[1].image)
    assert not np.array_equal(PAGES[0].image, Cards(4).sample(0).image)


def test_random_keys_are_not_mixed_up() -> None:
    draws = {tuple(rng(*key).integers(0, 2**30, 4)) for key in [(1, 2), (2, 1), (1, "2"), (12,), (1, 2, 1)]}
    assert len(draws) == 5


@pytest.mark.parametrize("page", PAGES)
def test_page_is_what_its_truth_says(page) -> None:
    assert page.image.size == (SIDE, SIDE) and page.image.mode == "RGB"
    assert 4 <= len(page.areas) <= 6
    assert len({a.label for a in page.areas}) == len(page.areas) == len(page.qas)
    pixels = np.asarray(page.image).astype(int)
    for area, qa in zip(page.areas, page.qas, strict=True):
        x1, y1, x2, y2 = area.box
        assert qa.boxes == (area.box,) and qa.field == area.label and area.label in qa.question
        assert 0 <= x1 < x2 <= SIDE and 0 <= y1 < y2 <= SIDE
        # the commonest color inside is the named one, up to the shade of the day
        colors, counts = np.unique(pixels[y1:y2, x1:x2].reshape(-1, 3), axis=0, return_counts=True)
        assert np.abs(colors[counts.argmax()] - COLORS[area.label]).max() <= 12
        # the code is what the glyphs inside the box spell
        inside = [g for g in page.glyphs if x1 <= g.box[0] < x2 and y1 <= g.box[1] < y2]
        assert "".join(g.char for g in sorted(inside, key=lambda g: g.box)) == qa.answer


def test_boxes_keep_apart() -> None:
    for page in PAGES:
        for i, a in enumerate(page.areas):
            for b in page.areas[i + 1 :]:
                gap_x = max(a.box[0], b.box[0]) - min(a.box[2], b.box[2])
                gap_y = max(a.box[1], b.box[1]) - min(a.box[3], b.box[3])
                assert max(gap_x, gap_y) >= UNIT


def test_codes_are_illegible_at_first_and_legible_in_a_look() -> None:
    """Two pages that differ in their codes only: at 64 x 64 they are nearly the same, at half size they are not."""
    page = PAGES[0]
    blank = page.image.copy()
    for glyph in page.glyphs:
        x1, y1, x2, y2 = glyph.box
        blank.paste(page.image.getpixel((x1 - 1, y1)), (x1, y1, x2, y2))

    def contrast(size: int) -> float:
        far = [np.asarray(i.resize((size, size), Image.Resampling.BICUBIC)).astype(float) for i in (page.image, blank)]
        box = tuple(v * size // SIDE for v in page.areas[0].box)
        part = far[0][box[1] : box[3], box[0] : box[2]] - far[1][box[1] : box[3], box[0] : box[2]]
        return float(np.abs(part).max())

    assert contrast(64) < 0.75 * contrast(256)


def test_answers_cannot_be_guessed() -> None:
    answers = [qa.answer for i in range(100) for qa in Cards(9).sample(i).qas]
    counts = np.bincount([int(d) for a in answers for d in a], minlength=10)
    assert counts.min() > 0.07 * counts.sum()
    assert len(set(answers)) > 0.35 * 1000


def test_unknown_world() -> None:
    with pytest.raises(UserError, match="cards"):
        make_world("card", 1)
