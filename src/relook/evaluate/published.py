"""The paper's table, to be printed beside one's own: mean judgement in percent by model, image size and task.

Source: arXiv 2502.17425, as in spec.md section 10. What must be known when numbers are compared is in `CAVEATS`.
"""

from __future__ import annotations

from collections.abc import Mapping

COLUMNS = ("gqa", "openimages", "vsr", "llava", "flickr30k", "cub", "docvqa", "textvqa", "textcaps", "dude", "pope")
AS = {"llava-free": "llava", "llava-single": "llava"}  # tasks of which a column is the mean
NOT_TRAINED_ON = ("flickr30k", "dude", "pope")

# (model, longest side in pixels) -> scores in the order of COLUMNS, percent
PUBLISHED: dict[tuple[str, int], tuple[float, ...]] = {
    ("Qwen2-VL-2B", 224): (44.8, 41.3, 56.1, 65.5, 52.1, 62.1, 5.1, 38.3, 39.0, 6.3, 82.1),
    ("Qwen2-VL-7B", 224): (46.4, 44.2, 63.2, 70.3, 52.4, 69.7, 6.3, 42.1, 43.1, 9.5, 82.7),
    ("2B-VPT (DINO)", 224): (60.6, 84.2, 65.7, 70.5, 55.8, 89.2, 12.5, 53.7, 46.6, 10.3, 84.3),
    ("Qwen2-VL-2B", 512): (48.7, 41.8, 58.0, 72.8, 55.7, 65.2, 30.1, 76.5, 71.0, 25.3, 84.7),
    ("Qwen2-VL-7B", 512): (56.9, 45.6, 64.1, 78.0, 63.6, 68.7, 36.0, 81.6, 73.2, 32.2, 86.6),
    ("2B-VPT (DINO)", 512): (62.5, 87.2, 73.8, 79.7, 66.3, 89.8, 57.3, 86.0, 76.6, 43.0, 89.3),
    ("2B-VPT (DINO, free choice)", 512): (63.5, 87.4, 73.3, 80.2, 70.5, 91.1, 57.6, 86.1, 75.8, 43.8, 95.0),
    ("2B-VPT (CLIP)", 512): (62.1, 87.2, 74.6, 79.1, 66.0, 91.3, 56.7, 85.6, 77.0, 43.3, 88.7),
    ("2B-VPT (SAM)", 512): (61.7, 87.6, 74.6, 79.6, 65.7, 90.5, 55.8, 85.8, 75.0, 43.1, 89.4),
    ("7B-VPT (CLIP)", 512): (63.3, 87.8, 79.0, 83.1, 68.0, 92.1, 65.8, 90.6, 78.8, 53.2, 90.3),
}

CAVEATS = (
    "judged by gpt-4o, its version not said; another judge gives other numbers",
    "a judgement that failed counted as 0 there and is left out here",
    "only judgements compare with it: relook judge FOLDER",
    "the first 1000 items at most, answers sampled, no interval given",
    f"{', '.join(NOT_TRAINED_ON)} were not in the training mix",
)


def beside(judged: Mapping[tuple[str, str], float | None]) -> list[list[str]]:
    """The paper's table for one's own results, as rows of cells with a heading; empty where it has none of the tasks.

    Args:
        judged: mean judgement in percent by (task, look), None where nobody has judged. Behind each published figure
            stands, in brackets, one's own under the first look minus it.
    """
    columns = [c for c in COLUMNS if c in {AS.get(task, task) for task, _ in judged}]
    if not columns:
        return []
    looks = list(dict.fromkeys(look for _, look in judged))
    own = {look: {c: _mean(judged, c, look) for c in columns} for look in looks}
    rows = [["published, judge % (yours - it)", "px", *columns]]
    for look in looks:
        if any(value is not None for value in own[look].values()):
            rows.append([f"yours, {look}", "", *("-" if (v := own[look][c]) is None else f"{v:.1f}" for c in columns)])
    for (model, side), scores in PUBLISHED.items():
        cells = [(scores[COLUMNS.index(c)], own[looks[0]][c]) for c in columns]
        rows.append([model, str(side), *(f"{x:.1f}" if v is None else f"{x:.1f} ({v - x:+.1f})" for x, v in cells)])
    return rows


def _mean(judged: Mapping[tuple[str, str], float | None], column: str, look: str) -> float | None:
    """The mean over the tasks of a column; None where one of them was not judged."""
    values = [v for (task, asked), v in judged.items() if asked == look and AS.get(task, task) == column]
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
