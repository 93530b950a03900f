"""Chat completions as OpenAI's own client sees them, over real HTTP; every answer is the one that `ask` gives."""

import asyncio
import base64
import io
import json
import math
import re

import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from support.running_server import data_url, opened, serving, user
from support.scripted_model import QUESTION, picture
from support.synthetic import Pages

import relook
from relook.perceive.local import LocalEngine
from relook.serve import app as app_module

AGAIN = "What is the code in the BLUE box ?"
LOOKS = [
    {},
    {"look": "none"},
    {"look": "region"},
    {"look": "clip"},
    {"look": "detection"},
    {"look": "seg"},
    {"region": [1, 2, 3, 4]},
    {"box": [33, 23, 65.1, 45]},
    {"look": "region", "max_looks": 2},
    {"max_looks": 0},
]


@pytest.fixture(scope="module")
def served(tiny_vlm):
    """A random model with every look, behind real HTTP."""
    engine = LocalEngine(tiny_vlm())
    with serving(engine) as running:
        yield running
    engine.close()


@pytest.fixture(scope="module")
def cards():
    """A model that ships, which answers in words that its tokenizer writes in one way."""
    engine = LocalEngine(relook.load("cards-tiny"))
    with serving(engine) as running:
        yield running
    engine.close()


def refused(call, kind=openai.BadRequestError):
    """The sentence of an error, and the field that it names."""
    with pytest.raises(kind) as caught:
        call()
    body = caught.value.body
    assert set(body) == {"message", "type", "code", "param"} and "\n" not in body["message"]
    return body["message"], body["param"]


def of_type(kind, value):
    """A message of the user with one part."""
    return [{"role": "user", "content": [{"type": kind, kind: value}]}]


def whole(answer):
    """An answer as JSON without what depends on time and on earlier requests; maps with three digits."""
    told = json.loads(json.dumps(answer))
    usage = told["usage"]
    usage["lm_positions"] += usage.pop("cached_tokens")
    del usage["seconds"], usage["vision_patches"]
    return {**told, "looks": rounded(told["looks"])}


def rounded(looks):
    """Looks without their turns; maps with three digits, since sums depend on what ran beside and before."""
    return [
        {
            **{key: value for key, value in look.items() if key not in ("turn", "map")},
            "attention": [[round(v, 3) + 0.0 for v in row] for row in look["attention"] or []],
        }
        for look in looks
    ]


@pytest.mark.parametrize("look", LOOKS, ids=str)
def test_an_answer_is_the_one_that_ask_gives(served, look) -> None:
    image = picture(1)
    answer = served.vlm.ask(image, QUESTION, max_new_tokens=12, **look)
    reply = served.ask((image, QUESTION), max_tokens=12, extra_body={"relook": look})
    (choice,), shown = reply.choices, reply.relook
    assert choice.message.content == answer.text
    assert choice.finish_reason == answer.finish
    assert shown["transcript"] == [turn.to_dict() for turn in answer.transcript]
    assert shown["image"] == {"width": 130, "height": 90} and shown["grid"] == 8
    assert [(x["kind"], x["cells"], x["box"], x["problem"]) for x in shown["looks"]] == [
        (x["kind"], x["cells"], x["box"], x["problem"]) for x in answer.to_dict()["looks"]
    ]
    for told, taken in zip(shown["looks"], answer.looks, strict=True):
        if taken.kind == "region" and not taken.problem:
            assert opened(told["crop"]).tobytes() == taken.image.tobytes() and told["map"] is None
        elif not taken.problem:
            assert told["crop"] is None and opened(told["map"]).size == taken.image.size
            assert opened(told["map"]).mode == "RGBA"
    usage = shown["usage"]
    assert usage["lm_positions"] + usage["cached_tokens"] == answer.usage.lm_positions == reply.usage.total_tokens
    assert reply.usage.completion_tokens == answer.usage.generated_tokens
    assert reply.usage.prompt_tokens_details.cached_tokens == usage["cached_tokens"]


