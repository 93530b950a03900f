"""Where to look on one's own pages: questions with boxes from files, their pages cut, shaded and resized at random.

`Documents` on a JSON source. Its kinds of conversation are made anew from question, answer and boxes each time a page
is shown, so that few pages teach places and not the pages themselves; calls alone (`locate`) cost half of a whole
conversation; and attention is guided to the annotated box while a region is named. Pages are taken as grey, as the
receipts that its models know. What `validation.items` holds out is shown as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Any

from relook.data.items import Item, Question, item_question
from relook.errors import UserError
from relook.io import rng
from relook.train.objective import Examples, Setup
from relook.train.recipe import Stage
from relook.views import open_image
from zoo.objectives.conversation import Mix
from zoo.objectives.documents import Documents, scan_page
from zoo.objectives.pages import first_held_out
from zoo.scans import Scan
from zoo.worlds import QA, Page

TRIES = 8  # cuts of a page until a question is left on it


class OwnPages(Documents):
    """See the module. Items need the boxes that `relook data build` keeps in them."""

    class Options(Documents.Options):
        mix: Mix = {"locate": 0.6, "region": 0.3, "snip": 0.1}
        resize: float = 0.1
        jitter: float = 0.25
        place: float = 0.5
        spell: int = 0
        rows: bool = False

    @classmethod
    def check(cls, stage: Stage, from_items: bool) -> Any:
        if not from_items:
            raise UserError(f"stage {stage.name!r} ({stage.objective}) needs items; set data.path")
        return super().check(stage, from_items=False)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        items, grid = setup.items, self.processor.grid_size
        self.asked = [q for item in items.validation if (q := item_question(item, grid)) is not None]
        self.taught, self.kept = pages_of(islice(items, len(items)), grid), pages_of(items.validation, grid)
        self.eval = Examples(self.held_out, setup.validation.examples if self.kept else 0)
        self.whole = lru_cache(maxsize=None)(lambda number: scan_page(self.kept[number], None))

    def questions(self) -> Iterator[Question]:
        return iter(self.asked)

    def page(self, index: int) -> Page:
        if index >= (first := first_held_out(self.stage)):
            return self.whole((index - first) % len(self.kept))
        return super().page(index)

    def draw(self, number: int) -> Page:
        random = rng(self.seed, self.stage.name, "page", number)
        scan = self.taught[int(random.integers(len(self.taught)))]
        cuts = (scan_page(scan, random, self.options.resize) for _ in range(TRIES))
        return next((page for page in cuts if page.qas), None) or scan_page(scan, None)


def pages_of(items: Iterable[Item], grid: int) -> list[Scan]:
    """The pages that items ask about, with their questions; boxes as the items keep them, else as their calls name."""
    pages: dict[str, Scan] = {}
    for item in items:
        question = item_question(item, grid)
        if question is None or not question.boxes:
            continue
        key = str(question.image)
        if key not in pages:
            pages[key] = Scan(key, [], _image=open_image(question.image).convert("L"))  # type: ignore[arg-type]
        pages[key].qas.append(QA(question.text, question.answer, question.boxes, question.field or ""))
    return list(pages.values())
