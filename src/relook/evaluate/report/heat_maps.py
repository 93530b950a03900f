"""Heat maps of where looks were taken and where the annotated boxes are: densities over a page of unit size.

Boxes are x1, y1, x2, y2 in pixels of the upright original; a density is of shape (CELLS, CELLS), row 0 at the page's
top, and says which share of the boxes covers each place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from relook.data.images import file_size
from relook.errors import UserError
from relook.evaluate.records import Record, image_key
from relook.evaluate.report.pictures import Pictures
from relook.evaluate.report.rows import Report

CELLS = 64
Shares = tuple[float, ...]  # a box in shares 0..1 of the page's sides


@dataclass(frozen=True)
class HeatMap:
    """`annotated` is the density to compare with (None in the map of it); `aspect` is height over width."""

    about: str
    density: np.ndarray
    annotated: np.ndarray | None
    aspect: float


def heat_maps(report: Report, task: str, pictures: Pictures) -> tuple[list[HeatMap], int]:
    """The annotated boxes of a task, then the region looks of every row that took some; and how many records were left
    out because the size of their image is not known.

    The line that goes with a row is of the boxes annotated for that row's own questions.
    """
    sizes: dict[str, tuple[int, int] | None] = {}
    maps: list[HeatMap] = []
    every: dict[tuple[str, str], tuple[list[Shares], float]] = {}
    left = 0
    for row in report.rows:
        seen: list[Shares] = []
        annotated: list[Shares] = []
        aspects: list[float] = []
        for record in (record for folder in row.folders for record in folder.under(task, row.look)):
            boxes = [look["box"] for look in record["looks"] if look["cells"] and look["box"] and not look["problem"]]
            image = image_key(record)
            if image not in sizes:
                sizes[image] = _size(record, pictures)
            size = sizes[image]
            if size is None:
                left += bool(boxes)
                continue
            known = [_shares(box, size) for box in record.get("boxes") or ()]
            every[image, record["question"]] = known, size[1] / size[0]
            if boxes:
                seen += [_shares(box, size) for box in boxes]
                annotated += known
                aspects.append(size[1] / size[0])
        if seen:
            maps.append(_map(row.name, "looks", seen, _density(annotated) if annotated else None, aspects))
    boxes = [box for known, _ in every.values() for box in known]
    if maps and boxes:
        maps.insert(0, _map("annotated", "boxes", boxes, None, [aspect for _, aspect in every.values()]))
    return maps, left


def _map(
    name: str, noun: str, boxes: Sequence[Shares], annotated: np.ndarray | None, aspects: Sequence[float]
) -> HeatMap:
    density = _density(boxes)
    about = f"{name}: {len(boxes)} {noun}; the brightest place is in {density.max():.0%} of them"
    return HeatMap(about, density, annotated, float(np.median(aspects)))


def _size(record: Record, pictures: Pictures) -> tuple[int, int] | None:
    if size := record.get("size"):
        return size[0], size[1]
    if image_key(record) in pictures.shown:
        return pictures.shown[image_key(record)][1]
    try:
        return file_size(record["image"], record["where"]) if record["image"] else None
    except UserError:
        return None


def _shares(box: Sequence[float], size: tuple[int, int]) -> Shares:
    return box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]


def _density(boxes: Sequence[Shares]) -> np.ndarray:
    """Which share of the boxes covers each cell, by the covered share of the cell."""
    edges = np.arange(CELLS + 1) / CELLS
    low, high = edges[:-1], edges[1:]
    total = np.zeros((CELLS, CELLS))
    for x1, y1, x2, y2 in boxes:
        across = np.clip(np.minimum(high, x2) - np.maximum(low, x1), 0, None) * CELLS
        down = np.clip(np.minimum(high, y2) - np.maximum(low, y1), 0, None) * CELLS
        total += np.outer(down, across)
    return total / max(len(boxes), 1)
