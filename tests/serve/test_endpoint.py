"""`relook.load` of an address, at relook's own server: answers are the model's own, whoever makes the crops."""

from __future__ import annotations

import numpy as np
import pytest
from openai import BadRequestError, RateLimitError
from support.running_server import running, serving, user
from support.scripted_model import picture, writing

import relook
from relook.cli.app import app
from relook.errors import RelookError, UserError
from relook.interventions import Intervention
from relook.looks import IM_END, LOOKS, write_call
from relook.options import AskOptions
from relook.perceive.endpoint.openai import OpenAIEngine
from relook.perceive.engine import GivenLook, Past, Request
from relook.perceive.local import LocalEngine
from relook.serve.app import create_app
from relook.serve.settings import ServeSettings
from relook.trace import LookTaken, TextDelta
from zoo.worlds.cards import Cards

PAGE = Cards(7).sample(0)
QUESTION = PAGE.qas[0].question


@pytest.fixture(scope="module")
def local():
    return relook.load("cards-tiny")


@pytest.fixture(scope="module")
def url(local):
    engine = LocalEngine(local)
    with serving(engine) as served:
        yield f"{served.url}/v1"
    engine.close()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"look": "region"},
        {"region": "1,1,3,3"},
        {"box": "9,200,99,301"},
        {"look": "none"},
        {"look": "clip"},
        {"max_looks": 2},
    ],
)
def test_answers_are_those_of_the_model_itself(url, local, options):
    """Region crops are made here and sent back; a re-encoding look is taken by the server."""
    ours, theirs = relook.load(url).ask(PAGE.image, QUESTION, **options), local.ask(PAGE.image, QUESTION, **options)
    assert ours.text == theirs.text and ours.looks == theirs.looks and ours.warnings == theirs.warnings
    assert ours.usage.sequence_length == theirs.usage.sequence_length
    assert ours.usage.generated_tokens == theirs.usage.generated_tokens
    for one, other in zip(ours.looks, theirs.looks, strict=True):
        if one.kind == "clip":
            np.testing.assert_allclose(one.attention, other.attention, rtol=1e-4)
        else:
            assert one.attention is None
            assert np.array_equal(np.asarray(one.image), np.asarray(PAGE.image.crop(other.box)))


@pytest.mark.parametrize("name", ["other", "moved", "blank"])
def test_what_is_shown_instead_reaches_the_model(url, local, name):
    """As in this process; only a blank crop is grey, since the server's processor and its mean are not known here."""
    change = Intervention(name, Cards(7).sample(1).image if name == "other" else None)
    ours, theirs = (vlm.ask(PAGE.image, QUESTION, intervention=change) for vlm in (relook.load(url), local))
    assert ours.looks == theirs.looks and ours.usage.sequence_length == theirs.usage.sequence_length
    shown = change.crop(PAGE.image, ours.looks[0].box, relook.load(url).processor)
    assert np.array_equal(np.asarray(ours.looks[0].image), np.asarray(shown))
    assert ours.text == theirs.text or name == "blank"
    assert ours.text != local.ask(PAGE.image, QUESTION).text or name == "moved"


@pytest.mark.parametrize("options", [{}, {"max_looks": 2}, {"region": "2,2,5,5"}, {"box": "100,200,110,212"}])
def test_looks_that_nest_are_those_of_the_model_itself(local, options):
    """Calls come one by one, each crop is made here; forced ones are the server's."""
    vlm = local.with_settings(region_of="last", max_looks=3, region_margin=0)
    engine = LocalEngine(vlm)
    with serving(engine) as served:
        remote = relook.load(f"{served.url}/v1")
        ours, theirs = remote.ask(PAGE.image, QUESTION, **options), vlm.ask(PAGE.image, QUESTION, **options)
        chats = [each.chat(PAGE.image) for each in (remote, vlm)]
        for chosen in (options, {}):
            one, other = (chat.ask(QUESTION, **chosen) for chat in chats)
            assert (one.text, one.looks, one.usage.sequence_length) == (
                other.text,
                other.looks,
                other.usage.sequence_length,
            )
    engine.close()
    assert ours.text == theirs.text and ours.looks == theirs.looks
    assert len(ours.looks) > 1 or "box" not in options
    for look in ours.looks:
        assert np.array_equal(np.asarray(look.image), np.asarray(PAGE.image.crop(look.box)))


