"""A local OpenAI-compatible endpoint that answers, fails, stalls, rejects requests or returns malformed replies.

    python tests/support/stub_judge_server.py 8901
    relook judge FOLDER --model stub_judge --url http://127.0.0.1:8901/v1

In the tests the answer under judgement selects the behavior. Run as above, the server compares strings; about one
request in ten fails at first, one in fifty stalls at first, and one in fifty never gets a score.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STALL = 3  # seconds
SAID = {"half": "score: 0.5", "babbles": "I like turtles.", "boasts": "score: 7"}


class StubJudge(BaseHTTPRequestHandler):
    """Handles requests.

    `server.rule(message)` returns the key by which a request is counted, its behavior, and the text to send otherwise.
    """

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = body["messages"][-1]["content"]
        name, word, text = self.server.rule(message)
        with self.server.lock:
            self.server.seen[name] += 1
            self.server.bodies.append(body)
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
            tries = self.server.seen[name]
        try:
            self.reply(word, text, tries)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client disconnected
        finally:
            with self.server.lock:
                self.server.now -= 1

    def reply(self, word, text, tries):
        time.sleep(0.02)
        if word == "refused":
            return self.send(401, {"error": {"message": "no such key"}})
        if word == "flaky" and tries < 3:
            return self.send(500, {"error": {"message": "out of order"}})
        if word == "busy" and tries < 2:
            return self.send(429, {"error": {"message": "slow down"}})
        if word == "dead":
            return self.send(503, {"error": {"message": "gone"}})
        if word == "stalls" or (word == "dozes" and tries < 2):
            time.sleep(STALL)
        if word == "html":
            return self.send_bytes(200, b"<html>hello</html>", "text/html")
        if word == "hollow":
            return self.send(200, {"choices": []})
        message = {"role": "assistant", "content": SAID.get(word, text)}
        usage = {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        whole = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge-2026", "choices": [choice]}
        return self.send(200, whole | {"usage": usage})

    def send(self, status, value):
        self.send_bytes(status, json.dumps(value).encode(), "application/json")

    def send_bytes(self, status, data, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def by_word(message: str) -> tuple[str, str, str]:
    """The answer's first word selects the behavior; the score is 1 otherwise."""
    word = message.rsplit("answer: ", 1)[1].split()[0]
    return word, word, "Score: 1.0"


def by_letters(message: str) -> tuple[str, str, str]:
    """Score 1 for equal strings, 0.5 if one of at least three letters contains the other, else 0; faults by a hash."""
    standard, answer = (
        message.rsplit(f"{whose} answer: ", 1)[1].splitlines()[0].lower() for whose in ("Standard", "Model's")
    )
    accepted = standard.split(" / ")
    inside = any(answer in one or one in answer for one in accepted) and len(answer) > 2
    score = 1.0 if answer in accepted else 0.5 * inside
    draw = int(hashlib.sha256(message.encode()).hexdigest(), 16) % 50
    return message, {0: "babbles", 1: "dozes"}.get(draw, "flaky" if draw < 7 else "fair"), f"score: {score}"


def stub_judge_at(port: int, rule: Callable[[str], tuple[str, str, str]] = by_word) -> ThreadingHTTPServer:
    """Create the server without serving; port 0 chooses a free one."""
    server = ThreadingHTTPServer(("127.0.0.1", port), StubJudge)
    server.rule = rule
    server.lock, server.seen, server.bodies, server.now, server.most = threading.Lock(), Counter(), [], 0, 0
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    return server


if __name__ == "__main__":
    stub_judge = stub_judge_at(int(sys.argv[1]), by_letters)
    print(f"judging at {stub_judge.url}", flush=True)
    stub_judge.serve_forever()
