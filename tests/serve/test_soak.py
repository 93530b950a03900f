"""64 clients for a while: good, bad, slow and vanishing ones, against `relook serve` as a process.

Every good answer is the one that the model gives alone, the bad get a 4xx, memory stays where it is.
RELOOK_SOAK_SECONDS (default 30) says how long; 300 before a release.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
from collections import Counter

import httpx2
import pytest
from support.hostile_requests import QUESTION, Sent, changed, good, table
from support.running_server import user
from support.scripted_model import picture

import relook

SECONDS = float(os.environ.get("RELOOK_SOAK_SECONDS", "30"))
CLIENTS = {"good": 32, "talking": 8, "bad": 12, "slow": 4, "vanishing": 8}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server():
    """Address and process; its stderr, line by line, in a list."""
    command = [sys.executable, "-m", "relook", "serve", "cards-tiny", "--port", "0", "--cache", "16", "--waiting", "24"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines: list[str] = []
        ready = threading.Event()

        def read():
            for line in process.stderr:
                lines.append(line)
                if "http://" in line:
                    ready.set()

        threading.Thread(target=read, daemon=True).start()
        assert ready.wait(120), lines
        url = re.search(r"http://127\.0\.0\.1:\d+", "".join(lines)).group()
        try:
            yield url, process, lines
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def questions():
    """(request, the answer that the model gives alone), and conversations of two questions with both answers."""
    vlm = relook.load("cards-tiny")
    single, talks = [], []
    looks = [{}, {"look": "none"}, {"look": "region"}, {"look": "clip"}, {"region": (1, 2, 4, 5)}]
    for number, look in enumerate(looks * 3):
        image = picture(number, (64 + 20 * number, 80 + 11 * number))
        body = {"messages": [user(image, QUESTION)], "max_tokens": 12}
        body["relook"] = {name: list(value) if isinstance(value, tuple) else value for name, value in look.items()}
        single.append((body, vlm.ask(image, QUESTION, max_new_tokens=12, **look).text))
    for number in range(4):
        image, options = picture(number), {"look": "none", "max_new_tokens": 12}
        chat = vlm.chat(image)
        first, second = chat.ask(QUESTION, **options).text, chat.ask("And in the blue one?", **options).text
        talks.append(([user(image, QUESTION), {"role": "user", "content": "And in the blue one?"}], (first, second)))
    return single, talks


class Soak:
    """The clients, what they saw, and when to stop."""

    def __init__(self, url, questions):
        self.url, (self.single, self.talks) = url, questions
        self.saw: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.memory: list[float] = []
        self.draw = random.Random(0)
        self.bad = itertools.cycle([row for row in table() if row[1] != 413 and refused_by_default(row[0])])
        self.loop = asyncio.get_running_loop()
        self.end = self.loop.time() + SECONDS

    @property
    def lasting(self):
        return self.loop.time() < self.end

    async def ask(self, client, body, expected):
        """A good request, whole or streamed: its answer, or 429 and another try."""
        streamed = self.draw.random() < 0.5
        while self.lasting:
            said = ""
            if streamed:
                async with client.stream("POST", CHAT, json={**body, "stream": True}) as answered:
                    lines = [line[6:] async for line in answered.aiter_lines() if line.startswith("data: ")]
                if answered.status_code == 200:
                    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
                    said = chunks[-1]["relook"]["transcript"][-1]["text"] if "relook" in chunks[-1] else str(chunks[-1])
            else:
                answered = await client.post(CHAT, json=body)
                if answered.status_code == 200:
                    said = answered.json()["choices"][0]["message"]["content"]
            self.saw[f"good {answered.status_code}"] += 1
            if answered.status_code == 429:
                await asyncio.sleep(min(2.0, float(answered.headers["retry-after"])) * self.draw.random())
            elif answered.status_code == 200 and said == expected:
                return said
            else:
                self.wrong.append(f"{answered.status_code} {said!r}, expected {expected!r}")
                return None
        return None

    async def good(self, client):
        await self.ask(client, *self.draw.choice(self.single))

    async def talking(self, client):
        (first, second), (one, two) = self.draw.choice(self.talks)
        common = {"max_tokens": 12, "relook": {"look": "none"}}
        if await self.ask(client, {"messages": [first], **common}, one) is not None:
            history = [first, {"role": "assistant", "content": one}, second]
            await self.ask(client, {"messages": history, **common}, two)

    async def bad_one(self, client):
        name, status, how = next(self.bad)
        sent = how if isinstance(how, Sent) else Sent(body=how if isinstance(how, bytes) else changed(good(), how))
        body = sent.body if isinstance(sent.body, bytes) else json.dumps(sent.body).encode() if sent.body else None
        answered = await client.request(sent.method, sent.path, content=body, headers=sent.headers)
        self.saw[f"bad {answered.status_code}"] += 1
        if answered.status_code not in (status, 429):
            self.wrong.append(f"{name}: {answered.status_code} {answered.text[:200]}")
        await asyncio.sleep(0.05)

    async def slow(self, client):
        """A body in drops, and an answer read in drops."""
        body, expected = self.draw.choice(self.single)
        whole = json.dumps(body).encode()

        async def drops():
            for at in range(0, len(whole), len(whole) // 20 + 1):
                yield whole[at : at + len(whole) // 20 + 1]
                await asyncio.sleep(0.05)

        headers = {"Content-Type": "application/json"}
        async with client.stream("POST", CHAT, content=drops(), headers=headers) as answered:
            data = b""
            async for piece in answered.aiter_raw(512):
                data += piece
                await asyncio.sleep(0.002)
        self.saw[f"slow {answered.status_code}"] += 1
        if answered.status_code == 200 and json.loads(data)["choices"][0]["message"]["content"] != expected:
            self.wrong.append(f"slow: {data[:200]!r}")
        elif answered.status_code not in (200, 429):
            self.wrong.append(f"slow: {answered.status_code}")

    async def vanishing(self, client):
        """Gone while it sends, right after, or while the answer comes."""
        body = {**self.draw.choice(self.single)[0], "stream": True, "max_tokens": 200}
        whole = json.dumps(body).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(whole)}\r\n\r\n"
        )
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        point = self.draw.random()
        writer.write(head.encode() + whole[: int(len(whole) * min(1, 3 * point))])
        if point > 0.6:
            await reader.read(200)
        await asyncio.sleep(0.2 * self.draw.random())
        writer.transport.abort()
        self.saw["vanished"] += 1

    async def repeat(self, act):
        async with httpx2.AsyncClient(base_url=self.url, timeout=120, trust_env=False) as client:
            while self.lasting:
                await act(client)

    async def watch(self):
        async with httpx2.AsyncClient(base_url=self.url, timeout=120, trust_env=False) as client:
            while self.lasting:
                self.memory.append(metric((await client.get("/metrics")).text, "process_resident_memory_bytes"))
                await asyncio.sleep(SECONDS / 60)

    async def run(self):
        acts = {**{name: getattr(self, name) for name in CLIENTS if name != "bad"}, "bad": self.bad_one}
        clients = [self.repeat(acts[name]) for name, count in CLIENTS.items() for _ in range(count)]
        await asyncio.gather(self.watch(), *clients)


def refused_by_default(name):
    """Whether a request of the table is over the server's own limits, too, and not only over those of the table."""
    return not name.startswith(("too many", "image: too many", "looks {'image': ['data"))


