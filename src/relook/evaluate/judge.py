"""A judge: a model behind an OpenAI-compatible endpoint that says how far an answer agrees with the accepted one.

The paper's protocol (spec.md section 10): question, accepted answer and the model's answer in, `score: s` out, s from 0
to 1, temperature 0, at most 64 tokens; the wording is ours. What could not be judged has no score and says why: it is
never 0. Judgements are kept by content in a file, so that no answer is paid for twice. `judge_folder` gives the records
of a finished evaluation the score "judge"; it needs no model of ours and can be repeated.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relook.errors import RelookError, UserError
from relook.evaluate.executors import Progress
from relook.evaluate.records import RECORDS, RESULTS, answered, read_folder, to_lines, write_files
from relook.evaluate.results import Evaluation
from relook.io import append_lines, locked_folder, read_lines

SYSTEM = (
    "You grade answers to questions about images. You are given a question, the standard answer and the answer of a "
    "model. Judge only whether the model's answer means the same as the standard answer: other wording, case, units or "
    "additional true detail do not matter, a wrong or missing fact does. Reply with one line and nothing else, "
    "'score: S', where S is a number from 0 (wrong) to 1 (right); numbers between are for answers right in part."
)
ASKED = "Question: {question}\nStandard answer: {accepted}\nModel's answer: {answer}"
MAX_TOKENS = 64
SCORE = "judge"
_SCORE = re.compile(  # "score: 0.5", "Score is 0,5"; not "1/10", "1 out of 10", "50%", "0.5-0.7"
    r"\bscore\b(?: is)?(?:\W*S\b)?\W*?(-?(?:\d+(?:[.,]\d+)?|[.,]\d+)(?:e-?\d+)?)"
    r"(?![.,]?\d|\s*[/%]|\s*-\s*\.?\d|\s*(?:points? )?(?:out )?of\b|\s*to \d)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class JudgeRequest:
    """An answer to judge, with all that would have been right."""

    question: str
    accepted: tuple[str, ...]
    answer: str

    def message(self) -> str:
        return ASKED.format(question=self.question, accepted=" / ".join(self.accepted), answer=self.answer or "(empty)")


@dataclass(frozen=True)
class Judgement:
    """`score` in 0..1, or None and the `problem` in words.

    model         that judged, with its version, as the endpoint names it
    reply         what it wrote
    tokens_in     of the request that was paid for, `tokens_out` of the reply; both 0 for one that was cached
    """

    score: float | None
    problem: str | None = None
    model: str | None = None
    reply: str | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    cached: bool = False


def parse_score(reply: str) -> float | None:
    """The number after "score"; None where there is none, several that differ, or one outside 0..1.

    >>> parse_score("Score: 0.5"), parse_score("score: 7/10"), parse_score("I cannot tell.")
    (0.5, None, None)
    """
    found = {float(number.replace(",", ".")) for number in _SCORE.findall(reply)}
    return found.pop() if len(found) == 1 and 0 <= min(found) <= 1 else None


class Judge:
    """Asks the endpoint, several answers at a time.

    Args:
        model: as the endpoint calls it.
        url: of the endpoint ("http://localhost:8000/v1"); None: OPENAI_BASE_URL, else OpenAI's.
        cache: a file (JSON lines, grows) of what was judged before; None keeps nothing.
        concurrency: requests under way at once.
        timeout: seconds that one request may take.
        retries: of a request that failed, was refused as one too many, or took too long.

    Raises:
        UserError: no client installed, no key.
    """

    def __init__(
        self,
        model: str,
        url: str | None = None,
        cache: str | Path | None = None,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 5,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise UserError(
                "judging needs the openai client, which is not installed; pip install 'relook[eval]'"
            ) from None
        key = os.environ.get("OPENAI_API_KEY") or ("none" if url or os.environ.get("OPENAI_BASE_URL") else None)
        if key is None:
            raise UserError("OPENAI_API_KEY is not set; set it, or give the URL of an endpoint that needs none")
        self.model, self.concurrency = model, concurrency
        self.client = openai.OpenAI(api_key=key, base_url=url, timeout=timeout, max_retries=retries)
        self.cache = Cache(Path(cache) if cache is not None else None)

    def judge(self, requests: Sequence[JudgeRequest], progress: Progress | None = None) -> list[Judgement]:
        """Judgements in the order of the requests; `progress("judged", done, all)` is called as they come in.

        Raises:
            UserError: the endpoint refuses the key or does not know the model: no answer would ever be judged.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._one, request) for request in requests]
            try:
                for count, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    if progress is not None:
                        progress("judged", count, len(requests))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in futures]

    def _one(self, request: JudgeRequest) -> Judgement:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": request.message()}]
        asked = [str(self.client.base_url), self.model, MAX_TOKENS, messages]
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        known = self.cache.known.get(key)
        if known is not None:
            return Judgement(**(known | {"tokens_in": 0, "tokens_out": 0, "cached": True}))
        judged = self._ask(messages)
        if judged.score is not None:
            self.cache.put(key, asdict(judged))
        return judged

    def _ask(self, messages: list[dict[str, str]]) -> Judgement:
        import openai

        try:
            said = self.client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]
                temperature=0,
                max_tokens=MAX_TOKENS,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise UserError(
                f"the judge at {self.client.base_url} refuses: {_words(error)}; check the key (OPENAI_API_KEY), "
                f"the URL and the model's name ({self.model!r})"
            ) from error
        except openai.OpenAIError as error:
            return Judgement(None, f"{type(error).__name__}: {_words(error)}")
        except ValueError as error:  # a reply that is no JSON
            return Judgement(None, f"the endpoint's reply cannot be read ({type(error).__name__}: {error})")
        return _read(said)


