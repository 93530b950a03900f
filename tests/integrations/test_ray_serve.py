"""Ray Serve: no answer is lost or wrong where a replica is. Slow: on a real cluster, with a replica that is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from types import SimpleNamespace

import httpx2
import psutil
import pytest
from openai import OpenAI
from support.running_server import user
from support.scripted_model import picture

import relook
from relook.errors import RelookError, UserError
from relook.integrations.ray_serve import FACTS, RayEngine, RaySettings, build
from relook.options import AskOptions
from relook.perceive.engine import DeadlineExceeded, EngineBusy, EngineClosed, Request
from relook.trace import Finished, TextDelta

TEXTS = [TextDelta("4"), TextDelta("0"), TextDelta("7")]
DONE = Finished(SimpleNamespace(text="407"))


class Gone(Exception):
    pass


class Handle:
    """A deployment whose replicas give these items, one list a request; an exception among them is raised."""

    def __init__(self, *replies):
        self.replies, self.asked, self.cancelled = list(replies), [], 0
        self.facts = SimpleNamespace(remote=self._facts)
        self.answer = SimpleNamespace(remote=self._answer)

    def options(self, stream):
        return self

    async def _facts(self):
        return dict.fromkeys(FACTS, "x")

    async def _answer(self, request):
        self.asked.append(request)
        try:
            for item in self.replies.pop(0):
                if isinstance(item, Exception) and not isinstance(item, RelookError):
                    raise item
                if isinstance(item, float):
                    await asyncio.sleep(item)
                else:
                    yield item
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def ask(*replies, timeout=None, **options):
    handle = Handle(*replies)
    engine = RayEngine(handle, (Gone,))
    request = Request("What?", options=AskOptions.of(options))
    return handle, engine, lambda: list(engine.submit(request, timeout))


def test_events_pass_through():
    _, engine, run = ask([None, *TEXTS, DONE])
    assert run() == [*TEXTS, DONE] and engine.name == "x"
    assert engine.stats()["asked_again_total"] == 0


@pytest.mark.parametrize("last", [Gone(), EngineClosed("stopping")], ids=["killed", "stopping"])
def test_what_a_lost_replica_had_sent_is_not_sent_twice(last):
    handle, engine, run = ask([last], [None, *TEXTS[:2], last], [None, last], [None, *TEXTS, DONE])
    assert run() == [*TEXTS, DONE]
    assert len(handle.asked) == 4 and engine.stats()["asked_again_total"] == 3


def test_another_answer_after_a_loss_is_an_error_and_never_mixed():
    _, _, run = ask([None, *TEXTS[:2], Gone()], [None, TextDelta("4"), TextDelta("1"), DONE])
    with pytest.raises(RelookError, match="another one answers otherwise"):
        run()


def test_sampling_without_a_seed_draws_the_same_again():
    handle, _, run = ask([None, Gone()], [None, DONE], do_sample=True)
    run()
    first, second = (request.options.seed for request in handle.asked)
    assert first is not None and first == second


@pytest.mark.parametrize("error", [UserError("too long"), EngineBusy("wait", 7.5)])
def test_what_a_replica_refuses_is_refused_at_once(error):
    handle, engine, _ = ask([error])
    with pytest.raises(type(error), match=str(error)) as caught:
        engine.submit(Request("What?"))
    assert caught.value is error and len(handle.asked) == 1


def test_the_end_of_all_replicas_is_a_sentence():
    _, _, run = ask(*[[Gone()]] * 5)
    with pytest.raises(EngineClosed, match="no replica"):
        run()


def test_time_and_cancelling():
    handle, engine, run = ask([None, TEXTS[0], 30.0], timeout=0.2)
    with pytest.raises(DeadlineExceeded):
        run()
    handle.replies = [[None, TEXTS[0], 30.0]]
    for _ in engine.submit(Request("What?")):
        break  # the client has gone
    wait_for(lambda: handle.cancelled == 2 and engine.stats()["running"] == 0)


def test_busy_keeps_its_time_between_processes():
    import pickle

    error = pickle.loads(pickle.dumps(EngineBusy("wait", 7.5)))
    assert (str(error), error.retry_after) == ("wait", 7.5)


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_it_is_a_sentence():
    with pytest.raises(UserError, match=r"pip install 'relook\[ray-serve\]'"):
        build({"model": "cards-tiny"})


def test_arguments_are_those_of_the_command_line():
    assert RaySettings.model_validate({"model": "m", "replicas": "2", "gpus": "0.5"}).gpus == 0.5


# ---- a real cluster

SERVE = """
import sys, time, ray
from ray import serve
from relook.integrations.ray_serve import build
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(build({"model": "cards-tiny", "replicas": "2", "cpus": "0.5", "rows": "4"}))
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


@pytest.fixture
def cluster(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(port)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip
    try:
        if process.stdout.readline() != "ready\n":
            pytest.fail((tmp_path / "log").read_text()[-3000:])
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def replicas(driver: int) -> list[psutil.Process]:
    """Processes of the model's replicas in the driver's cluster."""
    found = psutil.Process(driver).children(recursive=True)
    return [p for p in found if "ServeReplica" in (line := " ".join(p.cmdline())) and "Model" in line]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None or find_spec("ray.serve") is None, reason="needs ray[serve]")
def test_a_killed_replica_loses_no_answer(cluster):
    address, driver = cluster
    vlm = relook.load("cards-tiny")
    asked = [(picture(seed), f"What is the code in the {color} box?", look)
             for seed, color in enumerate(("red", "blue", "green"))
             for look in ("auto", "none", "region", "clip")]  # fmt: skip
    offline = [vlm.ask(image, question, look=look) for image, question, look in asked]
    victim = replicas(driver)
    assert len(victim) == 2
    found, failed, stop = [], [], threading.Event()

    def client(number: int) -> None:
        api = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        turn = number
        while not stop.is_set():
            image, question, look = asked[turn % len(asked)]
            try:
                stream = api.chat.completions.create(
                    model="cards-tiny", messages=[user(image, question)], stream=True, max_tokens=64,
                    extra_body={"relook": {"look": look}},
                )  # fmt: skip
                chunks = list(stream)
                text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
                looks = [c.relook["look"]["cells"] for c in chunks if "look" in (c.model_extra.get("relook") or {})]
                found.append((turn % len(asked), text, looks))
            except Exception as error:
                failed.append(error)
            turn += 1

    clients = [threading.Thread(target=client, args=(n,)) for n in range(8)]
    for each in clients:
        each.start()
    wait_for(lambda: len(found) >= 16)
    victim[0].send_signal(signal.SIGKILL)
    killed_at = len(found)
    wait_for(lambda: len(found) >= killed_at + 16 and len(replicas(driver)) == 2)  # another one has come
    again = len(found)
    wait_for(lambda: len(found) >= again + 16)
    stop.set()
    for each in clients:
        each.join()
    assert not failed
    for number, text, looks in found:
        answer = offline[number]
        assert text == answer.text
        assert looks == [None if look.cells is None else list(look.cells) for look in answer.looks]
    metrics = httpx2.get(f"{address}/metrics").text
    (line,) = [line for line in metrics.splitlines() if line.startswith("relook_engine_asked_again_total ")]
    assert float(line.split()[1]) >= 1  # it was at work when it was killed


def wait_for(condition) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