def metric(text, name):
    return sum(float(line.split()[-1]) for line in text.splitlines() if re.match(rf"{name}(\{{.*)? ", line))


@pytest.mark.slow
def test_soak(server, questions):
    url, process, lines = server

    async def soak():
        run = Soak(url, questions)
        await run.run()
        return run

    run = asyncio.run(soak())
    print(f"{SECONDS:g} s: {dict(run.saw)}; memory {[round(m / 2**20) for m in run.memory[::6]]} MB")
    assert run.wrong == []
    assert run.saw["good 200"] > SECONDS and run.saw["bad 400"] > SECONDS and run.saw["slow 200"] > 0
    assert {status for status in run.saw if status.startswith("good")} <= {"good 200", "good 429"}
    assert process.poll() is None

    logged = [json.loads(line) for line in lines if line.startswith("{")]
    statuses = Counter(entry["status"] for entry in logged if "status" in entry)
    assert not [status for status in statuses if status and status >= 500], statuses
    assert not [entry for entry in logged if entry["level"] in ("error", "critical")], logged[:3]
    assert not [line for line in lines if not line.startswith(("{", "relook:"))]
    assert "base64" not in "".join(lines) and QUESTION not in "".join(lines)

    with httpx2.Client(base_url=url, trust_env=False) as client:
        for _ in range(100):  # nothing is left at work
            numbers = client.get("/metrics").text
            if metric(numbers, "relook_engine_rows") == metric(numbers, "relook_engine_waiting") == 0:
                break
            client.get("/health")
        assert metric(numbers, "relook_engine_rows") == metric(numbers, "relook_engine_waiting") == 0
        body, expected = questions[0][0]
        assert client.post(CHAT, json=body, timeout=60).json()["choices"][0]["message"]["content"] == expected

    quarter = len(run.memory) // 4  # it grows until all shapes and the cache have been there, for about a minute
    before, last = run.memory[2 * quarter : 3 * quarter], run.memory[-quarter:]
    assert sum(last) / len(last) < (1.03 if SECONDS >= 120 else 1.15) * sum(before) / len(before)
