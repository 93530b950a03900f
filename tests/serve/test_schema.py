"""The API against its own OpenAPI description: schemathesis makes requests from it, good ones and wrong ones."""

from __future__ import annotations

from collections import Counter

import hypothesis
import pytest
from support.hostile_requests import GOOD_IMAGE, QUESTION, good

import relook
from relook.perceive.local import LocalEngine
from relook.serve.app import create_app
from relook.serve.settings import ServeSettings

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")
CHAT, LOOKS, OTHERS = "POST /v1/chat/completions", "POST /v1/looks", ["/v1/models", "/v1/models/{name}", "/health"]
KEPT = {
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "logprobs",
    "top_logprobs",
    "relook",
}
KEPT |= {"look", "max_looks", "look_at", "do_sample", "constrain", "condition", "blank", "region", "box"}
OPERATIONS = [CHAT, LOOKS, *(f"GET {path}" for path in [*OTHERS, "/health/live", "/health/ready", "/metrics"])]


@pytest.fixture(scope="module")
def api():
    engine = LocalEngine(relook.load("cards-tiny"))
    limits = {"seconds": 0.5, "images": 4, "turns": 8, "question_characters": 2000, "pixels": 1_000_000}
    yield schemathesis.openapi.from_asgi("/openapi.json", create_app(engine, ServeSettings(limits=limits)))
    engine.close()


def test_every_operation_is_tested(api):
    assert sorted(each.ok().label for each in api.get_all_operations()) == sorted(OPERATIONS)


@pytest.mark.parametrize(
    ("operation", "mode"),
    [(each, "positive") for each in OPERATIONS]
    + [(each, mode) for each in (CHAT, LOOKS) for mode in ("filled", "negative")],
)
def test_answers_are_as_described(api, operation, mode):
    """No server error, and the status, type and shape that the description promises.

    "filled": what is drawn, about a real image. "negative": what the description does not allow, and is refused.
    """
    method, path = operation.split()
    kind = schemathesis.GenerationMode("negative" if mode == "negative" else "positive")
    # That a conversation ends with a question, and an address is an image, is no matter of a description.
    beyond = [checks.positive_data_acceptance]
    seen = Counter()

    @hypothesis.settings(
        max_examples=30 if method == "POST" else 8,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=api[path][method].as_strategy(generation_mode=kind))
    def check(case):
        if mode == "filled":
            whole = {"image": GOOD_IMAGE, "question": QUESTION} if operation == LOOKS else good()
            kept = {name: value for name, value in case.body.items() if name in KEPT and value}
            case.body = {**kept, **whole, "model": None}
        response = case.call()
        seen[response.status_code] += 1
        case.validate_response(response, excluded_checks=beyond)
        if response.status_code >= 400:
            error = response.json()["error"]
            assert len(error["message"].split()) >= 2 and "Traceback" not in response.text

    check()
    assert mode != "filled" or seen[200] > 0, seen
