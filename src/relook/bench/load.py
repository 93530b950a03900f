"""A server under load: `relook bench load`.

Clients ask over HTTP and read the stream; each asks again as soon as it has its answer (closed loop). Every question
has an image of its own, so that no server answers from what it has kept. What is measured, as the clients see it:

    requests/s    answers, over the time from the first question to the end of the last answer
    first token   from sending a question to its first piece of text
    per token     between pieces of text, over all of them: streams that stall show in the 99th percentile

Servers take turns, number of clients by number of clients, so that a slow minute affects all alike. Values are over all
rounds; intervals are 95 % bootstrap intervals over rounds, which are resampled whole.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean
from typing import Any

from relook.errors import RelookError

QUESTION = "What is the code in the red box?"
LEAST = 8  # questions of a measurement
DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True)
class Target:
    """A server to measure.

    Attributes:
        name: in the table.
        address: without /v1.
        model: its name in the API.
        extra: fields of a request besides OpenAI's.
        key: API key, where it asks for one.
    """

    name: str
    address: str
    model: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Reply:
    """An answer as its client saw it: seconds to the first piece of text and between pieces, and what it cost.

    tokens   of the answer, and of prompt and answer; 0 where the server does not say
    """

    first: float
    gaps: tuple[float, ...]
    tokens: int
    total: int = 0


@dataclass(frozen=True)
class Cell:
    """One measurement of a server with some clients: seconds and answers."""

    seconds: float
    replies: tuple[Reply, ...]


Cells = Mapping[tuple[str, int], Sequence[Cell]]  # server, clients -> rounds
Measure = Callable[[Sequence[Cell]], float]


def _firsts(share: float) -> Measure:
    return lambda cells: percentile([reply.first for cell in cells for reply in cell.replies], share)


def _gaps(share: float) -> Measure:
    return lambda cells: 1000 * percentile([gap for cell in cells for r in cell.replies for gap in r.gaps], share)


def _rate(cells: Sequence[Cell]) -> float:
    return sum(len(cell.replies) for cell in cells) / sum(cell.seconds for cell in cells)


# column -> value over some rounds, and its form
MEASURES: dict[str, tuple[Measure, str]] = {
    "requests/s": (_rate, "{:.2f}"),
    "first token p50": (_firsts(0.5), "{:.2f} s"),
    "first token p99": (_firsts(0.99), "{:.2f} s"),
    "per token p50": (_gaps(0.5), "{:.1f} ms"),
    "per token p99": (_gaps(0.99), "{:.1f} ms"),
}
COMPARED = ("requests/s", "first token p50", "per token p50")


def measure(
    targets: Sequence[Target],
    clients: Sequence[int],
    rounds: int,
    per_client: int,
    tokens: int,
    seed: int = 0,
    status: Callable[[str], None] = lambda text: None,
) -> Cells:
    """Measure every server with every number of clients, after a few answers that are not counted.

    Args:
        targets: the servers.
        clients: numbers of clients.
        rounds: measurements of each.
        per_client: questions of a client in one measurement, on average.
        tokens: of an answer, at most.
        seed: of the images.
        status: called with a short text about what is being measured.
    """
    cells: dict[tuple[str, int], list[Cell]] = {(target.name, n): [] for target in targets for n in clients}
    for target in targets:
        status(f"{target.name}: warming up")
        asyncio.run(_drive(target, bodies(target, 4, tokens, f"{seed} warm"), 2))
    for turn in range(rounds):
        for n in clients:
            for target in targets:
                status(f"round {turn + 1} of {rounds}: {target.name}, {n} clients")
                asked = bodies(target, max(LEAST, per_client * n), tokens, f"{seed} {turn} {n}")
                cells[target.name, n].append(asyncio.run(_drive(target, asked, n)))
    return cells


def bodies(target: Target, count: int, tokens: int, seed: str) -> list[bytes]:
    """Bodies of requests, each with an image of its own (504 x 504 pixels); the same for every server."""
    from PIL import Image

    rng, made = random.Random(seed), []
    for _ in range(count):
        file = io.BytesIO()
        Image.frombytes("RGB", (18, 18), rng.randbytes(18 * 18 * 3)).resize((504, 504), 0).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
        body = {"model": target.model, "messages": [{"role": "user", "content": content}], "stream": True}
        made.append(json.dumps({**body, "max_tokens": tokens, "temperature": 0, **target.extra}).encode())
    return made


async def _drive(target: Target, asked: Sequence[bytes], clients: int) -> Cell:
    """Ask all questions with so many clients, each asking the next one that is left."""
    import httpx2

    left = iter(asked)
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {target.key}"} if target.key else {}
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=target.address, headers=headers, timeout=None, limits=limits) as http:

        async def client() -> list[Reply]:
            return [await _ask(http, target.name, body) for body in left]

        begin = time.perf_counter()
        try:
            replies = await asyncio.gather(*(client() for _ in range(clients)))
        except httpx2.TransportError as error:
            raise RelookError(f"{target.name} broke off ({type(error).__name__}: {error})") from error
        return Cell(time.perf_counter() - begin, tuple(reply for each in replies for reply in each))


async def _ask(http: Any, server: str, body: bytes) -> Reply:
    times, tokens, total = [time.perf_counter()], 0, 0
    async with http.stream("POST", "/v1/chat/completions", content=body) as response:
        if response.status_code != 200:
            said = (await response.aread()).decode(errors="replace")
            raise RelookError(f"{server} answered with status {response.status_code}: {said[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now, chunk = time.perf_counter(), json.loads(line[6:])
            if "error" in chunk:
                raise RelookError(f"{server} broke off an answer: {str(chunk['error'])[:300]}")
            times += [now for choice in chunk["choices"] if choice["delta"].get("content")]
            usage = chunk.get("usage") or (chunk.get("relook") or {}).get("usage") or {}
            tokens = usage.get("completion_tokens") or usage.get("generated_tokens") or tokens
            total = usage.get("total_tokens") or usage.get("sequence_length") or total
    if len(times) < 2:
        raise RelookError(f"{server} answered without any text")
    gaps = tuple(b - a for a, b in pairwise(times[1:]))
    return Reply(times[1] - times[0], gaps, tokens or len(times) - 1, total)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that a share of the values do not exceed (nearest rank); nan of none.

    >>> percentile([1, 2, 3, 4], 0.5), percentile([1, 2, 3, 4], 0.99)
    (2, 4)
    """
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)] if ordered else float("nan")


