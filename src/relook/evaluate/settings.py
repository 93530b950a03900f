"""Evaluation settings: how the model is made to look (`SETTINGS`), and under which protocol it is asked (`PROTOCOLS`).

`auto`, `none` and the looks' names are the model's own ways; `oracle` shows the annotated region and `random` one of
the same size elsewhere: the three together say what choosing the region is worth. Where regions nest, both are reached
step by step (`regions.chain`), and `once` allows one look only: it says what further ones are worth. A look's name with
`-unconditioned` is the same look without its condition (c = 0): features that do not depend on the question. Only
re-encoding looks have that setting; a region's crop enters as the first look does, without projector and condition.

`auto-blank`, `other`, `blurred`, `moved`, `image-only`, `text-only` are `auto` with an intervention on every region
look (`relook.interventions`): the model is asked alike and writes the same first call, so that a question under which
it does not look has the answer of `auto`. `blank` is the forced region look with a blank crop.

Protocol `default` asks all items greedily, at the views of the checkpoint. `paper` is as published: the first 1000
items, images of 512 pixels at most (`paper-224`: 224) made smaller by the nearest neighbour, a region widened by one
cell, and sampling at top-p 0.1, top-k 10, temperature 0.95, turns of at most 1024 tokens (LLaMA-Factory's default,
with which the published evaluation generated).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from relook.data.items import Question
from relook.errors import UserError
from relook.interventions import INTERVENTIONS, STEPS, Intervention
from relook.looks import LOOKS
from relook.regions import Box, Cells, box_to_cells, cells_to_box, chain, clamp_box, union
from relook.views import PREPROCESSING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


@dataclass(frozen=True)
class Case:
    """One question as a setting gets it: the upright image's (width, height), the grid, and a generator of its own.

    margin  cells by which a region is widened
    looks   how many region looks may lead to a box (`data.settings.nested`)
    other   the image of another question, for settings that take one (`Setting.takes_other`)
    """

    question: Question
    size: tuple[int, int]
    grid: int
    random: np.random.Generator
    margin: int = 0
    looks: int = 1
    other: Image.Image | None = None


@dataclass(frozen=True)
class Setting:
    """What it is, the look a model must have for it, and the options of `VLM.ask_many` (None: does not apply).

    intervention  on region looks, a row of `relook.interventions`
    """

    name: str
    about: str
    needs: str | None
    options: Callable[[Case], dict[str, Any] | None]
    intervention: str | None = None

    @property
    def takes_other(self) -> bool:
        return self.intervention == "other"

    @property
    def lacks(self) -> str:
        """Why it does not apply to a question."""
        return "no question here is about another image" if self.takes_other else "nothing is annotated"


def annotated_box(case: Case) -> Box | None:
    """The box around all annotated ones, inside the image; None where nothing is annotated there."""
    width, height = case.size
    boxes = [b for b in case.question.boxes if b[0] < min(b[2], width) and b[1] < min(b[3], height) and min(b[2:]) > 0]
    return clamp_box(union(boxes), case.size) if boxes else None


def annotated_cells(case: Case) -> Cells | None:
    """The cells that cover all annotated boxes; None where nothing is annotated inside the image."""
    box = annotated_box(case)
    return None if box is None else box_to_cells(box, case.size, case.grid)


def random_cells(case: Case) -> Cells:
    """A region as large as the annotated one, its place drawn evenly; where none is, up to half a side large."""
    known = annotated_cells(case)
    if known:
        wide, high = known[2] - known[0] + 1, known[3] - known[1] + 1
    else:
        wide, high = (int(side) for side in case.random.integers(1, max(case.grid // 2, 1) + 1, 2))
    x, y = (int(case.random.integers(0, case.grid - side + 1)) for side in (wide, high))
    return x, y, x + wide - 1, y + high - 1


def random_box(case: Case) -> Box:
    """A box as large as the annotated one, in pixels, its place drawn evenly; where none is, that of `random_cells`."""
    x1, y1, x2, y2 = annotated_box(case) or cells_to_box(random_cells(case), case.size, case.grid)
    sides = zip((x2 - x1, y2 - y1), case.size, strict=True)
    x, y = (int(case.random.integers(0, whole - side + 1)) for side, whole in sides)
    return x, y, x + x2 - x1, y + y2 - y1


def _forced(case: Case, box: Box) -> dict[str, Any]:
    """The model is led to the box, and looks no further."""
    calls = chain(box, case.size, case.grid, case.margin, case.looks)
    if len(calls) == 1:
        return {"region": calls[0], "max_looks": 1}
    asked = box if max(box) > 1 else (-0.5, *box[1:])  # the first pixel alone: its box would pass for fractions
    return {"box": asked, "max_looks": len(calls)}


def _oracle(case: Case) -> dict[str, Any] | None:
    box = annotated_box(case)
    return None if box is None else _forced(case, box)


def _random(case: Case) -> dict[str, Any]:
    if case.looks > 1:
        return _forced(case, random_box(case))
    return {"region": random_cells(case), "max_looks": 1}


def _look(name: str, **options: Any) -> Callable[[Case], dict[str, Any]]:
    return lambda case: {"look": name, **options}


def _instead(name: str) -> Callable[[Case], dict[str, Any] | None]:
    """The model decides, and crops are changed; `moved` in a direction that is drawn."""

    def options(case: Case) -> dict[str, Any] | None:
        if name == "other" and case.other is None:
            return None
        step = STEPS[int(case.random.integers(len(STEPS)))] if name == "moved" else STEPS[0]
        return {"look": "auto", "intervention": Intervention(name, case.other if name == "other" else None, step)}

    return options


ONCE = "once"
_AUTO = {"blank": "auto-blank"}  # "blank" alone is forced
UNCONDITIONED = "-unconditioned"
_UNCONDITIONED = "a {} look whose features enter as they are (c = 0)"
_BLANK = "a region look, in the model's own way, that shows a blank crop"

SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting("auto", "the model decides", None, _look("auto")),
        Setting("none", "no second look", None, _look("none")),
        *(Setting(look, f"a {look} look, in the model's own way", look, _look(look)) for look in LOOKS),
        *(
            Setting(f"{look}{UNCONDITIONED}", _UNCONDITIONED.format(look), look, _look(look, condition=False))
            for look, spec in LOOKS.items()
            if spec.reencodes
        ),
        Setting(
            ONCE, "a region look, in the model's own way, and no further one", "region", _look("region", max_looks=1)
        ),
        Setting("blank", _BLANK, "region", _look("region", blank=True), "blank"),
        Setting("oracle", "the annotated region", "region", _oracle),
        Setting("random", "a region of the annotated one's size, anywhere", "region", _random),
        *(
            Setting(
                _AUTO.get(name, name), f"the model decides; its crops are {row.about}", "region", _instead(name), name
            )
            for name, row in INTERVENTIONS.items()
        ),
    )
}


def find_settings(names: Sequence[str], vlm: Any) -> list[Setting]:
    """The settings of these names, in order, each once.

    Raises:
        UserError: no such setting, one that needs a look the model lacks, or that leaves nothing out.
    """
    for name in names:
        if name not in SETTINGS:
            raise UserError(f"look {name!r} is unknown; expected some of {', '.join(SETTINGS)}")
        if problem := why_not(SETTINGS[name], vlm):
            cure = "give 'region'" if name == ONCE else "leave it out"
            raise UserError(f"{problem}; {cure}")
    return [SETTINGS[name] for name in dict.fromkeys(names)]


def why_not(setting: Setting, vlm: Any) -> str:
    """Why a setting does not apply to a model, in words; "" where it does."""
    name, needs = setting.name, setting.needs
    if needs is not None and needs not in vlm.looks:
        return f"{name!r} needs a {needs} look, and this model has {', '.join(vlm.looks) or 'none'}"
    if name == ONCE and vlm.processor.max_looks == 1:
        return f"{name!r} leaves out further looks, and this model takes one"
    if setting.intervention not in (None, *getattr(vlm, "interventions", INTERVENTIONS)):
        return f"{name!r} changes views or history, which relook's own server sees to by itself"
    if name.endswith(UNCONDITIONED) and hasattr(vlm, "engine"):
        return f"{name!r} is for a model in this process"
    return ""


# ---- protocols


@dataclass(frozen=True)
class Protocol:
    """How large an image is seen, how a token is chosen, how many items are asked.

    n           items of a task by default (None: the task's own number)
    processor   settings of the processor in place of the checkpoint's: views, margin of regions
    options     of `VLM.ask_many`
    tokens      of a turn at most, by default (None: the task's own)
    """

    name: str
    about: str
    n: int | None = None
    processor: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    tokens: int | None = None


def _paper(name: str, about: str, views: str) -> Protocol:
    sampling = {"do_sample": True, "top_p": 0.1, "top_k": 10, "temperature": 0.95}
    return Protocol(name, about, 1000, PREPROCESSING[views] | {"region_margin": 1}, sampling, 1024)


PROTOCOLS: dict[str, Protocol] = {
    row.name: row
    for row in (
        Protocol("default", "greedy, all items, the checkpoint's own views"),
        _paper("paper", "as published, images of at most 512 pixels", "published"),
        _paper("paper-224", "as published, images of at most 224 pixels", "published-224"),
    )
}


def find_protocol(name: str) -> Protocol:
    """The protocol of that name; UserError where there is none."""
    if name not in PROTOCOLS:
        raise UserError(f"protocol {name!r} is unknown; expected one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
