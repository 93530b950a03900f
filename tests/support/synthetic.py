"""A synthetic dataset, a task, a model size and an objective for the tests, referenced by dotted path as a user's are.

Pages have colored boxes with codes; the question asks for the code in the box of one color. Boxes are (x1, y1, x2, y2)
in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import nn

from relook.data.build import build_item
from relook.data.items import Question, from_page
from relook.data.rules import BuildOptions
from relook.evaluate.tasks import Task
from relook.io import rng
from relook.model.new import Size
from relook.train.instruct import Conversations
from relook.train.objective import AuxiliaryHeads, Examples, Setup

COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
QUESTION = "What is the code in the {} box?"
PAGES = "support.synthetic:TASK"  # the task's dotted path; its name in records is "pages"
FIRST_SEED = 1_000_000_007  # of the task's pages
HELD_OUT = 1 << 23  # number of the first page for validation
# as a recipe names them
OBJECTIVE, SOURCE, SIZE = (f"support.synthetic:{name}" for name in ("Dialogues", "Pages", "TINY"))


@dataclass(frozen=True)
class QA:
    question: str
    answer: str
    boxes: tuple[tuple[int, int, int, int], ...]
    field: str


@dataclass(frozen=True)
class Page:
    image: Image.Image
    qas: tuple[QA, ...]


class Pages:
    """`Pages(seed).sample(i)` is the same page on every call: 512 x 512 pixels, four boxes of different colors."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def sample(self, index: int) -> Page:
        random = rng(self.seed, "pages", index)
        image = Image.new("RGB", (512, 512), "white")
        draw, qas = ImageDraw.Draw(image), []
        colors = [str(c) for c in random.permutation(COLORS)[:4]]
        for color, cell in zip(colors, random.permutation(16)[:4], strict=True):
            x, y = (128 * int(n) + 24 for n in divmod(int(cell), 4))
            code = str(random.integers(100, 1000))
            draw.rectangle((x, y, x + 79, y + 47), fill=color)
            draw.text((x + 20, y + 16), code, fill="black")
            qas.append(QA(QUESTION.format(color), code, ((x, y, x + 80, y + 48),), color))
        return Page(image, tuple(qas))


def questions(seed: int) -> Iterator[Question]:
    """Yield one question per page, without end."""
    pages = Pages(FIRST_SEED + seed)
    for index in count():
        page = pages.sample(index)
        chosen = int(rng(seed, "evaluate", index).integers(len(page.qas)))
        yield from_page(page, chosen, f"page {index} of seed {FIRST_SEED + seed}")


TASK = Task("pages", "pages with codes", lambda seed, _: questions(seed), usual=1000)

TINY = Size(
    phrases=tuple(QUESTION.format(color) for color in COLORS),
    vit={"embed_dim": 96, "depth": 3, "num_heads": 3, "patch_size": 8},
    lm={"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
        "intermediate_size": 512},
    first={"longest_side": 64},
    crop={"longest_side": None, "scale": 0.5},
    reencode={"longest_side": 256, "scale": 0.5},
)  # fmt: skip


# -- an objective


class Dialogues(Conversations):
    """Conversations about pages, with looks drawn by their shares; and an auxiliary head where `place` is set."""

    class Options(Conversations.Options):
        looks: dict[str, float] = {"region": 1.0}
        place: float = 0.0  # weight of the auxiliary head

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.train = Examples(self.example)
        self.eval = Examples(lambda index: self.example(HELD_OUT + index), setup.validation.examples)

    def example(self, index: int) -> dict[str, Any]:
        random, page = self.random(index), self.source.sample(index)
        names = list(self.options.looks)
        shares = np.array(list(self.options.looks.values()))
        look = names[int(random.choice(len(names), p=shares / shares.sum()))]
        question = from_page(page, int(random.integers(len(page.qas))))
        item = build_item(question, BuildOptions(look=look, free_choice=True))
        row = dict(self.processor.encode_item(item.to_dict()))
        return {**row, "kind": look, "answer_from": len(row["prompt_ids"])}

    def questions(self) -> Iterator[Question]:
        return (from_page(self.source.sample(HELD_OUT + number), 0) for number in count())

    def wrap(self, model: Any) -> Any:
        return DialogueHeads(model, self.setup.heads, self.options.place) if self.options.place else model


class DialogueHeads(AuxiliaryHeads):
    """The model with a linear head on its token embeddings, whose mean square is added to the loss."""

    def __init__(self, model: Any, saved: Any, weight: float) -> None:
        super().__init__(model, saved)
        self.weight = weight
        self.add_head("place", nn.Linear(model.config.get_text_config().hidden_size, 4))

    def forward(self, **batch: Any) -> dict[str, Any]:
        outputs = self.model(**batch)
        embedded = self.model.get_input_embeddings()(batch["input_ids"])
        return {**outputs, "loss": outputs["loss"] + self.weight * self.heads["place"](embedded).square().mean()}
