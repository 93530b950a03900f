"""`relook serve` as a process: what it says, what it refuses, and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx2
import openai
import pytest
from support.running_server import user
from support.scripted_model import QUESTION, picture
from typer.testing import CliRunner

from relook.cli import app


@pytest.fixture(scope="module")
def folder(tiny_vlm, tmp_path_factory):
    """A random model, which goes on writing until it is stopped."""
    path, vlm = tmp_path_factory.mktemp("serve") / "rambling", tiny_vlm(("region",))
    vlm.model.save_pretrained(path)
    vlm.processor.save_pretrained(path)
    return path


@pytest.fixture
def process(folder):
    """A running server and its address."""
    command = [
        sys.executable,
        "-m",
        "relook",
        "serve",
        str(folder),
        "--port",
        "0",
        "--seconds",
        "300",
        "--drain",
        "300",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as running:
        for line in running.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        try:
            yield running, found.group()
        finally:
            running.kill()


def test_sigterm_lets_a_running_answer_finish_and_refuses_new_ones(process) -> None:
    running, url = process
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert client.models.list().data[0].id == "rambling"
    asked = {"model": "rambling", "messages": [user(picture(), QUESTION)], "max_tokens": 1500}
    stream = client.chat.completions.create(stream=True, extra_body={"relook": {"look": "none"}}, **asked)
    pieces = [next(stream) for _ in range(3)]
    running.send_signal(signal.SIGTERM)
    while httpx2.get(f"{url}/health/ready").status_code == 200:
        time.sleep(0.01)
    assert httpx2.get(f"{url}/health/live").status_code == 200
    with pytest.raises(openai.InternalServerError) as refused:
        client.chat.completions.create(**asked)
    assert refused.value.status_code == 503 and refused.value.body["message"]
    pieces += list(stream)
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")
    assert pieces[-1].relook["usage"]["generated_tokens"] > 100
    assert running.wait(120) == 0
    assert "Traceback" not in running.stderr.read()


def refused(*arguments):
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    return line


def test_what_cannot_be_served_is_one_line(folder, tmp_path, monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "Address already in use" in refused(folder, "--port", taken.getsockname()[1])
    assert "choose another --host" in refused(folder, "--host", "no.such.host.invalid", "--port", 0)
    assert "unknown model 'nowhere'" in refused("nowhere", "--port", 0)
    (tmp_path / "keys").write_text("# none\n")
    assert "there is no key" in refused(folder, "--port", 0, "--keys", tmp_path / "keys")
    assert "--port" in refused(folder, "--port", 99999)
    monkeypatch.setitem(sys.modules, "relook.serve.run", None)
    assert "pip install 'relook[serve]'" in refused(folder, "--port", 0)