@pytest.mark.parametrize("look", LOOKS[:4], ids=str)
def test_a_stream_is_the_whole_answer_in_pieces(served, look) -> None:
    fields = {"max_tokens": 12, "extra_body": {"relook": look}}
    answer = served.ask((picture(2), QUESTION), **fields)
    chunks = list(served.ask((picture(2), QUESTION), stream=True, stream_options={"include_usage": True}, **fields))
    *pieces, end, usage = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    written = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    before = "".join(turn["text"] for turn in answer.relook["transcript"][:-1] if turn["role"] == "assistant")
    assert written.endswith(answer.choices[0].message.content) and (len(before) > 0) == bool(answer.relook["looks"])
    looks = [piece.relook["look"] for piece in pieces if getattr(piece, "relook", None)]
    assert rounded(looks) == rounded(answer.relook["looks"]) == rounded(end.relook["looks"])
    assert end.choices[0].finish_reason == answer.choices[0].finish_reason
    assert end.relook["transcript"] == answer.relook["transcript"]
    assert end.choices[0].delta.relook == answer.choices[0].message.relook
    assert usage.choices == [] and usage.usage.total_tokens == answer.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_stream_is_server_sent_events(served) -> None:
    body = {"messages": [user(picture(3), QUESTION)], "stream": True, "max_tokens": 4}
    with httpx2.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = "".join(response.iter_text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(e.removeprefix("data: "))["object"] == "chat.completion.chunk" for e in events[:-2])
    assert all(json.loads(e.removeprefix("data: "))["choices"] for e in events[:-2])  # usage was not asked for


def test_the_async_client_asks_many_at_once(served) -> None:
    async def ask_all():
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

            async def one(i):
                fields = {"model": served.model, "messages": [user(picture(i), QUESTION)], "max_tokens": 8}
                if i % 2:
                    return (await client.chat.completions.create(**fields)).choices[0].message.content
                pieces = [p async for p in await client.chat.completions.create(stream=True, **fields)]
                end = pieces[-1].relook["transcript"][-1]["text"]
                assert "".join(p.choices[0].delta.content or "" for p in pieces).endswith(end.strip())
                return end

            return await asyncio.gather(*map(one, range(6)))

    answers = served.vlm.ask_many([(picture(i), QUESTION) for i in range(6)], max_new_tokens=8)
    for i, (got, answer) in enumerate(zip(asyncio.run(ask_all()), answers, strict=True)):
        assert got == (answer.text if i % 2 else answer.transcript[-1].text)


def test_several_images(served) -> None:
    images = [picture(4), picture(5, (90, 150)), picture(6)]
    for look_at in (None, 1, -1):
        own = {} if look_at is None else {"look_at": look_at}
        reply = served.ask((images, QUESTION), max_tokens=8, extra_body={"relook": {"look": "region", **own}})
        answer = served.vlm.ask(images, QUESTION, look="region", max_new_tokens=8, **own)
        assert reply.choices[0].message.content == answer.text
        assert reply.relook["looks"][0]["box"] == list(answer.looks[0].box)
    parts = [part for image in images for part in user(image, "and ?")["content"]]
    reply = served.ask([{"role": "user", "content": parts}], max_tokens=8)
    assert reply.choices[0].message.content == served.vlm.ask(images, "and ?\nand ?\nand ?", max_new_tokens=8).text


@pytest.mark.parametrize("look", ["region", "clip", "none"])
def test_a_conversation_goes_on(cards, look) -> None:
    """The client's own message, sent back as it is, keeps the looks in the conversation, and the server's cache."""
    image, other = Pages(1).sample(0).image, Pages(1).sample(1).image
    chat = cards.vlm.chat(image)
    first = chat.ask(QUESTION, look=look)
    second = chat.ask(AGAIN, image=other, look=look)
    own = {"extra_body": {"relook": {"look": look}}}
    begin = [user(image, QUESTION)]
    reply = cards.ask(begin, **own)
    assert reply.choices[0].message.content == first.text
    history = [*begin, reply.choices[0].message.model_dump(), user(other, AGAIN)]
    reply = cards.ask(history, **own)
    assert reply.choices[0].message.content == second.text
    told = [(turn["role"], turn["text"]) for turn in reply.relook["transcript"]]
    assert told == [(turn.role, turn.text) for turn in second.transcript]
    assert reply.usage.total_tokens == second.usage.sequence_length
    assert reply.usage.prompt_tokens_details.cached_tokens > first.usage.sequence_length // 2
    as_text = [begin[0], {"role": "assistant", "content": first.text}, history[2]]
    turns = cards.ask(as_text, **own).relook["transcript"]
    assert turns[2]["text"] == first.text and turns[3]["role"] == "user"


