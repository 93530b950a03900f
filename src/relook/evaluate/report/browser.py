"""The record browser's data: a report's records as plain lists for JSON, questions once, answers apart.

    rows       name, title, look, the look in words, run (number of the folders that it is of)
    questions  task, index, where, field, text, accepted, boxes, size, picture (number of a picture; null: `why` not)
    answers    row, folder, question (numbers), text, scores, looks, recall (and of the first look), iou, cost, judge,
               failed, skipped, said
    pictures   src (a data URI), width, height of the original
    heat       the colors of a map, from low to high

Boxes are x1, y1, x2, y2 in pixels of the upright original, x2 and y2 exclusive. What is null, empty or unknown is left
out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from relook.evaluate.records import Record, image_key
from relook.evaluate.report.pictures import Pictures, gather
from relook.evaluate.report.rows import Report
from relook.evaluate.settings import SETTINGS
from relook.evaluate.summary import RIGHT
from relook.interventions import INTERVENTIONS
from relook.looks import LOOKS
from relook.regions import cells_in, token_area
from relook.render import HEAT

CUT = (None, "moved", "image-only")  # interventions under which what was shown can be cut from the picture


def browser_data(report: Report, images: int) -> tuple[dict[str, Any], Pictures]:
    """The page's data, with at most `images` pictures in it, and the pictures."""
    answered = list(_answered(report))
    pictures = gather((record for *_, record in answered), images)
    numbers = {name: number for number, name in enumerate(pictures.shown)}
    questions: dict[tuple[Any, ...], int] = {}
    asked: list[dict[str, Any]] = []
    answers = []
    for row, folder, record in answered:
        image = image_key(record)
        size = pictures.shown[image][1] if image in pictures.shown else record.get("size")
        same = record["task"], record["index"], record["question"], tuple(record["accepted"]), image
        if same not in questions:
            questions[same] = len(asked)
            asked.append(_question(record, size, numbers, pictures))
        answers.append(_clean(_answer(record, size) | {"row": row, "folder": folder, "question": questions[same]}))
    places = [tuple(folder.path for folder in row.folders) for row in report.rows]
    runs = list(dict.fromkeys(places))
    first = [report.scores(task)[0] for task in report.tasks]  # the scores that decide in a task come first
    data = {
        "tasks": list(report.tasks),
        "scores": list(dict.fromkeys([*first, *(name for task in report.tasks for name in report.scores(task))])),
        "rows": [
            {
                "name": row.name,
                "title": row.title,
                "look": row.look,
                "about": _about(row.look),
                "run": runs.index(place),
            }
            for row, place in zip(report.rows, places, strict=True)
        ],
        "right": RIGHT,
        "questions": asked,
        "answers": answers,
        "pictures": [{"src": src, "width": w, "height": h} for src, (w, h) in pictures.shown.values()],
        "heat": [list(color) for color in HEAT],
    }
    return data, pictures


def _answered(report: Report) -> Iterator[tuple[int, str, Record]]:
    """Every record with the number of its row and its folder's name, task by task, question by question, the rows'
    answers to one question beside each other."""
    for task in report.tasks:
        found = [
            (number, folder.name if len(row.folders) > 1 else "", record)
            for number, row in enumerate(report.rows)
            for folder in row.folders
            for record in folder.under(task, row.look)
        ]
        yield from sorted(found, key=lambda each: (each[2]["index"], each[2]["question"], each[0], each[1]))


def _question(
    record: Record, size: Sequence[int] | None, numbers: Mapping[str, int], pictures: Pictures
) -> dict[str, Any]:
    image, why = image_key(record), "beyond the number of pictures this page was made with"
    found: dict[str, Any] = {name: record[name] for name in ("task", "index", "where", "image", "field")}
    found |= {"text": record["question"], "accepted": record["accepted"], "boxes": record.get("boxes"), "size": size}
    return _clean(
        found | {"picture": numbers.get(image), "why": None if image in numbers else pictures.why.get(image, why)}
    )


def _answer(record: Record, size: Sequence[int] | None) -> dict[str, Any]:
    usage = record["usage"] or {}
    change = SETTINGS[record["look"]].intervention if record["look"] in SETTINGS else None
    return {
        "text": record.get("answer"),
        "scores": {name: _digits(score) for name, score in record["scores"].items()},
        "looks": [_look(look, size, change, record.get("grid")) for look in record["looks"]],
        "recall": _digits(record["recall"]),
        "first": _digits(record.get("first_recall")),
        "iou": _digits(record["iou"]),
        "positions": usage.get("lm_positions"),
        "patches": usage.get("vision_patches"),
        "seconds": _digits(record["seconds"]),
        "judge": record.get("judged"),
        "failed": record["failed"],
        "skipped": record["skipped"],
        "said": [turn["text"] for turn in record.get("transcript", ()) if turn.get("sampled")],
    }


def _look(look: Mapping[str, Any], size: Sequence[int] | None, change: str | None, grid: int | None) -> dict[str, Any]:
    """One look: what was seen (`box`), what was named (`named`, where the grid is known), its map in percent; under an
    intervention what was shown `instead`, and whether that is `uncut`: no part of the picture."""
    found: dict[str, Any] = {"kind": look["kind"], "cells": look["cells"], "problem": look["problem"]}
    region = look["cells"] is not None
    found |= {"box": look["box"] if region else None}
    if change is not None and region and look["problem"] is None:
        found |= {"instead": INTERVENTIONS[change].about, "uncut": change not in CUT}
    if region and size and grid and look["problem"] is None:
        found |= {"frame": look["frame"], "grid": grid} if look.get("frame") else {}
        found["named"] = cells_in(look["cells"], look.get("frame") or (0, 0, size[0], size[1]), grid)
    if (heat := look.get("attention")) and size:
        extent = LOOKS[look["kind"]].extent if look["kind"] in LOOKS else "whole"
        found["map"] = _percent(heat)
        found["area"] = [round(edge, 1) for edge in token_area(extent, (size[0], size[1]))]
    return _clean(found)


def _percent(heat: Sequence[Sequence[float | None]]) -> list[list[int]]:
    """|<F_i, c>| of every token in percent between the lowest and the highest; the sign says nothing (see `render`)."""
    sizes = [[abs(value) if value is not None and math.isfinite(value) else 0.0 for value in row] for row in heat]
    low, high = min(map(min, sizes)), max(map(max, sizes))
    return [[round(100 * (value - low) / (high - low)) if high > low else 0 for value in row] for row in sizes]


def _about(look: str) -> str:
    return SETTINGS[look].about if look in SETTINGS else ""


def _digits(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _clean(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if value or (value == 0 and value is not False)}
