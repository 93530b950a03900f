"""What a client sees when the engine cannot answer, and what the engine sees when a client goes away."""

import json
import socket
import threading
import time

import httpx2
import openai
import pytest
from support.running_server import serving, user
from support.scripted_model import QUESTION, picture

from relook.errors import RelookError, UserError
from relook.perceive.engine import DeadlineExceeded, EngineBusy, EngineClosed, Running
from relook.trace import TextDelta

SECRET = "/home/me/secret.py line 7"


class Failing:
    """An engine that does what the question says: it raises at once, raises later, or never ends."""

    name, looks, domain, warnings, grid, context = "failing", ["region"], None, [], 8, 99
    regions = {"region_of": "whole", "region_margin": 1, "max_looks": 1}

    def __init__(self):
        self.cancelled = threading.Event()

    def submit(self, request, timeout=None):
        when, _, what = request.question.partition(" ")
        error = {
            "busy": EngineBusy("the queue is full", 2.4),
            "closed": EngineClosed("the server is closing"),
            "late": DeadlineExceeded("took longer than 5 s"),
            "wrong": UserError("the question is wrong"),
            "failed": RelookError("the answer failed"),
            "bug": KeyError(SECRET),
        }.get(what)
        if when == "now":
            raise error
        time.sleep(0.3 if when == "slowly" else 0)
        running = Running(self.cancelled.set)
        running.put(TextDelta("a"))
        if error is not None:
            running.put(error)
        return running

    def stats(self):
        return {}

    def close(self, drain=0):
        pass


@pytest.fixture(scope="module")
def served():
    with serving(Failing()) as running:
        yield running


CASES = [
    ("busy", openai.RateLimitError, 429, "server_busy"),
    ("closed", openai.InternalServerError, 503, "server_closing"),
    ("late", openai.APIStatusError, 408, "timeout"),
    ("wrong", openai.BadRequestError, 400, None),
    ("failed", openai.InternalServerError, 500, None),
    ("bug", openai.InternalServerError, 500, None),
]


@pytest.mark.parametrize(("what", "kind", "status", "code"), CASES)
@pytest.mark.parametrize("when", ["now", "later"])
def test_an_error_is_a_status_and_a_sentence(served, what, kind, status, code, when) -> None:
    with pytest.raises(kind) as caught:
        served.ask((picture(), f"{when} {what}"))
    error = caught.value
    assert error.status_code == status and error.body["code"] == code and error.body["message"]
    assert SECRET not in str(error.body) and "Traceback" not in error.response.text
    assert ("retry-after" in error.response.headers) == (what == "busy")
    reply = httpx2.post(f"{served.url}/v1/looks", json={"image": "data:,", "question": "x"})
    assert reply.status_code == 400 and "data URL" in reply.json()["error"]["message"]


@pytest.mark.parametrize("what", ["busy", "closed", "late", "failed", "bug"])
def test_an_error_in_a_stream(served, what) -> None:
    """What fails before it begins is a status; afterwards the client raises from inside its loop."""
    with pytest.raises(openai.APIStatusError):
        served.ask((picture(), f"now {what}"), stream=True)
    stream = served.ask((picture(), f"later {what}"), stream=True)
    said = []
    with pytest.raises(openai.APIError) as caught:
        said += [piece.choices[0].delta.content for piece in stream]
    assert caught.value.body["message"] and SECRET not in str(caught.value.body)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/looks"])
def test_a_client_that_goes_away_cancels_its_request(served, stream, path) -> None:
    served.engine.cancelled.clear()
    message = user(picture(), "never ends")
    body = {"messages": [message], "stream": stream}
    if path == "/v1/looks":
        body = {"image": message["content"][0]["image_url"]["url"], "question": "never ends"}
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(served.url + path, json=body, timeout=0.5)
    assert served.engine.cancelled.wait(10)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_has_gone_before_its_request_begins(served, stream) -> None:
    served.engine.cancelled.clear()
    body = json.dumps({"messages": [user(picture(), "slowly never ends")], "stream": stream}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    port = int(served.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + str(len(body)).encode() + b"\r\n\r\n" + body)
        time.sleep(0.1)
    assert served.engine.cancelled.wait(10)


def test_a_body_that_is_no_request(served) -> None:
    url = f"{served.url}/v1/chat/completions"
    for content in (b"", b"{", b"[]", b"null", b'{"messages": 3}', b"\xff\xfe", b'{"messages": [{"role": "king"}]}'):
        reply = httpx2.post(url, content=content, headers={"content-type": "application/json"})
        assert reply.status_code == 400 and set(reply.json()["error"]) == {"message", "type", "code", "param"}
    assert httpx2.get(url).status_code == 405 and httpx2.get(url).json()["error"]["message"]
    assert QUESTION not in httpx2.get(f"{served.url}/metrics").text