def test_a_history_of_nested_boxes_through_a_server_in_front(tiny_vlm):
    """Boxes without the cells that were named are mapped alike at every station."""
    vlm = tiny_vlm(("region", "clip"), region_of="last", max_looks=3, free_choice=True)
    engine, image = LocalEngine(vlm), picture(2, (300, 200))
    looks = ((GivenLook(box=(0, 0, 150, 100)),), (GivenLook(kind="clip"),), (GivenLook(box=(38, 50, 75, 75)),))
    past = (Past("Before?", (image, image), "7", looks, look_at=1),)
    request = Request("And now?", (), AskOptions.of({"max_new_tokens": 1, "look": "none"}), past=past)
    with serving(engine) as served:
        front = OpenAIEngine(f"{served.url}/v1")
        answers = []
        for each in (engine, front):
            with writing(vlm, "7"):
                answers.append([*each.submit(request)][-1].answer)
        assert answers[0].usage.sequence_length == answers[1].usage.sequence_length
        texts = [turn.text for turn in answers[0].transcript]
        assert write_call("region", (0, 0, 3, 3)) in texts and write_call("region", (1, 3, 3, 4)) in texts
        front.close()
    engine.close()


def test_looks_of_the_server_between_regions_that_nest(tiny_vlm):
    """Turns with a re-encoding are the server's, others are taken here; also through a second server."""
    settings = {"region_of": "last", "max_looks": 3, "free_choice": True, "region_margin": 1}
    vlm, images = tiny_vlm(("region", "clip"), **settings), [picture(2, (300, 200)), picture(3, (200, 320))]
    region, clip = [write_call("region", cells) for cells in ((1, 1, 6, 5), (0, 4, 2, 7), (5, 5, 6, 7))], LOOKS["clip"]
    scripts = (
        [region[0] + clip.start, region[1], IM_END, region[2], IM_END, "7"],
        [region[1], IM_END, region[0], IM_END, "8"],
    )
    chat, whole = vlm.chat(images), []
    for script in scripts:
        with writing(vlm, *script):
            whole.append(chat.ask(QUESTION, look_at=1))
    assert [[look.turn for look in each.looks] for each in whole] == [[0, 0, 1, 2], [0, 1]]
    engine = LocalEngine(vlm)
    with serving(engine) as served:
        remote, between = relook.load(f"{served.url}/v1").chat(images), OpenAIEngine(f"{served.url}/v1")
        for script, wanted in zip(scripts, whole, strict=True):
            with writing(vlm, *script):
                answer = remote.ask(QUESTION, look_at=1)
            assert (answer.text, answer.looks) == (wanted.text, wanted.looks)
            assert [look.turn for look in answer.looks] == [look.turn for look in wanted.looks]
            assert answer.usage.sequence_length == wanted.usage.sequence_length
        with serving(between) as second:
            messages = []
            for number, (script, wanted) in enumerate(zip(scripts, whole, strict=True)):
                messages.append(user([] if number else images, QUESTION))
                with writing(vlm, *script):
                    reply = second.ask(messages, extra_body={"relook": {"look_at": 1}})
                messages.append(reply.choices[0].message.model_dump(exclude_none=True))
                assert [tuple(look["box"]) for look in reply.relook["looks"]] == [look.box for look in wanted.looks]
                assert reply.usage.total_tokens == wanted.usage.sequence_length
        between.close()
    engine.close()


def test_a_client_with_a_tool_of_a_server_in_front_of_another(tiny_vlm):
    """Whichever it asks, one sees the same: the server's looks before its calls, and the crops that it has sent."""
    vlm, image = tiny_vlm(("region", "clip"), region_of="last", max_looks=3, free_choice=True), picture(2, (300, 200))
    region, crop = [write_call("region", cells) for cells in ((1, 1, 6, 5), (0, 4, 2, 7))], picture(5, (150, 40))
    script = [region[0] + LOOKS["clip"].start, region[0] + region[1], IM_END, "7"]
    box = {"type": "object", "properties": {"bbox_2d": {"type": "array", "items": {"type": "number"}}}}
    tools = [{"type": "function", "function": {"name": "image_zoom_in_tool", "description": "", "parameters": box}}]
    engine, seen = LocalEngine(vlm), []
    with serving(engine) as served:
        between = OpenAIEngine(f"{served.url}/v1")
        with serving(between) as second:
            for server in (served, second):
                messages, found = [user(image, QUESTION)], []
                for rest in (script, script[3:], ["8"]):
                    with writing(vlm, *rest):
                        reply = server.ask(messages, tools=tools)
                    message = reply.choices[0].message.model_dump(exclude_none=True)
                    found.append((reply.usage.total_tokens, message.get("content"), reply.relook["looks"]))
                    messages.append(message)
                    for number, call in enumerate(message.get("tool_calls", ())):
                        call["id"] = f"call_{number}"  # which says no cells
                        part = user(crop)["content"] if number else "as you know"
                        messages.append({"role": "tool", "tool_call_id": call["id"], "content": part})
                    messages += [user([], "And?")] if message.get("content") else []
                seen.append(found)
        between.close()
    engine.close()
    assert [found[:2] for found in seen[0]] == [found[:2] for found in seen[1]]
    assert [content for _, content, _ in seen[0]] == [None, "7", "8"]
    for one, other in zip(*seen, strict=True):
        assert [look["box"] for look in one[2]] == [look["box"] for look in other[2]]


