"""Keys, hosts, body limit, request ids and logs, over real HTTP, before an app of ten lines."""

import hmac
import io
import json
import logging
import socket
import time
from contextlib import contextmanager

import anyio
import httpx2
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from support.hostile_requests import good
from support.running_server import running

from relook.errors import RelookError, UserError
from relook.perceive.engine import Running
from relook.serve import connections, security
from relook.serve.app import create_app
from relook.serve.limits import Limits, hold
from relook.serve.security import JsonLines, SecuritySettings, log_config, protect, read_keys
from relook.serve.settings import ServeSettings

JSON = {"Content-Type": "application/json"}
KEY, OTHER = "key-of-the-first-user", "key-of-the-second-user"
SECRET = "what is the total of my secret receipt"


async def echo(request):
    return JSONResponse({"length": len(await request.body())})


async def fails(request):
    raise ValueError(SECRET)


async def fails_late(request):
    async def pieces():
        yield b"data: one\n\n"
        raise ValueError(SECRET)

    return StreamingResponse(pieces(), media_type="text/event-stream")


async def much(request):
    return StreamingResponse(iter([b"x" * 2**20] * 64))


async def holds(request):
    hold(int(request.query_params["bytes"]))
    await anyio.sleep(float(request.query_params.get("seconds", 0)))
    return JSONResponse({})


@contextmanager
def served(limits=None, http="h11", **settings):
    """A client of the app, its memory, and its log as text."""
    routes = [Route(path, echo, methods=["GET", "POST"]) for path in ("/", "/health/live", "/v1/echo", "/metrics")]
    routes += [
        Route("/v1/fails", fails, methods=["POST"]),
        Route("/v1/late", fails_late),
        Route("/v1/much", much),
        Route("/v1/hold", holds),
    ]
    app = Starlette(routes=routes)
    memory = protect(app, limits or Limits(), SecuritySettings(**settings))
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(JsonLines())
    loggers = [logging.getLogger(name) for name in ("relook.serve", "uvicorn.error")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        with running(app, http=http) as url, httpx2.Client(base_url=url, trust_env=False) as client:
            yield client, memory, text
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)


def sentence(response):
    """The message of an error in OpenAI's shape."""
    assert set(response.json()) == {"error"} and set(response.json()["error"]) == {"message", "type", "code", "param"}
    message = response.json()["error"]["message"]
    assert len(message.split()) > 3 and "Traceback" not in message
    return message


def logged(log, count):
    """The lines of the first `count` requests, each written when its request is over, soon after its answer."""
    return within_seconds(
        lambda: [e for line in log.getvalue().splitlines() if "status" in (e := json.loads(line))], count
    )


def given_back(memory):
    """Whether nothing is held, soon after an answer."""
    return within_seconds(lambda: [0] * (memory.held == 0), 1) == [0]


def within_seconds(look, count):
    for _ in range(500):
        if len(found := look()) >= count:
            break
        time.sleep(0.01)
    return found


