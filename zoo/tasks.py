"""Evaluation tasks of the zoo: held-out pages of its synthetic datasets, and real scanned receipts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relook.data.forms import read_questions
from relook.data.items import Question, from_page
from relook.errors import UserError
from relook.evaluate.tasks import Task
from relook.io import rng
from zoo.worlds import make_world

if TYPE_CHECKING:
    from PIL import Image

# Training recipes use small seeds; evaluation pages use seeds above this one, so none is trained on.
UNSEEN = 1_000_000_007
REAL_RECEIPTS = Path("../shared/data/receipts/val_qa.jsonl")
_PAGE = re.compile(r"(?P<world>[\w-]+) page (?P<index>\d+) of seed (?P<seed>\d+)")  # as `world_questions` writes it


def world_questions(world: str, seed: int) -> Iterator[Question]:
    """Yield one randomly chosen question per held-out page of a synthetic dataset, without end."""
    pages = make_world(world, UNSEEN + seed)
    for index in count():
        page = pages.sample(index)
        chosen = int(rng(seed, "evaluate", world, index).integers(len(page.qas)))
        yield from_page(page, chosen, f"{world} page {index} of seed {UNSEEN + seed}")


def real_receipts() -> Iterator[Question]:
    """Return the validation questions on real scanned receipts, if the shared data folder exists."""
    beside = Path(__file__).parents[1] / REAL_RECEIPTS  # of the checkout this file may lie in
    path = next((path for path in (REAL_RECEIPTS, beside) if path.is_file()), None)
    if path is None:
        raise UserError(
            f"task receipts-real needs the real receipts, and there is no {REAL_RECEIPTS} here or beside the checkout; "
            "give the path of your own questions (JSON lines of image, question, answer, bboxs) as a task instead"
        )
    return read_questions(path)


def page_image(record: Any) -> Image.Image:
    """Render the page of a record again.

    Raises:
        UserError: the record names no page, or the page no longer renders the same.
    """
    match = _PAGE.fullmatch(str(record["where"]))
    if match is None:
        raise UserError("the image was in memory only")
    page = make_world(match["world"], int(match["seed"])).sample(int(match["index"]))
    if (record["question"], record["accepted"][0]) not in {(qa.question, qa.answer) for qa in page.qas}:
        raise UserError(f"{record['where']} is drawn differently now: its question is not on it")
    return page.image


def _pages(world: str, about: str, usual: int) -> Task:
    return Task(world, about, lambda seed, _: world_questions(world, seed), usual=usual, image=page_image)


CARDS = _pages("cards", "cards with codes, pages never seen", 1000)
RECEIPTS = _pages("receipts", "rendered receipts never seen", 500)
RECEIPTS_A4 = _pages("receipts-a4", "rendered receipts in small print on A4 sheets, never seen", 500)
RECEIPTS_REAL = Task("receipts-real", "60 real scanned receipts (SROIE), 234 questions", lambda *_: real_receipts())