# -- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """A ratio of two measurements, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Load:
    """Results.

    Attributes:
        about: what was measured on which machine.
        cells: the measurements.
        notes: what is missing, and why.
        seed: of the bootstrap.
    """

    about: str
    cells: Cells
    notes: tuple[str, ...] = ()
    seed: int = 0

    @property
    def values(self) -> dict[tuple[str, int], dict[str, float]]:
        """Server, clients -> column -> value."""
        return {
            key: {name: value(rounds) for name, (value, _) in MEASURES.items()} for key, rounds in self.cells.items()
        }

    @property
    def ratios(self) -> dict[tuple[str, int], dict[str, Ratio]]:
        """The first server over each other one with as many clients, and over itself with the fewest."""
        first, fewest = next(iter(self.cells))
        found = {}
        for name, n in self.cells:
            if name != first:
                found[f"{first} / {name}", n] = self._compare((first, n), (name, n))
        for name, n in self.cells:
            if name == first and n != fewest:
                found[f"{first} / with {fewest} client{'s' * (fewest > 1)}", n] = self._compare(
                    (first, n), (first, fewest)
                )
        return found

    def _compare(self, one: tuple[str, int], other: tuple[str, int]) -> dict[str, Ratio]:
        rng, n = random.Random(self.seed), len(self.cells[one])
        draws = [range(n), *(rng.choices(range(n), k=n) for _ in range(DRAWS))]
        found = {}
        for name in COMPARED:
            value = MEASURES[name][0]
            all_, *drawn = (
                value([self.cells[one][k] for k in draw]) / value([self.cells[other][k] for k in draw])
                for draw in draws
            )
            drawn.sort()
            found[name] = Ratio(all_, drawn[int(0.025 * DRAWS)], drawn[int(0.975 * DRAWS) - 1])
        return found

    def to_dict(self) -> dict[str, Any]:
        counts = {key: sum(len(cell.replies) for cell in rounds) for key, rounds in self.cells.items()}
        return {
            "about": self.about,
            "servers": [{"server": k[0], "clients": k[1], "answers": counts[k], **v} for k, v in self.values.items()],
            "ratios": [
                {"ratio": k[0], "clients": k[1], **{name: vars(ratio) for name, ratio in v.items()}}
                for k, v in self.ratios.items()
            ],
            "tokens": self.tokens,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        shown = {
            key: {name: MEASURES[name][1].format(value) for name, value in row.items()}
            for key, row in self.values.items()
        }
        parts = [self.about, *_table(shown)]
        if ratios := self.ratios:
            parts += ["", *_table({key: {n: str(r) for n, r in row.items()} for key, row in ratios.items()})]
        tokens = self.tokens
        said = ", ".join(f"{name} {count:.0f}" for name, count in tokens.items())
        unlike = "; NOT ALIKE" if max(tokens.values()) > 1.05 * min(tokens.values()) else ""
        return "\n".join([*parts, "", f"tokens of a conversation with its answer: {said}{unlike}", *self.notes])

    @property
    def tokens(self) -> dict[str, float]:
        """Server -> tokens of a conversation with its answer, on the mean."""
        found: dict[str, list[int]] = {}
        for (name, _), rounds in self.cells.items():
            found.setdefault(name, []).extend(reply.total for cell in rounds for reply in cell.replies)
        return {name: mean(counts) for name, counts in found.items()}


def _table(rows: Mapping[tuple[str, int], Mapping[str, str]]) -> Iterator[str]:
    width = max(len(name) for name, _ in rows)
    columns = list(next(iter(rows.values())))
    yield f"{'':{width}}  clients" + "".join(f"  {column:>18}" for column in columns)
    before = None
    for (name, clients), row in rows.items():
        yield f"{name if name != before else '':{width}}  {clients:7}" + "".join(f"  {row[c]:>18}" for c in columns)
        before = name
