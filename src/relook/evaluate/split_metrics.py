"""Scores that are defined for a whole split only: F1 and CIDEr are no means over items.

A `SplitScore` turns each answered record into a vector of parts (counts), and the sum of the parts over records into
one number; its interval comes from drawing images, whose parts are added up. `of` is the item score
whose records it is about; it applies by itself where that score is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from relook.errors import UserError
from relook.evaluate.metrics import caption_words, read_yes_no
from relook.evaluate.records import Record, cluster_key
from relook.evaluate.statistics import Estimate, ratio, resampled

Parts = Callable[[Sequence[Record]], np.ndarray]  # records -> (n, k)
Value = Callable[[np.ndarray], np.ndarray]  # sums (..., k) -> (...); NaN where it is not defined


@dataclass(frozen=True)
class SplitScore:
    """`about`: what it is; `fields`: what the records' fields must all be (None: anything); `library`: the module that
    it needs."""

    name: str
    about: str
    of: str
    parts: Parts
    value: Value
    fields: frozenset[str] | None = None
    library: str | None = None

    def applies(self, records: Sequence[Record]) -> bool:
        """Whether these records have it, as far as this machine can compute it."""
        scored = [record for record in records if self.of in record["scores"]]
        known = self.fields is None or {record["field"] for record in scored} == self.fields
        return bool(scored) and known and self.available

    @property
    def available(self) -> bool:
        return self.library is None or find_spec(self.library) is not None

    def require(self) -> None:
        """Raise a UserError that says what to install, where the library is missing."""
        if not self.available:
            raise UserError(f"{self.name} needs {self.library}, which is not installed; pip install 'relook[captions]'")

    def estimate(self, records: Sequence[Record], seed: int = 0) -> Estimate:
        """The score over the records that have the item score, with its 95 % bootstrap interval by image."""
        scored = [record for record in records if self.of in record["scores"]]
        return resampled(self.parts(scored), self.value, clusters=[*map(cluster_key, scored)], seed=seed)


def split_scores(records: Sequence[Record], seed: int = 0) -> dict[str, Estimate]:
    """Every row of `SPLIT_SCORES` that applies to these answered records."""
    return {row.name: row.estimate(records, seed) for row in SPLIT_SCORES.values() if row.applies(records)}


def _said(record: Record) -> str:
    return record.get("answer") or ""


def _yes_no_counts(records: Sequence[Record]) -> np.ndarray:
    """(n, 4): said yes to a yes, said yes to a no, did not say yes to a yes, one item."""
    truths = [read_yes_no(record["accepted"][0]) == "yes" for record in records]
    said = [read_yes_no(_said(record)) == "yes" for record in records]
    pairs = zip(said, truths, strict=True)
    return np.array([(s and t, s and not t, t and not s, 1) for s, t in pairs], dtype=float).reshape(-1, 4)


def _by_source(records: Sequence[Record]) -> np.ndarray:
    """(n, 6): right answers and items of each of CV-Bench's sources."""
    parts = np.zeros((len(records), 2 * len(CV_BENCH_SOURCES)))
    for row, record in enumerate(records):
        at = 2 * CV_BENCH_SOURCES.index(record["field"] or "")
        parts[row, at : at + 2] = record["scores"]["choice"], 1
    return parts


def _cv_bench(sums: np.ndarray) -> np.ndarray:
    ade, coco, omni = (ratio(sums[..., at], sums[..., at + 1]) for at in (0, 2, 4))
    return ((ade + coco) / 2 + omni) / 2


def _ciders(records: Sequence[Record]) -> np.ndarray:
    """(n, 2): CIDEr-D of each caption, by pycocoevalcap with the split's own references, and one item.

    Words are `caption_words` and not the Penn Treebank's, whose tokenizer needs Java, so that figures may differ a
    little from COCO's. The scorer's usual factor of 10 is kept: 1.0 is not the most there is.
    """
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer()
    for record in records:
        answer, *references = (" ".join(caption_words(text)) for text in (_said(record), *record["accepted"]))
        scorer += (answer, references)
    _, values = scorer.compute_score()
    return np.stack([np.asarray(values), np.ones(len(records))], axis=1)


CV_BENCH_SOURCES = ("ADE20K", "COCO", "Omni3D")

SPLIT_SCORES: dict[str, SplitScore] = {
    row.name: row
    for row in (
        SplitScore("yes_precision", "of the answers yes, the share that is right", "yes_no", _yes_no_counts,
                   lambda s: ratio(s[..., 0], s[..., 0] + s[..., 1])),
        SplitScore("yes_recall", "of the questions whose answer is yes, the share answered so", "yes_no",
                   _yes_no_counts, lambda s: ratio(s[..., 0], s[..., 0] + s[..., 2])),
        SplitScore("yes_f1", "harmonic mean of the two (POPE's F1)", "yes_no", _yes_no_counts,
                   lambda s: ratio(2 * s[..., 0], 2 * s[..., 0] + s[..., 1] + s[..., 2])),
        SplitScore("yes_ratio", "the share of answers that are yes", "yes_no", _yes_no_counts,
                   lambda s: ratio(s[..., 0] + s[..., 1], s[..., 3])),
        SplitScore("cv_bench", "((ADE20K + COCO) / 2 + Omni3D) / 2 of the accuracies by source (arXiv 2406.16860)",
                   "choice", _by_source, _cv_bench, frozenset(CV_BENCH_SOURCES)),
        SplitScore("cider", "CIDEr-D of captions (Vedantam et al., arXiv 1411.5726), mean over items", "rouge_l",
                   _ciders, lambda s: ratio(s[..., 0], s[..., 1]), library="pycocoevalcap"),
    )
}  # fmt: skip
