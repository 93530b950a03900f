"""A client that people use beside OpenAI's own: LangChain's `ChatOpenAI`, unchanged."""

import asyncio
import re

import pytest
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from support import ROOT
from support.running_server import data_url, serving
from support.synthetic import QUESTION, Pages

import relook
from relook.perceive.local import LocalEngine

PAGE = Pages(1).sample(3)
ASKED = QUESTION.format(PAGE.qas[0].field)


@pytest.fixture(scope="module")
def served():
    engine = LocalEngine(relook.load("cards-tiny"))
    with serving(engine) as running:
        yield running
    engine.close()


@pytest.fixture
def chat(served, monkeypatch):
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    return ChatOpenAI(model=served.model, base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def shown(image, question=None):
    """A message as LangChain's documentation shows it."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}}]
    return HumanMessage([*parts, *([] if question is None else [{"type": "text", "text": question}])])


@tool
def image_zoom_in_tool(bbox_2d: list[int], label: str = "") -> str:
    """Zoom in on a region. bbox_2d is x1, y1, x2, y2 in pixels."""
    return ""


def test_answers(served, chat) -> None:
    answer = served.vlm.ask(PAGE.image, ASKED)
    reply = chat.invoke([SystemMessage("You are a helpful assistant."), shown(PAGE.image, ASKED)])
    assert reply.content == answer.text and reply.response_metadata["finish_reason"] == "stop"
    assert reply.usage_metadata["total_tokens"] == answer.usage.sequence_length


def test_streams(served, chat) -> None:
    answer = served.vlm.ask(PAGE.image, ASKED)
    pieces = list(chat.stream([shown(PAGE.image, ASKED)]))
    assert "".join(piece.text for piece in pieces) == answer.text and len(pieces) > 2

    async def stream():
        return [piece async for piece in chat.astream([shown(PAGE.image, ASKED)])]

    assert "".join(piece.text for piece in asyncio.run(stream())) == answer.text


def test_batches_and_options(served, chat) -> None:
    images = [Pages(1).sample(i).image for i in range(3)]
    answers = served.vlm.ask_many([(image, ASKED) for image in images], look="none", max_new_tokens=2)
    bound = chat.bind(max_tokens=2, stop=["never"], logprobs=True, extra_body={"relook": {"look": "none"}})
    replies = bound.batch([[shown(image, ASKED)] for image in images])
    assert [reply.content for reply in replies] == [answer.text for answer in answers]
    tokens = replies[0].response_metadata["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens).strip() == replies[0].content


@pytest.mark.parametrize("way", ["tool", "user"])
def test_takes_region_looks_itself(served, chat, way) -> None:
    answer = served.vlm.ask(PAGE.image, ASKED)
    bound, messages = chat.bind_tools([image_zoom_in_tool]), [shown(PAGE.image, ASKED)]
    reply = bound.invoke(messages)
    (call,) = reply.tool_calls
    assert call["name"] == "image_zoom_in_tool" and tuple(call["args"]["bbox_2d"]) == answer.looks[0].box
    crop = PAGE.image.crop(tuple(call["args"]["bbox_2d"]))
    part = {"type": "image_url", "image_url": {"url": data_url(crop)}}
    messages += [reply, ToolMessage([part] if way == "tool" else "below", tool_call_id=call["id"])]
    messages += [] if way == "tool" else [shown(crop)]
    assert bound.invoke(messages).content == answer.text


def test_the_examples_of_the_documentation(served, monkeypatch, capsys) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(ROOT)
    values: dict = {}
    for block in blocks:
        exec(block.replace("http://127.0.0.1:8000", served.url), values)
    card, question = str(ROOT / "examples/card.png"), "What is the code in the RED box?"
    whole = served.vlm.ask(card, question)
    assert capsys.readouterr().out == f"{whole.text} {list(whole.looks[0].box)}\n"
    assert values["again"].choices[0].message.content == served.vlm.ask(card, question, region=(3, 3, 4, 4)).text
    assert values["zoomed"].choices[0].message.content == whole.text and len(blocks) == 3
