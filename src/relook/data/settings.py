"""How items are built for a model: settings of its processor, stored with every item and compared in use.

    {"messages": [...], "built": {"grid": 16, "margin": 1, "free_choice": true, "question_first": true}, ...}

Items of another grid, margin or order have the right form, and teach a model what it is never asked. `max_looks` is
stored where it is over 1: the cells of a further region call count in the view before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from relook.data.reader import Record, Unreadable
from relook.errors import UserError
from relook.io import read_yaml, validate
from relook.regions import GRID

BUILT = "built"  # the key of an item
LOCATED = "located"  # the key of an item or question: by what its boxes were found (`data.locate`)
SETTINGS = {  # fields of `BuildOptions` -> attributes of the processor
    "grid": "grid_size",
    "margin": "region_margin",
    "free_choice": "free_choice",
    "question_first": "question_first",
    "max_looks": "max_looks",
}
IMPLIED = {"max_looks": 1}  # of an item that stores settings, but not these
PUBLISHED_SETTINGS = {"grid": GRID, "margin": 1, "free_choice": False, "question_first": False, **IMPLIED}


def processor_settings(processor: Any) -> dict[str, Any]:
    """How items are built for the model of a processor."""
    return {ours: getattr(processor, theirs) for ours, theirs in SETTINGS.items()} | {"max_looks": nested(processor)}


def nested(processor: Any) -> int:
    """How many region looks may lead to a box, each in the view before it; 1 where all count in the whole image."""
    return processor.max_looks if processor.region_of == "last" else 1


def built_settings(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that an item stores among its other keys; {} where it stores none. Null, as tables have it, is none.

    Raises:
        UserError: a number that is none, or too small.
    """
    found = extra.get(BUILT)
    stored = {name: value for name, value in found.items() if value is not None} if isinstance(found, Mapping) else {}
    known = {**IMPLIED, **stored} if stored else {}
    for name, least in (("grid", 1), ("margin", 0), ("max_looks", 1)):
        value = known.get(name, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"'{BUILT}' has {name} {value!r}; expected a whole number, {least} or more")
    return {name: known[name] for name in SETTINGS if name in known}


def model_settings(name: str | Path) -> tuple[dict[str, Any], list[str]]:
    """How items are built for a model, and the looks it has. Of a published checkpoint nothing is downloaded.

    Args:
        name: a shipped model, a folder, a hub id, or a recipe (a YAML file), for what it starts from.

    Raises:
        UserError: no such model or recipe.
    """
    from relook.model.published import PUBLISHED
    from relook.model.start import describe_start

    start = _start(name)
    taught = {} if start.max_looks is None else {"max_looks": start.max_looks}
    short = str(start.start).removeprefix("rp-yu/")
    if short in PUBLISHED and not Path(str(start.start)).is_dir():
        own = {"free_choice": short.endswith("NoPrompt"), **taught}
        return PUBLISHED_SETTINGS | own, ["region", PUBLISHED[short].look]
    info = describe_start(start)
    if info.processor is None:
        return PUBLISHED_SETTINGS | taught, info.config.looks
    return processor_settings(info.processor), list(info.processor.looks)


def view_of(name: str | Path) -> Callable[[tuple[int, int]], tuple[int, int]]:
    """The function from the size of an image to the size at which a model (named as above) sees it first."""
    from relook.model.start import describe_start

    processor: Any = describe_start(_start(name)).processor
    if processor is None:
        raise UserError(f"{name}: has no processor here to say at which size it sees images; give a model that is here")
    return lambda size: first_size(processor, size) or size


def first_size(processor: Any, size: tuple[int, int]) -> tuple[int, int] | None:
    """The size at which the model of a processor sees an image of `size` first; None where that is not known here."""
    from relook.processing.pixels import vit_size

    if (own := getattr(processor, "first_size", None)) is not None:  # of a model behind an endpoint
        return own(size)
    if not hasattr(processor, "image_processor"):
        return None
    return vit_size(processor.image_processor, processor.first_look.target(size, processor.min_side))


def _start(name: str | Path) -> Any:
    from relook.model.start import Start

    if not str(name).endswith((".yaml", ".yml")):
        return Start.model_validate({"start": str(name)})
    raw = read_yaml(Path(name))
    return validate(Start, raw.get("model") or {} if isinstance(raw, dict) else {}, f"{name}: model")


def stored_settings(records: Iterable[Record | Unreadable]) -> dict[str, Any]:
    """The settings that the first of these items stores; {} where it stores none."""
    first = next(iter(records), None)
    with suppress(UserError):  # which is that item's own fault
        return built_settings(first.value) if isinstance(first, Record) else {}
    return {}


def located_by(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How the boxes of a record were found: {"by": "ocr", "with": "...", "score": 0.97}; None where it does not say."""
    found = data.get(LOCATED)
    return found if isinstance(found, Mapping) else None


def difference(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Where stored settings differ from those wanted, with both values; "" where they agree, or there are none.

    >>> difference({"grid": 8, "margin": 1}, {"grid": 16, "margin": 1})
    'grid 8 (the model: 16)'
    """
    differ = [name for name, value in wanted.items() if name in known and known[name] != value]
    return ", ".join(f"{name} {known[name]} (the model: {wanted[name]})" for name in differ)


def refuse_others(path: str | Path, records: Iterable[Record | Unreadable], wanted: Mapping[str, Any]) -> None:
    """Raises UserError where the first of these items of a file was built for a model of other settings."""
    if differs := difference(stored_settings(records), wanted):
        raise UserError(
            f"{path}: its items were built for another model: {differs}; build them again with `relook data build "
            "--for MODEL`, or take them as they are with data.as_built=true"
        )