def test_system_messages_and_text_in_pieces(served) -> None:
    system = [
        {"role": "system", "content": "Be brief ."},
        {"role": "developer", "content": [{"type": "text", "text": "Be right ."}]},
    ]
    turns = served.ask([*system, user(picture(), QUESTION)], max_tokens=3).relook["transcript"]
    assert turns[0] == {"role": "system", "text": "Be brief .\n\nBe right .", "sampled": False}
    together = served.ask([user(picture()), {"role": "user", "content": QUESTION}], max_tokens=3)
    assert together.relook["transcript"] == served.ask((picture(), QUESTION), max_tokens=3).relook["transcript"]


def test_stop_and_length(served) -> None:
    text = served.vlm.ask(picture(), QUESTION, look="none", max_new_tokens=24).text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    fields = {"max_tokens": 24, "extra_body": {"relook": {"look": "none"}}}
    for given in (stop, [stop, "never there"]):
        reply = served.ask((picture(), QUESTION), stop=given, **fields).choices[0]
        assert reply.message.content == text[: text.index(stop)].strip() and reply.finish_reason == "stop"
    for limit in ("max_tokens", "max_completion_tokens"):
        reply = served.ask((picture(), QUESTION), **{**fields, "max_tokens": None, limit: 3}).choices[0]
        answer = served.vlm.ask(picture(), QUESTION, look="none", max_new_tokens=3)
        assert (reply.message.content, reply.finish_reason) == (answer.text, "length")


def test_a_greeting_before_the_first_question_and_a_body_without_its_type(served) -> None:
    """Front ends begin with a greeting of the assistant's; curl -d sends a form."""
    asked = [{"role": "assistant", "content": "Hello!"}, user(picture(), QUESTION)]
    reply = served.client.chat.completions.create(model=served.model, messages=asked, max_tokens=6)
    assert reply.choices[0].message.content == served.vlm.ask(picture(), QUESTION, max_new_tokens=6).text
    assert "before the first question" in reply.relook["warnings"][-1]
    body = json.dumps({"messages": [user(picture(), QUESTION)]})
    for kind in ("application/x-www-form-urlencoded", "text/plain"):
        told = httpx2.post(f"{served.url}/v1/chat/completions", content=body, headers={"content-type": kind})
        assert told.status_code == 400 and "Content-Type" in told.json()["error"]["message"]
    assert httpx2.head(f"{served.url}/health").status_code == 200