def _read(said: Any) -> Judgement:
    """The judgement in a reply of the API; endpoints differ in what they leave out."""
    try:
        reply = said.choices[0].message.content or ""
    except (AttributeError, IndexError, TypeError):
        return Judgement(None, f"the endpoint's reply holds no text: {str(said)[:80]!r}")
    usage = getattr(said, "usage", None)
    paid, written = (int(getattr(usage, name, 0) or 0) for name in ("prompt_tokens", "completion_tokens"))
    score = parse_score(reply)
    problem = None if score is not None else f"no score from 0 to 1 in {reply[:80]!r}"
    return Judgement(score, problem, getattr(said, "model", None), reply, paid, written)


def _words(error: Exception) -> str:
    return " ".join(str(getattr(error, "message", None) or error).split())[:200]


class Cache:
    """Judgements by content; in memory, and appended to a file (JSON lines) where one is named."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.lock = path, threading.Lock()
        self.known: dict[str, dict[str, Any]] = {}
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("a").close()
            except OSError as error:
                raise UserError(f"{path}: cannot be written ({error.strerror}); choose another cache") from error
            names = Judgement.__dataclass_fields__
            entries = [entry for entry in read_lines(path) if isinstance(entry, dict) and {"key", *names} <= {*entry}]
            self.known = {entry["key"]: {name: entry[name] for name in names} for entry in entries}

    def put(self, key: str, judged: dict[str, Any]) -> None:
        with self.lock:
            self.known[key] = judged
            if self.path is not None:
                append_lines(self.path, [{"key": key, **judged}])


# ---- whole folders


def judge_folder(
    path: str | Path, judge: Judge, progress: Progress | None = None, prices: tuple[float, float] | None = None
) -> Evaluation:
    """Judge all answers in a folder that `relook evaluate --out` wrote, and write its files again with the judgements.

    A record that was judged has `scores["judge"]` and `judged` (the model that judged, what it wrote); one that could
    not be has `judged` with the problem, and no score.

    Args:
        prices: of a million tokens in and out, so that the run's account has a cost.

    Raises:
        UserError: no such folder; the endpoint refuses every request.
        RelookError: not one answer could be judged; the files stay as they were.
    """
    path = Path(path)
    if prices is not None and min(prices) < 0:
        raise UserError(f"prices {prices[0]:g} and {prices[1]:g}; expected what a million tokens cost, 0 or more")
    if not (path / RECORDS).is_file():
        raise UserError(f"{path}: no {RECORDS} in it; give a folder that `relook evaluate --out` wrote")
    with locked_folder(path):
        return _judged(path, judge, progress, prices)


def _judged(path: Path, judge: Judge, progress: Progress | None, prices: tuple[float, float] | None) -> Evaluation:
    folder = read_folder(path)
    answers = [record for record in folder.records if answered(record)]
    requests = [JudgeRequest(r["question"], tuple(r["accepted"]), r.get("answer") or "") for r in answers]
    judgements = judge.judge(requests, progress)
    if answers and all(judgement.score is None for judgement in judgements):
        raise RelookError(f"not one of {len(answers)} answers could be judged; the first: {judgements[0].problem}")
    for record, judgement in zip(answers, judgements, strict=True):
        said = {"model": judgement.model, "reply": judgement.reply, "problem": judgement.problem}
        record["judged"] = {key: value for key, value in said.items() if value is not None}
        record["scores"] = {name: score for name, score in record["scores"].items() if name != SCORE}
        if judgement.score is not None:
            record["scores"][SCORE] = judgement.score
    names = dict.fromkeys(name for record in folder.records for name in record["scores"] if name != SCORE)
    scores = {record["task"]: (*names, SCORE) for record in folder.records}
    run = {**folder.run, SCORE: _account(judge, judgements, prices)}
    evaluation = Evaluation.of(run, folder.records, scores, int(run.get("seed", 0)))
    results = json.dumps(evaluation.to_dict(), indent=2, ensure_ascii=False)
    texts = {path / RECORDS: to_lines(folder.records), path / RESULTS: results}
    write_files({file: text.encode("utf-8", "backslashreplace") for file, text in texts.items()})
    return evaluation


def _account(
    judge: Judge, judgements: Sequence[Judgement], prices: tuple[float, float] | None = None
) -> dict[str, Any]:
    """The judges and the cost: answers by the model (and version) that judged them, requests, tokens, failures.

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
