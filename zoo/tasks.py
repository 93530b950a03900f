"""Evaluation tasks of the zoo: pages of its synthetic datasets that no training saw, and real scanned receipts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relook.data.items import Question, from_page, read_questions
from relook.errors import UserError
from relook.evaluate.tasks import Task
from relook.io import rng
from zoo.worlds import make_world

if TYPE_CHECKING:
    from PIL import Image

# Worlds of training recipes take small seeds; pages for evaluation come from seeds beyond this one, so none was seen.
UNSEEN = 1_000_000_007
REAL_RECEIPTS = Path("../shared/data/receipts/val_qa.jsonl")
_PAGE = re.compile(r"(?P<world>[\w-]+) page (?P<index>\d+) of seed (?P<seed>\d+)")  # as `world_questions` writes it


def world_questions(world: str, seed: int) -> Iterator[Question]:
    """One question about each page of a world that no training saw, which one drawn by page; without end."""
    pages = make_world(world, UNSEEN + seed)
    for index in count():
        page = pages.sample(index)
        chosen = int(rng(seed, "evaluate", world, index).integers(len(page.qas)))
        yield from_page(page, chosen, f"{world} page {index} of seed {UNSEEN + seed}")


def real_receipts() -> Iterator[Question]:
    """The validation questions about real scanned receipts, where the project's shared folder is at hand."""
    beside = Path(__file__).parents[1] / REAL_RECEIPTS  # of the checkout this file may lie in
    path = next((path for path in (REAL_RECEIPTS, beside) if path.is_file()), None)
    if path is None:
        raise UserError(
            f"task receipts-real needs the real receipts, and there is no {REAL_RECEIPTS} here or beside the checkout; "
            "give the path of your own questions (JSON lines of image, question, answer, bboxs) as a task instead"
        )
    return read_questions(path)


def page_image(record: Any) -> Image.Image:
    """The page of a record, drawn again.

    Raises:
        UserError: the record names no page, or the page is drawn differently now.
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
RECEIPTS_REAL = Task("receipts-real", "60 real scanned receipts (SROIE), 234 questions", lambda *_: real_receipts())