def test_sampling(served) -> None:
    own = {"max_tokens": 12, "temperature": 1.5, "top_p": 0.9}
    texts = [served.ask((picture(), QUESTION), seed=seed, **own).choices[0].message.content for seed in (1, 1, 2)]
    sampling = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "max_new_tokens": 12}
    assert texts == [served.vlm.ask(picture(), QUESTION, seed=seed, **sampling).text for seed in (1, 1, 2)]
    assert texts[0] != texts[2]
    greedy = served.vlm.ask(picture(), QUESTION, max_new_tokens=12).text
    own_ways = (  # of saying "none", which clients send
        *({}, {"temperature": 0, "top_p": 0.5, "seed": 3}, {"seed": 3}, {"top_p": 1}, {"temperature": 1e-9}),
        *({"seed": -1}, {"seed": 7.0, "stop": ""}, {"extra_body": {"top_k": -1}}, {"extra_body": {"top_k": 0}}),
        {"verbosity": "medium", "extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
    )
    for fields in own_ways:
        assert served.ask((picture(), QUESTION), max_tokens=12, **fields).choices[0].message.content == greedy


def test_logprobs(served) -> None:
    fields = {"max_tokens": 6, "logprobs": True, "top_logprobs": 3, "extra_body": {"relook": {"look": "none"}}}
    reply = served.ask((picture(), QUESTION), **fields).choices[0]
    tokens = reply.logprobs.content
    assert "".join(token.token for token in tokens).strip() == reply.message.content
    for token in tokens:
        assert token.bytes == list(token.token.encode())
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0].logprob >= token.logprob and len(token.top_logprobs) == 3
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1.001
    pieces = list(served.ask((picture(), QUESTION), stream=True, **fields))
    streamed = [token for p in pieces if p.choices[0].logprobs for token in p.choices[0].logprobs.content]
    assert streamed == tokens
    assert served.ask((picture(), QUESTION), max_tokens=2).choices[0].logprobs is None


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n": 2}, "n=2 is not offered"),
        ({"response_format": {"type": "json_object"}}, "response_format="),
        ({"modalities": ["text", "audio"]}, "modalities="),
        ({"extra_body": {"audio": {"voice": "alloy", "format": "wav"}}}, "audio="),
        ({"logit_bias": {"7": 5}}, "logit_bias="),
        ({"presence_penalty": 0.5}, "presence_penalty=0.5"),
        ({"frequency_penalty": 0.5}, "frequency_penalty=0.5"),
        ({"reasoning_effort": "high"}, "reasoning_effort="),
        ({"functions": [{"name": "f"}]}, "functions="),
        ({"extra_body": {"best_of": 3}}, "unknown field 'best_of'"),
        ({"extra_body": {"max_token": 3}}, "did you mean 'max_tokens'?"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"stop": [""]}, "stop"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"extra_body": {"stream": "yes"}}, "stream"),
        ({"extra_body": {"relook": {"look": "smell"}}}, "look 'smell' is unknown"),
        ({"extra_body": {"relook": {"region": [1, 2, 9, 4]}}}, "does not fit the 8 x 8 grid"),
        ({"extra_body": {"relook": {"box": [0, 0, 999, 9]}}}, "leaves the image; expected x1,y1,x2,y2 in pixels"),
        ({"extra_body": {"relook": {"box": [0, 0, 9, 9], "region": [1, 2, 3, 4]}}}, "two ways to say one thing"),
        ({"extra_body": {"relook": {"box": [0, 0, 9]}}}, "four numbers x1,y1,x2,y2"),
        ({"extra_body": {"relook": {"looks": 2}}}, "looks"),
        ({"extra_body": {"relook": {"look": "clip", "max_looks": 0}}}, "max_looks=0"),
        ({"extra_body": {"relook": {"look_at": 1}}}, "look_at=1 names no image"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_offered_is_refused_with_a_sentence(served, fields, said) -> None:
    assert said in refused(lambda: served.ask((picture(), QUESTION), **fields))[0]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages"),
        ([user(picture(), QUESTION), {"role": "assistant", "content": "5"}], "the last message is no question"),
        ([user(picture(), QUESTION), {"role": "system", "content": "Be brief ."}], "put it first"),
        (of_type("input_audio", {"data": "", "format": "wav"}), "messages[0].content[0]: Input tag 'input_audio'"),
        (of_type("image_url", {"link": "x"}), "messages[0].content[0].image_url"),
        (of_type("image_url", {"url": "/etc/passwd"}), "data URL"),
        (of_type("image_url", {"url": "file:///etc/passwd"}), "data URL"),
        (of_type("image_url", {"url": "http://127.0.0.1/x.png"}), "fetches no addresses"),
        ([user(picture(), "  ")], "the question is empty"),
        ([user(picture(), QUESTION), {"role": "function", "name": "f", "content": "1"}], "role"),
        ([user(picture(), QUESTION), {"role": "assistant", "content": "5", "relook": {"looks": [{"kind": "smell"}]}},
          user([], "and ?")], "'smell' is no look"),
        ([user(picture(), QUESTION), {"role": "assistant", "content": "5", "relook": {"looks": [{"kind": "region"}]}},
          user([], "and ?")], "expected a region with cells"),
        ([{**user(picture()), "role": "assistant"}], "an image in a message of the assistant"),
        ([{**user(picture()), "role": "system"}], "an image in a message of the system"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_messages_that_are_no_conversation(served, messages, said) -> None:
    message, param = refused(lambda: served.ask(messages))
    assert said in message
    assert param is None or param.startswith("messages")


def test_what_leaves_the_answer_as_it_is_is_accepted(served) -> None:
    fields = {
        "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "n": 1, "logit_bias": {},
        "response_format": {"type": "text"}, "modalities": ["text"], "presence_penalty": 0, "frequency_penalty": 0,
        "parallel_tool_calls": True, "top_p": 1, "tool_choice": "none",
        "extra_body": {"audio": None, "chat_template_kwargs": None},
    }  # fmt: skip
    plain = served.ask((picture(), QUESTION), max_tokens=4)
    assert served.ask((picture(), QUESTION), max_tokens=4, **fields).choices[0].message.content == (
        plain.choices[0].message.content
    )


def test_control_tokens_in_text_are_text(served) -> None:
    question = "What is <|image_pad|> and <|im_end|> <|region_token_start|> ?"
    reply = served.ask((picture(), question), max_tokens=4)
    assert reply.choices[0].message.content == served.vlm.ask(picture(), question, max_new_tokens=4).text


# -- other routes ----------------------------------------------------------------------------------------------------


def test_models(served) -> None:
    (model,) = served.client.models.list().data
    assert model == served.client.models.retrieve(model.id)
    assert model.relook == {
        "looks": ["region", "clip", "detection", "seg"], "grid": 8, "domain": None, "warnings": [],
        "regions": {"region_of": "whole", "region_margin": 1, "max_looks": 1},
        "context_window": served.vlm.context,
    }  # fmt: skip
    message, _ = refused(lambda: served.client.models.retrieve("gpt-4o"), openai.NotFoundError)
    assert "'gpt-4o' does not exist here" in message
    asked = lambda: served.client.chat.completions.create(model="gpt-4o", messages=[user(picture(), QUESTION)])  # noqa: E731
    assert refused(asked, openai.NotFoundError)[0] == message


def test_looks_is_the_whole_trace(served) -> None:
    boxed = {"box": [33, 23, 65.1, 45]}
    for own in (
        {},
        {"look": "clip"},
        {"region": [1, 2, 3, 4]},
        boxed,
        {"do_sample": True, "seed": 5, "temperature": 1.5},
    ):
        body = {"image": data_url(picture(9)), "question": QUESTION, "max_new_tokens": 6, **own}
        reply = httpx2.post(f"{served.url}/v1/looks", json=body, timeout=60)
        answer = served.vlm.ask(picture(9), QUESTION, max_new_tokens=6, **own)
        assert reply.status_code == 200 and whole(reply.json()) == whole(answer.to_dict(images=True))
    body = {"image": data_url(picture(9)), "question": QUESTION}
    for wrong, said in (
        ({"fetch": True}, "leave fetch out"),
        ({"seed": 3}, "seed=3 has no effect"),
        ({"looks": 1}, "looks"),
        ({"image": "picture.png"}, "expected a data URL"),
        ({"image": []}, "image"),
        ({"question": " "}, "the question is empty"),
        ({"region": [0, 0, 8, 0]}, "8 x 8 grid"),
        ({"box": [0.1, 0.2, 0.3, 0.4]}, "looks like fractions"),
        ({"model": "gpt-4o"}, "does not exist here"),
    ):
        reply = httpx2.post(f"{served.url}/v1/looks", json={**body, **wrong})
        assert reply.status_code == (404 if "model" in wrong else 400) and said in reply.json()["error"]["message"]


def test_a_page_of_a_tiff_is_named_by_its_address(served) -> None:
    file = io.BytesIO()
    picture(1).save(file, "TIFF", save_all=True, append_images=[picture(2)])
    url = "data:image/tiff;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": f"{url}#page=2"}}, {"type": "text", "text": QUESTION}]
    reply = served.ask(
        [{"role": "user", "content": parts}], max_tokens=6, extra_body={"relook": {"region": [1, 2, 3, 4]}}
    )
    crop = served.vlm.ask(picture(2), QUESTION, region=(1, 2, 3, 4), max_new_tokens=6).looks[0].image
    assert opened(reply.relook["looks"][0]["crop"]).tobytes() == crop.tobytes()
    for image, said in (
        (url, "has 2 pages, of which one can be shown: add #page=1 to #page=2"),
        (f"{url}#page=3", "has no page 3"),
    ):
        body = {"image": image, "question": QUESTION}
        reply = httpx2.post(f"{served.url}/v1/looks", json=body)
        assert reply.status_code == 400 and said in reply.json()["error"]["message"]