def raw(client, data):
    """What a server answers to bytes on a socket, up to its end."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=5) as connection:
        connection.sendall(data)
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
        except (TimeoutError, ConnectionError):
            pass
    return answer


def test_a_key_is_needed_where_keys_are_set(monkeypatch):
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(security.hmac, "compare_digest", lambda a, b: compared.append(b) or compare(a, b))
    with served(keys=(KEY, OTHER)) as (client, _, log):
        for key in (KEY, OTHER):
            compared.clear()
            answered = client.post("/v1/echo", content=b"12345", headers={"Authorization": f"Bearer {key}"})
            assert answered.json() == {"length": 5}
            assert compared == [KEY.encode(), OTHER.encode()]  # all of them, whichever it is
        assert client.post("/v1/echo", headers={"Authorization": f"bearer  {KEY}"}).status_code == 200
        for given in (None, "", KEY, "Bearer", f"Basic {KEY}", "Bearer wrong", f"Bearer {KEY}x"):
            answered = client.post("/v1/echo", headers={} if given is None else {"Authorization": given})
            assert answered.status_code == 401 and "API key" in sentence(answered), given
            assert answered.headers["www-authenticate"] == "Bearer"
            assert answered.json()["error"]["code"] == "invalid_api_key"
        for bytes_ in (b"Bearer \xff\xfe", b"Bearer k\xc3\xa9y", b"Bearer " + KEY[:-1].encode()):
            assert client.post("/v1/echo", headers={"Authorization": bytes_}).status_code == 401
        assert client.get("/metrics").status_code == 401
        for path in ("/", "/health/live"):
            assert client.get(path).status_code == 200
        for path in ("/health/../v1/echo", "/static/../v1/echo", "//v1/echo", "/v1/echo/", "/V1/ECHO", "/healthy"):
            request = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            assert raw(client, request.encode()).split()[1] in (b"401", b"404"), path
        assert KEY not in log.getvalue() and OTHER not in log.getvalue()


def test_without_keys_everybody_may_ask():
    with served() as (client, _, _):
        assert client.post("/v1/echo").status_code == 200
        assert client.post("/v1/echo", headers={"Authorization": "Bearer none"}).status_code == 200


def test_keys_of_environment_and_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# users\n{KEY}  # the first\n\n{OTHER}\n")
    assert [key.get_secret_value() for key in read_keys(file, {})] == [KEY, OTHER]
    assert [key.get_secret_value() for key in read_keys(None, {"RELOOK_API_KEYS": f"{KEY}, {OTHER}"})] == [KEY, OTHER]
    assert read_keys(None, {}) == ()
    assert KEY not in repr(SecuritySettings(keys=read_keys(file, {})))
    for where, environ, said in (
        (None, {"RELOOK_API_KEYS": ""}, "no key"),  # a variable that was meant to hold one does not open the server
        (None, {"RELOOK_API_KEYS": "short"}, "key 1"),
        (None, {"RELOOK_API_KEYS": f"{KEY},with a space in it"}, "key 2"),
        (tmp_path / "none", {}, "no keys can be read"),
        (tmp_path, {}, "no keys can be read"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            read_keys(where, environ)
        assert "short" not in str(caught.value) and KEY not in str(caught.value)
    file.write_text("# nothing but this\n")
    with pytest.raises(UserError, match="no key"):
        read_keys(file, {})


def test_hosts():
    """A page whose own name leads to 127.0.0.1 reaches a server on loopback, with its name in the Host header."""
    with served(hosts=security.LOOPBACK) as (client, _, _):
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"):
            assert client.get("/", headers={"Host": host}).status_code == 200, host
        for host in (
            "evil.example",
            "evil.example:8000",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "",
            "::2",
        ):
            answered = client.get("/", headers={"Host": host})
            assert answered.status_code == 400 and "localhost" in sentence(answered), host
    with served() as (client, _, _):
        assert client.get("/", headers={"Host": "any.example"}).status_code == 200


def test_pages_of_other_origins():
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    with served() as (client, _, _):
        for answered in (client.options("/v1/echo", headers=asked), client.post("/v1/echo", headers=asked)):
            assert not [name for name in answered.headers if name.startswith("access-control")]
    with served(keys=(KEY,), origins=("https://app.example",)) as (client, _, _):
        assert client.options("/v1/echo", headers=asked).status_code == 200
        for key in (KEY, "wrong"):  # a page can read why it was refused
            answered = client.post("/v1/echo", headers={**asked, "Authorization": f"Bearer {key}"})
            assert answered.headers["access-control-allow-origin"] == "https://app.example"
        other = {**asked, "Origin": "https://evil.example"}
        assert "access-control-allow-origin" not in client.post("/v1/echo", headers=other).headers


def test_request_ids():
    with served() as (client, _, log):
        assert client.get("/", headers={"X-Request-Id": "from-a-proxy.1"}).headers["x-request-id"] == "from-a-proxy.1"
        made = [client.get("/").headers["x-request-id"] for _ in range(2)]
        bad = ["", "a b", "x" * 65, "é", '"}', "a\tb"]
        made += [client.get("/", headers={"X-Request-Id": name.encode()}).headers["x-request-id"] for name in bad]
        assert len(set(made)) == len(made) and all(len(name) == 32 for name in made)
        assert [entry["request"] for entry in logged(log, 9)] == ["from-a-proxy.1", *made]


def test_a_request_is_one_line_of_the_log_without_what_it_says():
    with served(keys=(KEY,)) as (client, _, log):
        headers = {"Authorization": f"Bearer {KEY}", "User-Agent": SECRET}
        client.post(f"/v1/echo?question={SECRET}", content=SECRET, headers=headers)
        [said] = logged(log, 1)
        assert said["path"] == "/v1/echo" and said["method"] == "POST" and said["status"] == 200
        assert said["client"] == "127.0.0.1" and said["seconds"] >= 0 and said["level"] == "info"
        assert "secret" not in log.getvalue() and KEY not in log.getvalue()


def test_no_stack_trace_leaves_the_server_and_none_of_what_it_quotes_is_logged():
    with served() as (client, memory, log):
        answered = client.post("/v1/fails")
        assert answered.status_code == 500 and "inside the server" in sentence(answered)
        assert "ValueError" not in answered.text and "secret" not in answered.text
        with pytest.raises(httpx2.RemoteProtocolError), client.stream("GET", "/v1/late") as streamed:
            received = b"".join(streamed.iter_raw())
            assert received is None, "the stream ended as if it were whole"
        logged(log, 2)
        entries = [json.loads(line) for line in log.getvalue().splitlines()]
        errors = [entry for entry in entries if entry.get("error")]
        assert [entry["error"] for entry in errors] == ["ValueError"] * 2
        assert errors[0]["at"][-1].startswith("test_security.py:") and errors[0]["at"][-1].endswith("fails")
        assert errors[0]["request"] == answered.headers["x-request-id"]
        assert "secret" not in log.getvalue() and "Traceback" not in log.getvalue()
        assert client.post("/v1/echo").status_code == 200 and given_back(memory)


class Broken:
    """An engine whose answers fail."""

    name, looks, domain, warnings, grid, context = "broken", ["region"], None, [], 8, 100
    regions = {"region_of": "whole", "region_margin": 1, "max_looks": 1}

    def submit(self, request, timeout=None):
        running = Running()
        error = RelookError("the answer failed (ValueError); ask again")
        error.__cause__ = ValueError(SECRET)
        running.put(error)
        return running

    def stats(self):
        return {}


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_fails_is_logged_by_its_cause(streamed, caplog):
    body = {**good(), "stream": streamed}
    with caplog.at_level(logging.INFO), running(create_app(Broken())) as url:
        answered = httpx2.post(f"{url}/v1/chat/completions", json=body, trust_env=False)
    assert "the answer failed" in answered.text and "secret" not in answered.text
    assert answered.status_code == (200 if streamed else 500)
    [record] = [each for each in caplog.records if each.levelname == "ERROR"]
    assert json.loads(JsonLines().format(record))["error"] == "RelookError from ValueError"
    assert "secret" not in caplog.text  # whatever formats the log


def test_half_a_character_in_an_address_that_is_fetched():
    """A sentence that quotes it is sent with it escaped."""
    with running(create_app(Broken(), ServeSettings(fetch={"hosts": ["*"]}))) as url:
        body = json.dumps(good("http://images.example/\ud800.png"))
        answered = httpx2.post(f"{url}/v1/chat/completions", content=body, headers=JSON, trust_env=False)
    assert answered.status_code == 400 and "\\ud800" in sentence(answered)


def test_a_body_over_the_limit():
    with served(Limits(body_bytes=5000)) as (client, memory, _):
        assert client.post("/v1/echo", content=b"x" * 5000).json() == {"length": 5000}
        answered = client.post("/v1/echo", content=b"x" * 5001)
        assert answered.status_code == 413 and "5,001" in sentence(answered) and "5,000" in sentence(answered)
        answered = client.post("/v1/echo", content=iter([b"x" * 1000] * 6))  # chunked: no length is stated
        assert answered.status_code == 413 and "5,000" in sentence(answered)
        # Refused by what it states, before any of it has come.
        stated = b"POST /v1/echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000000\r\n\r\n"
        answer = raw(client, stated)
        assert b" 413 " in answer and b"1,000,000,000,000" in answer and b"connection: close" in answer.lower()
        assert client.post("/v1/echo", content=b"x").json() == {"length": 1} and given_back(memory)


def test_a_body_that_does_not_come():
    with served(Limits(body_seconds=0.3)) as (client, memory, log):
        start = b"POST /v1/echo HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n"
        answer = raw(client, start + b"half")
        assert b" 408 " in answer and b"0.3 seconds" in answer
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall(start + b"half")  # and gone
        assert [entry["status"] for entry in logged(log, 2)] == [408, None]
        assert given_back(memory) and client.post("/v1/echo", content=b"x").json() == {"length": 1}


def test_a_body_of_too_many_values():
    """Three bytes of JSON become a list of 60."""
    with served(Limits(body_values=1000)) as (client, memory, _):
        assert client.post("/v1/echo", content=b"[" + b"[]," * 499 + b"1]").status_code == 200
        answered = client.post("/v1/echo", content=b"[" + b"[]," * 600 + b"1]")
        assert answered.status_code == 400 and "1,201" in sentence(answered) and "1,000" in sentence(answered)
        assert given_back(memory)


def test_connections_on_which_nothing_happens(monkeypatch):
    """No request, half a header, an answer that is not read: closed. A slow answer is waited for."""
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.2)
    with served(http=connections.Connection) as (client, memory, log):
        place = client.base_url.host, client.base_url.port
        for sent in (b"", b"POST /v1/echo HTTP/1.1\r\nHost: a\r\nX: "):
            assert raw(client, sent) == b""
        whole = b"GET /v1/echo HTTP/1.1\r\nHost: a\r\n\r\n"
        assert raw(client, whole).count(b"HTTP/1.1 200") == 1  # and closed, when no other follows
        assert raw(client, whole + b"GET /v1").count(b"HTTP/1.1") == 1
        assert client.get("/v1/hold?bytes=5&seconds=1").status_code == 200
        with socket.create_connection(place) as connection:
            connection.sendall(b"GET /v1/much HTTP/1.1\r\nHost: a\r\n\r\n")
            *_, last = logged(log, 4)  # the app is done with it while the connection is still open here
            assert last["path"] == "/v1/much" and last["bytes"] < 64 * 2**20
        assert given_back(memory) and client.post("/v1/echo", content=b"x").json() == {"length": 1}


def test_memory_of_all_requests_together():
    with served(Limits(memory_bytes=2**20)) as (client, memory, _):
        answered = client.get("/v1/hold?bytes=1000000")
        assert answered.status_code == 200 and given_back(memory)
        answered = client.post("/v1/echo", content=b"x" * (2**20 + 1))
        assert answered.status_code == 429 and answered.headers["retry-after"] == "1"
        assert "1,048,576" in sentence(answered) and given_back(memory)
        with (
            httpx2.Client(base_url=client.base_url, trust_env=False) as other,
            anyio.from_thread.start_blocking_portal() as p,
        ):
            first = p.start_task_soon(anyio.to_thread.run_sync, other.get, "/v1/hold?bytes=1000000&seconds=1")
            while memory.held == 0 and not first.done():
                time.sleep(0.01)
            assert client.post("/v1/echo", content=b"x" * 100_000).status_code == 429
            assert client.post("/v1/echo", content=b"x" * 1000).status_code == 200
            assert first.result().status_code == 200
        assert client.post("/v1/echo", content=b"x" * 100_000).status_code == 200 and given_back(memory)


def test_the_log_of_a_server_is_json_lines_and_has_no_other_lines(capsys):
    import logging.config

    loggers = [logging.getLogger(name) for name in ("relook", "uvicorn", "uvicorn.access", "uvicorn.error")]
    before = [(one.handlers[:], one.level, one.propagate) for one in loggers]
    try:
        logging.config.dictConfig(log_config())
        logging.getLogger("uvicorn.access").info("GET /?question=%s", SECRET)
        logging.getLogger("uvicorn.error").info("started\nand more")
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            logging.getLogger("uvicorn.error").error("Exception in ASGI application\n", exc_info=error)
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        assert [line["message"] for line in lines] == ["started", "Exception in ASGI application"]
        assert lines[1]["error"] == "KeyError" and "secret" not in str(lines)
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)