def test_its_description_is_the_models(url, local):
    remote = relook.load(url)
    assert (remote.name, remote.looks, remote.domain, remote.context) == ("cards-tiny", local.looks, "cards", 4096)
    assert remote.warnings == local.warnings and remote.engine.dialect == "relook"


def test_a_conversation_with_all_looks(url, local):
    ours, theirs = relook.load(url).chat(PAGE.image), local.chat(PAGE.image)
    for options in ({"region": "0,5,1,5"}, {"look": "clip"}, {"look": "none"}, {}):
        one, other = ours.ask(QUESTION, **options), theirs.ask(QUESTION, **options)
        assert one.text == other.text and one.looks == other.looks
        assert one.usage.sequence_length == other.usage.sequence_length


def test_a_stream(url):
    *events, finished = relook.load(url).stream(PAGE.image, QUESTION)
    assert any(isinstance(event, LookTaken) for event in events)
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == finished.answer.text


def test_other_models_dialect_at_the_same_server(url, local):
    """The tool's description says how boxes count, and the server calls it so."""
    remote = relook.load(url, dialect="qwen3-vl")
    remote.processor.view = lambda image, stage: image  # the server sees to that
    for qa in PAGE.qas[:3]:
        ours, theirs = remote.ask(PAGE.image, qa.question), local.ask(PAGE.image, qa.question)
        assert ours.text == theirs.text and [look.box for look in ours.looks] == [look.box for look in theirs.looks]


def test_a_server_in_front_of_an_endpoint(url, local):
    """The seam: relook's server over an engine that is itself at an address."""
    engine = OpenAIEngine(url)
    with serving(engine) as served:
        remote = relook.load(f"{served.url}/v1")
        answer = remote.ask(PAGE.image, QUESTION)
        assert answer.text == local.ask(PAGE.image, QUESTION).text and answer.looks[0].cells == (0, 5, 1, 5)
        assert served.client.models.list().data[0].relook["looks"] == ["region", "clip"]
        with pytest.raises(BadRequestError, match="answers 400"):
            served.ask((PAGE.image, "what " * 3000))
        engine.max_rows = 0
        with pytest.raises(RateLimitError):
            served.ask((PAGE.image, QUESTION))
    engine.close()


def test_relook_serve_in_front_of_an_endpoint(url, monkeypatch):
    started = []
    monkeypatch.setattr("relook.serve.run.serve", lambda engine, *_: started.append(engine))
    with pytest.raises(SystemExit) as left:
        app(["serve", "--base-url", url, "--port", "0", "--rows", "3", "--waiting", "4"])
    assert left.value.code == 0 and isinstance(started[0], OpenAIEngine) and started[0].max_rows == 7


def test_refusals(url):
    with pytest.raises(UserError, match="condition=False"):
        relook.load(url).ask(PAGE.image, QUESTION, look="clip", condition=False)
    with pytest.raises(UserError, match="constrain=False"):
        relook.load(url).ask(PAGE.image, QUESTION, constrain=False)
    with pytest.raises(RelookError, match="answers 400: "):
        relook.load(url).ask(PAGE.image, QUESTION * 1000)


def test_keys(local, monkeypatch):
    engine = LocalEngine(local)
    with running(create_app(engine, ServeSettings.model_validate({"security": {"keys": ["sk-right"]}}))) as address:
        address += "/v1"
        monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
        with pytest.raises(RelookError, match="refuses the key") as raised:
            relook.load(address)
        assert "sk-wrong" not in str(raised.value)
        monkeypatch.setenv("RELOOK_API_KEY", "sk-right")
        assert relook.load(address).ask(PAGE.image, QUESTION, look="none").text
    engine.close()