def test_what_exceeds_the_context_is_refused_with_both_numbers(served, monkeypatch) -> None:
    needed = served.ask((picture(), QUESTION), max_tokens=1).usage.prompt_tokens
    monkeypatch.setattr(served.vlm, "context_limit", 20)
    message, _ = refused(lambda: served.ask((picture(), QUESTION)))
    found = re.search(r"are (\d+) tokens, and the model takes 20;", message)
    assert found and 20 < int(found[1]) <= needed
    assert served.client.models.list().data[0].relook["context_window"] == 20


def test_a_question_without_an_image(served) -> None:
    """Front ends ask such ones, for titles of conversations."""
    reply = served.ask([{"role": "user", "content": "Give a title ."}], max_tokens=3)
    assert reply.choices[0].finish_reason == "length" and reply.relook["image"] is None


def test_health_metrics_and_documentation(served) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def numbers():
        found = text_string_to_metric_families(httpx2.get(f"{served.url}/metrics").text)
        return {(s.name, *s.labels.values()): s.value for family in found for s in family.samples}

    before = numbers()
    served.ask((picture(), QUESTION), max_tokens=4, extra_body={"relook": {"region": [1, 2, 3, 4]}})
    refused(lambda: served.ask((picture(), QUESTION), n=2))
    after = numbers()
    grown = {key for key, value in after.items() if value > before.get(key, 0)}
    path = "/v1/chat/completions"
    assert {("relook_requests_total", path, "200"), ("relook_requests_total", path, "400")} <= grown
    assert {("relook_looks_total", "region"), ("relook_tokens_total", "prompt")} <= grown
    assert {("relook_time_to_first_token_seconds_count",), ("relook_request_seconds_count",)} <= grown
    assert {("relook_engine_rows",), ("relook_engine_waiting",), ("process_resident_memory_bytes",)} <= set(after)
    for path in ("/health", "/health/live", "/health/ready"):
        assert httpx2.get(served.url + path).json() == {"status": "ok"}
    page = httpx2.get(f"{served.url}/docs").text
    assert "http://" not in page and "https://" not in page  # nothing from elsewhere
    assert httpx2.get(f"{served.url}/docs/static/swagger-ui-bundle.js").status_code == 200
    described = httpx2.get(f"{served.url}/openapi.json").json()["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(described) == {"200", "4XX", "5XX"} and "text/event-stream" in described["200"]["content"]
    for missing in (httpx2.get(f"{served.url}/v1/nothing"), httpx2.get(f"{served.url}{path.replace('health', 'x')}")):
        assert missing.status_code == 404 and missing.json()["error"]["message"]


def test_crops_in_the_text(served) -> None:
    """For front ends that show text only; sent back as history, they are not read."""
    with serving(served.engine, crops_in_text=True) as front:
        own = {"max_tokens": 6, "extra_body": {"relook": {"region": [1, 2, 3, 4]}}}
        text = front.ask((picture(), QUESTION), **own).choices[0].message.content
        answer = served.vlm.ask(picture(), QUESTION, region=(1, 2, 3, 4), max_new_tokens=6)
        shown, _, rest = text.removeprefix("![region look](").partition(")\n\n")
        assert rest == answer.text and opened(shown).tobytes() == answer.looks[0].image.tobytes()
        pieces = front.ask((picture(), QUESTION), stream=True, **own)
        assert "".join(p.choices[0].delta.content or "" for p in pieces).endswith(text)
        history = [user(picture(), QUESTION), {"role": "assistant", "content": text}, user([], "and ?")]
        turns = front.ask(history, max_tokens=3).relook["transcript"]
        assert turns[2] == {"role": "assistant", "text": answer.text, "sampled": False}


def test_pings(served, monkeypatch) -> None:
    monkeypatch.setattr(app_module, "PING_SECONDS", 0.001)
    body = {"messages": [user(picture(3), QUESTION)], "stream": True, "max_tokens": 4}
    with httpx2.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=60) as response:
        text = "".join(response.iter_text())
    assert ": ping\n\n" in text and text.endswith("data: [DONE]\n\n")
    assert served.ask((picture(3), QUESTION), stream=True, max_tokens=4).response.status_code == 200
