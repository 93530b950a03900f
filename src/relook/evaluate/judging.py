"""Putting a finished evaluation before a judge: its records get the score "judge", its results are summed up again.

Judging needs no model of ours and can be given again: what was judged is in the judge's cache, what could not be is
asked once more. Knows evaluation folders; how a judge is reached is `judge`'s business.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from relook.errors import RelookError, UserError
from relook.evaluate.judge import Judge, Judgement, Plea
from relook.evaluate.perception import comparisons
from relook.evaluate.records import RECORDS, RESULTS, read_folder, write_bytes
from relook.evaluate.results import Evaluation, sum_up

SCORE = "judge"


def judge_folder(
    path: str | Path,
    judge: Judge,
    done: Callable[[int], None] = lambda count: None,
    prices: tuple[float, float] | None = None,
) -> Evaluation:
    """Judge all answers in a folder that `relook evaluate --out` wrote, and write its files again with what was said.

    A record that was judged has `scores["judge"]` and `judged` (the model that judged, what it wrote); one that could
    not be has `judged` with the problem, and no score. `prices`: of a million tokens in and out, so that the account
    of the run has a cost.

    Raises:
        UserError: no such folder; the endpoint refuses everybody.
        RelookError: not one answer could be judged; the files stay as they were.
    """
    path = Path(path)
    if not (path / RECORDS).is_file():
        raise UserError(f"{path}: no {RECORDS} in it; give a folder that `relook evaluate --out` wrote")
    folder = read_folder(path)
    records = [dict(record) for record in folder.records]
    answered = [record for record in records if record["failed"] is None and record["skipped"] is None]
    pleas = [Plea(r["question"], tuple(r["accepted"]), r["answer"] or "") for r in answered]
    judgements = judge.judge(pleas, done)
    for record, judgement in zip(answered, judgements, strict=True):
        told = {"model": judgement.model, "reply": judgement.reply, "problem": judgement.problem}
        record["judged"] = {key: value for key, value in told.items() if value is not None}
        record["scores"] = {name: score for name, score in record["scores"].items() if name != SCORE}
        if judgement.score is not None:
            record["scores"][SCORE] = judgement.score
    if answered and all(judgement.score is None for judgement in judgements):
        raise RelookError(f"not one of {len(answered)} answers could be judged; the first: {judgements[0].problem}")
    run = {**folder.run, SCORE: _account(judge, judgements, prices)}
    seed = int(folder.run.get("seed", 0))
    evaluation = Evaluation(run, _results(records, answered, seed), comparisons(records, seed))
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    results = json.dumps(evaluation.to_dict(), indent=2, ensure_ascii=False)
    write_bytes({path / RECORDS: lines.encode(), path / RESULTS: results.encode()})
    return evaluation


def _results(records: Sequence[Mapping[str, Any]], answered: Sequence[Mapping[str, Any]], seed: int) -> list[Any]:
    """A result for each task and look, sorted; with all scores that occur."""
    scores = [*dict.fromkeys(n for record in answered for n in record["scores"] if n != SCORE), SCORE]
    pairs = list(dict.fromkeys((record["task"], record["look"]) for record in records))
    return [
        sum_up(task, look, [r for r in records if (r["task"], r["look"]) == (task, look)], scores, seed)
        for task, look in pairs
    ]


def _account(
    judge: Judge, judgements: Sequence[Judgement], prices: tuple[float, float] | None = None
) -> dict[str, Any]:
    """Who judged, and what it cost: answers by the model (and version) that judged them, requests, tokens, failures.

    What was known before costs nothing; a reply that could not be read costs what any reply does.
    """
    tokens = [sum(j.tokens_in for j in judgements), sum(j.tokens_out for j in judgements)]
    cost = {}
    if prices is not None:
        spent = sum(price * count / 1e6 for price, count in zip(prices, tokens, strict=True))
        cost = {"prices": list(prices), "cost": round(spent, 6)}
    return {
        "model": judge.model,
        "url": str(judge.client.base_url),
        "judged_by": dict(Counter(j.model or "unnamed" for j in judgements if j.score is not None)),
        "cached": sum(j.cached for j in judgements),
        "unscored": sum(j.score is None for j in judgements),
        "problems": dict(
            Counter((j.problem or "").split(":")[0] for j in judgements if j.score is None).most_common(5)
        ),
        "tokens_in": tokens[0],
        "tokens_out": tokens[1],
        **cost,
    }
