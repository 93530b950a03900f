"""Arms: the ways to look under which the same questions are asked. An arm is a row of `SETTINGS`.

`auto`, `none` and the looks' names are the model's own ways; `oracle` shows the annotated region and `random` one
of the same size elsewhere, so that the three together say what choosing the region is worth. A look's name with
`-unconditioned` is the same look without its condition: what is left are features that do not know the question. Only
re-encoding looks have that row; a region's crop enters as the first look does, without projector and condition.
`blank` is the region look with nothing on the crop: what is left is having asked.
Knows boxes and cells; refuses to know how a look is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relook.data.items import Question
from relook.errors import UserError
from relook.looks import LOOKS
from relook.regions import Cells, box_to_cells, union

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Case:
    """One question as an arm sees it: the upright image's (width, height), the grid, and a generator of its own."""

    question: Question
    size: tuple[int, int]
    grid: int
    random: np.random.Generator


@dataclass(frozen=True)
class Setting:
    """One row: what it is, the look a model must have for it, and the options of `ask` (None: does not apply)."""

    name: str
    about: str
    needs: str | None
    options: Callable[[Case], dict[str, Any] | None]


def annotated_cells(case: Case) -> Cells | None:
    """The cells that cover all annotated boxes; None where nothing is annotated inside the image."""
    width, height = case.size
    boxes = [b for b in case.question.boxes if b[0] < min(b[2], width) and b[1] < min(b[3], height) and min(b[2:]) > 0]
    return box_to_cells(union(boxes), case.size, case.grid) if boxes else None


def random_cells(case: Case) -> Cells:
    """A region as large as the annotated one, its place drawn evenly; where none is, up to half a side large."""
    known = annotated_cells(case)
    if known:
        wide, high = known[2] - known[0] + 1, known[3] - known[1] + 1
    else:
        wide, high = (int(side) for side in case.random.integers(1, max(case.grid // 2, 1) + 1, 2))
    x, y = (int(case.random.integers(0, case.grid - side + 1)) for side in (wide, high))
    return x, y, x + wide - 1, y + high - 1


def _oracle(case: Case) -> dict[str, Any] | None:
    cells = annotated_cells(case)
    return None if cells is None else {"region": cells}


def _look(name: str, **options: Any) -> Callable[[Case], dict[str, Any]]:
    return lambda case: {"look": name, **options}


SETTINGS: dict[str, Setting] = {
    arm.name: arm
    for arm in (
        Setting("auto", "the model decides", None, _look("auto")),
        Setting("none", "no second look", None, _look("none")),
        *(Setting(look, f"a {look} look, in the model's own way", look, _look(look)) for look in LOOKS),
        *(
            Setting(
                f"{look}-unconditioned",
                f"a {look} look whose features enter as they are (c = 0)",
                look,
                _look(look, condition=False),
            )
            for look, spec in LOOKS.items()
            if spec.reencodes
        ),
        Setting(
            "blank",
            "a region look, in the model's own way, that shows a blank crop",
            "region",
            _look("region", blank=True),
        ),
        Setting("oracle", "the annotated region", "region", _oracle),
        Setting(
            "random", "a region of the annotated one's size, anywhere", "region", lambda c: {"region": random_cells(c)}
        ),
    )
}


def find_settings(names: Sequence[str], vlm: Any) -> list[Setting]:
    """The arms of these names, in order, each once.

    Raises:
        UserError: no such arm, or one that needs a look the model lacks.
    """
    if not names:
        raise UserError(f"no look was named; expected some of {', '.join(SETTINGS)}")
    for name in names:
        if name not in SETTINGS:
            raise UserError(f"look {name!r} is unknown; expected some of {', '.join(SETTINGS)}")
        needs = SETTINGS[name].needs
        if needs is not None and needs not in vlm.looks:
            raise UserError(
                f"{name!r} needs a {needs} look, and this model has {', '.join(vlm.looks) or 'none'}; leave it out"
            )
    return [SETTINGS[name] for name in dict.fromkeys(names)]


def request(question: Question, options: Mapping[str, Any]) -> dict[str, Any]:
    """What `VLM.ask_many` takes for one question."""
    return {"image": question.image, "question": question.text, **options}
