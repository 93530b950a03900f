"""`relook bench load`: every question is asked once, by so many clients, and the table is what was measured."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from support.running_server import running, serving

import relook
from relook.bench.load import Cell, Load, Reply, Target, bodies, measure, percentile
from relook.bench.servers import run, run_at
from relook.cli.app import app
from relook.errors import RelookError, UserError
from relook.perceive.local import LocalEngine


class Stub:
    """An OpenAI-compatible server of a few lines: three pieces of text, and what it was asked."""

    def __init__(self, refuse: int = 0, broken: bool = False):
        self.asked: list[dict] = []
        self.together = self.most = 0
        self.refuse, self.broken = refuse, broken
        self.app = FastAPI()
        self.app.post("/v1/chat/completions")(self.chat)
        self.app.get("/v1/models")(lambda: {"object": "list", "data": [{"id": "stub"}]})

    async def chat(self, http: Request):
        self.asked.append(await http.json())
        if self.refuse:
            return JSONResponse({"error": {"message": "too many"}}, status_code=self.refuse)
        return StreamingResponse(self.pieces(), media_type="text/event-stream")

    async def pieces(self):
        self.together += 1
        self.most = max(self.most, self.together)
        await asyncio.sleep(0.05)  # until the others are there, too
        chunks = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        chunks += [{"choices": [{"delta": {"content": text}}]} for text in ("4", "0", "7")]
        chunks += [{"choices": [{"delta": {}}], "usage": {"completion_tokens": 5, "total_tokens": 25}}]
        if self.broken:
            chunks[2:] = [{"error": {"message": "it burns"}}]
        for chunk in chunks:
            yield f": a comment\n\ndata: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"
        self.together -= 1


def test_so_many_clients_ask_every_question_once():
    stub = Stub()
    with running(stub.app) as address:
        target = Target("stub", address, "stub", {"relook": {"look": "none"}})
        cells = measure([target], [1, 3], rounds=2, per_client=5, tokens=3)
    assert stub.most == 3 and len(stub.asked) == 4 + 2 * (8 + 15)
    assert len({json.dumps(body) for body in stub.asked}) == len(stub.asked)  # no image twice
    assert all(body["max_tokens"] == 3 and body["stream"] and body["relook"] for body in stub.asked)
    assert [[len(cell.replies) for cell in cells["stub", n]] for n in (1, 3)] == [[8, 8], [15, 15]]
    for cell in cells["stub", 3]:
        assert all(
            (reply.tokens, reply.total) == (5, 25) and len(reply.gaps) == 2 and reply.first > 0
            for reply in cell.replies
        )
        assert cell.seconds >= max(reply.first + sum(reply.gaps) for reply in cell.replies)


def test_questions_are_the_same_for_every_server_and_run():
    one, other = (bodies(Target(name, "", "m"), 3, 8, "0 1 4") for name in ("a", "b"))
    assert one == other and one != bodies(Target("a", "", "m"), 3, 8, "1 1 4")


@pytest.mark.parametrize(("stub", "said"), [(Stub(refuse=429), "429.*too many"), (Stub(broken=True), "it burns")])
def test_a_server_that_fails_ends_the_measurement(stub, said):
    with running(stub.app) as address, pytest.raises(RelookError, match=said):
        run_at(address, [2], 1, 1, 3)


def test_an_address_without_a_server_is_one_sentence():
    with pytest.raises(UserError, match=r"127.0.0.1:9/? names no model at /v1/models"):
        run_at("http://127.0.0.1:9/v1", [1], 1, 1, 3)


def test_percentiles_are_numpys():
    values = np.random.default_rng(0).random(37)
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        assert percentile(list(values), share) == np.quantile(values, share, method="inverted_cdf")


def cells(seconds: list[float], first: float, gap: float) -> list[Cell]:
    return [Cell(each, (Reply(first, (gap, gap), 3),) * 10) for each in seconds]


def test_the_table_is_of_all_rounds_and_ratios_pair_them():
    measured = {
        ("ours", 1): cells([5, 10], 0.2, 0.01),
        ("ours", 4): cells([2.5, 5], 0.3, 0.02),
        ("other", 1): cells([10, 20], 0.2, 0.01),
        ("other", 4): cells([10, 20], 0.6, 0.04),
    }
    load = Load("a machine", measured, ("a note",))
    assert load.values["ours", 1]["requests/s"] == pytest.approx(20 / 15)
    assert load.values["ours", 4]["per token p99"] == pytest.approx(20)
    ratios = load.ratios
    assert list(ratios) == [("ours / other", 1), ("ours / other", 4), ("ours / with 1 client", 4)]
    best = ratios["ours / other", 4]
    # every round is four times as fast: the interval has no width, however the rounds are drawn
    assert (best["requests/s"].value, best["requests/s"].low, best["requests/s"].high) == pytest.approx((4, 4, 4))
    assert best["first token p50"].value == pytest.approx(0.5)
    assert ratios["ours / with 1 client", 4]["first token p50"].value == pytest.approx(1.5)
    text = str(load)
    assert text.startswith("a machine\n") and text.endswith("\na note") and "4.00 (4.00-4.00)" in text
    told = json.loads(json.dumps(load.to_dict()))
    assert [row["answers"] for row in told["servers"]] == [20] * 4 and len(told["ratios"]) == 3


@pytest.mark.parametrize("look", ["none", "region"])
def test_relooks_server_over_http(look):
    engine = LocalEngine(relook.load("cards-tiny"))
    try:
        with serving(engine) as served:
            load = run_at(f"{served.url}/v1", [2], 1, 1, 6, look)
        assert engine.stats()["looks_total"] == (12 if look == "region" else 0)
    finally:
        engine.close()
    ((name, n), (cell,)) = next(iter(load.cells.items()))
    assert (name, n, len(cell.replies)) == (served.url, 2, 8)
    assert load.values[name, 2]["requests/s"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--clients", "1,x"], "--clients 1,x: expected different whole numbers"),
        (["--clients", "4,4"], "--clients 4,4: expected different whole numbers"),
        (["--url", "http://127.0.0.1:9", "--model", "cards-tiny"], "leave --model and --transformers-serve out"),
        (["--transformers-serve", "/no/such/python"], "/no/such/python: there is no such program"),
    ],
)
def test_wrong_options_are_one_line(options, said, capsys):
    with pytest.raises(SystemExit) as done:
        app(["bench", "load", *options])
    told = capsys.readouterr().err
    assert done.value.code == 2 and told.count("\n") == 1 and said in told


@pytest.mark.slow
def test_both_servers_are_started_and_ended(tmp_path):
    """With a stand-in for `transformers serve`: a Python that fails is told with its last words."""
    load = run("cards-tiny", [1, 2], rounds=1, per_client=1, tokens=4)
    assert [key for key in load.cells] == [(name, n) for name in ("relook serve", "without batching") for n in (1, 2)]
    assert "transformers serve was not measured" in str(load)
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such module >&2\nexit 1\n")
    Path(broken).chmod(0o755)
    with pytest.raises(RelookError, match="transformers serve did not start: no such module"):
        run("cards-tiny", [1], rounds=1, per_client=1, tokens=4, transformers_serve=str(broken))


STOCK = os.environ.get("RELOOK_STOCK_PYTHON")  # tools/stock_env.py


@pytest.mark.slow
@pytest.mark.skipif(STOCK is None, reason="RELOOK_STOCK_PYTHON names no Python with `transformers serve`")
def test_stock_transformers_has_the_same_to_do():
    """The real `transformers serve`: it reads the same image, and writes as long an answer."""
    load = run(None, [2], rounds=1, per_client=1, tokens=4, transformers_serve=STOCK)
    ours, _, stock = ([r for c in rounds for r in c.replies] for rounds in load.cells.values())
    assert len(ours) == len(stock) == 8
    for one, other in zip(ours, stock, strict=True):
        assert abs(one.total - one.tokens - (other.total - other.tokens)) <= 2  # a line break may differ
    assert list(load.ratios)[1] == ("relook serve / transformers serve", 2) and not load.notes


def test_servers_that_do_not_read_the_same_are_said_to():
    alike = {("ours", 1): [Cell(1, (Reply(1, (1,), 4, 360),))], ("stock", 1): [Cell(1, (Reply(1, (1,), 4, 358),))]}
    assert str(Load("", alike)).endswith("ours 360, stock 358")
    other = alike | {("stock", 1): [Cell(1, (Reply(1, (1,), 4, 28),))]}
    assert str(Load("", other)).endswith("ours 360, stock 28; NOT ALIKE")
