"""`relook matter`: asks every question under all rows that apply to a model, and reports whether its looks mattered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relook.errors import UserError
from relook.evaluate.effect import BASE, NONE, Effect, Prices, effects
from relook.evaluate.executors import find_executor, is_main_process, loaded
from relook.evaluate.records import read_folder
from relook.evaluate.report import IMAGES, collect
from relook.evaluate.report.effect_files import matter_text, write_matter
from relook.evaluate.run import evaluate
from relook.evaluate.settings import SETTINGS, UNCONDITIONED, why_not

# What is asked, in this order: by itself, without, led elsewhere, and with a part of every look taken away.
ROWS = (
    *(BASE, NONE, "oracle", "random", "once"),
    *(name for name, row in SETTINGS.items() if row.intervention and name != "blank"),
)


@dataclass(frozen=True)
class Matter:
    """What was found, the files it was written to, and why rows were left out."""

    effects: tuple[Effect, ...]
    files: tuple[Path, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        written = "\n".join(f"written: {path}" for path in self.files)
        return matter_text(self.effects, self.left_out) + f"\n\n{written}"

    def to_dict(self) -> dict[str, Any]:
        return {"effects": [each.to_dict() for each in self.effects], "not_run": list(self.left_out)}


def rows_of(vlm: Any) -> tuple[list[str], list[str]]:
    """The rows that apply to a model, and why others do not. Of re-encodings that were trained: the look, and it
    unconditioned."""
    names, left_out = [*ROWS], list[str]()
    warnings: Any = getattr(vlm, "look_warnings", lambda looks: [])
    for name in (name for name in SETTINGS if name.endswith(UNCONDITIONED)):
        look = name.removesuffix(UNCONDITIONED)
        untrained = warnings([look]) if look in vlm.looks else []
        names += [look, name] if look in vlm.looks and not untrained else []
        left_out += untrained
    problems = {name: why_not(SETTINGS[name], vlm) for name in names}
    return [name for name in names if not problems[name]], [*filter(None, problems.values()), *left_out]


def matter(
    model: Any,
    tasks: Sequence[str],
    out: str | Path,
    prices: Prices | None = None,
    images: int | None = IMAGES,
    dtype: str | None = None,
    engine: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Matter | None:
    """Ask the questions of `tasks` under all rows that apply, and write what came of it into `out`.

    A run that was cut goes on, one that is finished is read, and its report written again.

    Args:
        model: a name, folder or hub id, or a loaded `VLM`, also one behind an endpoint.
        out: records and results as `evaluate` writes them, and the files of `report.effect_files`.
        prices: of a million input and a million output tokens.
        images: pictures on the page (None: no page).
        options: of `evaluate`.

    Returns:
        None in a process that another one writes for.

    Raises:
        UserError, RelookError: as `evaluate`; a model that takes no look.
    """
    find_executor(engine)
    vlm = loaded(model, dtype)
    if not vlm.looks:
        raise UserError(f"{getattr(vlm, 'name', '') or model} takes no look; relook evaluate measures it without")
    names, left_out = rows_of(vlm)
    alone = find_executor(engine) == "local"
    evaluate(
        vlm if alone else model, tasks, names, out=out, dtype=None if alone else dtype, engine=engine,
        overwrite=overwrite, resume=not overwrite, **options,
    )  # fmt: skip
    if not is_main_process():
        return None
    found = effects(read_folder(out), prices, options.get("seed", 0))
    return Matter(tuple(found), tuple(write_matter(found, collect([out]), out, images, left_out)), tuple(left_out))
