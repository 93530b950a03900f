"""Models behind OpenAI-compatible endpoints: region looks with crops made here.

Behind the control-token dialect stands transformers' own `generate` of an exported model, behind the tool dialects a
script; relook's own server is in tests/serve/test_endpoint.py, a real vLLM in tests/serve/test_vllm.py.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image
from support.openai_server import PlainQwen, Said, openai_server
from support.scripted_model import picture, writing

import relook
from relook.cli.app import app
from relook.errors import RelookError, UserError
from relook.evaluate import evaluate
from relook.evaluate.records import read_folder
from relook.looks import IM_END, write_call
from relook.model.export import export
from relook.options import AskOptions
from relook.perceive.endpoint.openai import OpenAIEngine
from relook.perceive.engine import Cancelled, DeadlineExceeded, EngineBusy, EngineClosed, GivenLook, Past, Request
from relook.perceive.local import LocalEngine
from relook.processing import View
from relook.trace import Finished, LookTaken, TextDelta
from zoo.worlds.cards import Cards

PAGE = Cards(7).sample(0)
QUESTION = PAGE.qas[0].question
USAGE = {
    "prompt_tokens": 50,
    "completion_tokens": 7,
    "total_tokens": 57,
    "prompt_tokens_details": {"cached_tokens": 20},
}


def region(x0, y0, x1, y1, grid=8):
    return write_call("region", (x0, y0, x1, y1), grid)


def same(ours, theirs):
    """Two answers with the same text and regions, seen pixel by pixel alike."""
    assert ours.text == theirs.text and ours.finish == theirs.finish
    assert ours.looks == theirs.looks  # kind, cells, box, problem
    for a, b in zip(ours.looks, theirs.looks, strict=True):
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
    assert [turn.text for turn in ours.transcript] == [turn.text for turn in theirs.transcript]
    assert ours.usage.sequence_length == theirs.usage.sequence_length
    assert ours.warnings[0] == theirs.warnings[0] and ours.grid == theirs.grid


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return PlainQwen(export("cards-tiny", tmp_path_factory.mktemp("export") / "plain"))


@pytest.fixture(scope="module")
def server(plain):
    with openai_server(plain, [{"id": "cards-tiny", "max_model_len": 2048}]) as server:
        yield server


@pytest.fixture(scope="module")
def remote(server):
    return relook.load(server.url)


@pytest.fixture(scope="module")
def local():
    return relook.load("cards-tiny")


# -- control tokens, a real model behind them ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"look": "region"}, {"region": "1,1,3,3"}, {"box": (9, 200, 99, 301)}, {"look": "none"}, {"max_looks": 0}],
)
def test_answers_are_those_of_the_model_itself(remote, local, options):
    for number in range(2):
        page = Cards(7).sample(number)
        for qa in page.qas[:2]:
            theirs = local.ask(page.image, qa.question, **options)
            assert options or theirs.looks[0].kind == "region"
            same(remote.ask(page.image, qa.question, **options), theirs)


def test_looks_that_nest_are_those_of_the_model_itself(tiny_vlm, tmp_path):
    """Control tokens: the crops of calls that count in the view before are made here."""
    settings = {"region_of": "last", "max_looks": 3, "free_choice": True}
    vlm = tiny_vlm(("region", "clip"), **settings)
    vlm.model.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    calls, image = [region(1, 1, 6, 5), region(0, 4, 2, 7)], picture(0, (300, 200))

    def said(body):
        turns = sum(message["role"] == "assistant" for message in body["messages"])
        return Said([*calls, "7"][turns % 3 : turns % 3 + 1], usage=USAGE)

    with openai_server(said, [{"id": "m"}]) as server:
        remote, chat = relook.load(server.url, processor=tmp_path / "model"), vlm.chat(image)
        ours = remote.chat(image)
        for _ in range(2):
            with writing(vlm, calls[0], IM_END, calls[1], IM_END, "7"):
                same_looks(ours.ask(QUESTION), chat.ask(QUESTION))
        boxed = {"box": (130, 90, 136, 96), "max_new_tokens": 1}
    with openai_server(lambda body: Said(["7"], usage=USAGE), [{"id": "m"}]) as server:
        remote = relook.load(server.url, processor=tmp_path / "model")
        with writing(vlm, "7"):
            theirs = vlm.ask(image, QUESTION, **boxed)
        same_looks(remote.ask(image, QUESTION, **boxed), theirs)
        assert len(theirs.looks) == 3
        past = Past("Before?", (image,), "7", ((GivenLook((1, 1, 6, 5)),), (GivenLook(box=theirs.looks[1].box),)))
        request = Request("Now?", (), AskOptions.of({"max_new_tokens": 1, "look": "none"}), past=(past,))
        local = LocalEngine(vlm)
        with writing(vlm, "7"):
            given = [*local.submit(request)][-1].answer
        local.close()
        told = [*remote.engine.submit(request)][-1].answer
    assert [turn.text for turn in told.transcript] == [turn.text for turn in given.transcript]


def same_looks(ours, theirs):
    assert ours.text == theirs.text == "7" and ours.looks == theirs.looks
    assert [turn.text for turn in ours.transcript] == [turn.text for turn in theirs.transcript]
    for one, other in zip(ours.looks, theirs.looks, strict=True):
        assert np.array_equal(np.asarray(one.image), np.asarray(other.image))


def test_several_at_once_in_order(remote, local):
    page = Cards(7).sample(1)
    pairs = [(page.image, qa.question, {"look": look}) for qa in page.qas for look in ("none", "region")]
    for ours, theirs in zip(remote.ask_many(pairs, batch_size=3), local.ask_many(pairs), strict=True):
        same(ours, theirs)
    with pytest.raises(UserError, match=r"question 1: .*'seg'"):
        remote.ask_many([pairs[0], (page.image, QUESTION, {"look": "seg"})])


def test_a_conversation_is_sent_as_it_was(remote, local, server):
    ours, theirs = remote.chat(PAGE.image), local.chat(PAGE.image)
    for qa, cells in zip(PAGE.qas[:3], ("1,1,3,3", "0,5,1,5", "2,2,2,2"), strict=True):
        one, other = ours.ask(qa.question, region=cells), theirs.ask(qa.question, region=cells)
        assert one.text == other.text and one.looks == other.looks
        assert one.usage.sequence_length == other.usage.sequence_length  # crops of earlier questions are in it
    before = json.dumps(server.bodies[-3]["messages"])
    assert json.dumps(server.bodies[-1]["messages"]).startswith(before[:-1])  # what an engine has seen it can keep


def test_history_of_a_request(remote, local, plain):
    """`Request.past` with looks, as a server in front of an endpoint gives it."""
    first = local.ask(PAGE.image, QUESTION, look="region")
    past = Past(QUESTION, (PAGE.image,), first.text, ((GivenLook(first.looks[0].cells),),))
    chat = local.chat(PAGE.image)
    chat.ask(QUESTION, look="region")
    expected = chat.ask(PAGE.qas[1].question, region="1,1,3,3")
    request = Request(PAGE.qas[1].question, (), AskOptions.of({"region": "1,1,3,3"}), past=(past,))
    *events, finished = remote.engine.submit(request)
    assert isinstance(finished, Finished) and finished.answer.text == expected.text
    assert finished.answer.usage.sequence_length == expected.usage.sequence_length
    assert any(isinstance(event, LookTaken) for event in events)


def test_several_images(remote, local):
    pages = [Cards(7).sample(i).image for i in range(2)]
    for options in ({"region": "1,1,3,3"}, {"region": "1,1,3,3", "look_at": 1}, {"look": "none"}):
        same(remote.ask(pages, QUESTION, **options), local.ask(pages, QUESTION, **options))


@pytest.mark.parametrize("free_choice", [False, True])
def test_prompts_views_and_margin_are_the_processors(tiny_vlm, tmp_path, free_choice):
    """A model that is asked for looks by a sentence, in the published order, with views and a margin of its own."""
    vlm = tiny_vlm(second_look=View(96), region_margin=0, free_choice=free_choice)
    vlm.model.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    with openai_server(PlainQwen(export(tmp_path / "model", tmp_path / "plain")), [{"id": "m"}]) as server:
        remote = relook.load(server.url, processor=tmp_path / "model")
        for options in ({"region": "2,3,5,6"}, {"look": "none"}):
            ours, theirs = (v.ask(picture(), "What is it?", max_new_tokens=6, **options) for v in (remote, vlm))
            assert [turn.text for turn in ours.transcript] == [turn.text for turn in theirs.transcript]
            assert ours.looks == theirs.looks and ours.finish == theirs.finish == "length"
            assert ours.usage.sequence_length == theirs.usage.sequence_length - 1  # whose <|im_end|> is counted
        past = Past("Before?", (picture(),), "Yes.", look="auto")
        request = Request("And now?", (), AskOptions.of({"look": "none", "max_new_tokens": 2}), past=(past,))
        local = LocalEngine(vlm)
        ours, theirs = ([*engine.submit(request)][-1].answer for engine in (remote.engine, local))
        local.close()
        assert [turn.text for turn in ours.transcript] == [turn.text for turn in theirs.transcript]
        asked = remote.ask(picture(), "What is it?", max_new_tokens=1).transcript[1].text
        assert asked == vlm.ask(picture(), "What is it?", max_new_tokens=1).transcript[1].text


def test_events_add_up(remote):
    *events, finished = remote.stream(PAGE.image, QUESTION)
    assert [type(event) for event in events].index(LookTaken) == 0  # no control token is text
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == finished.answer.text


def test_whoever_asks_may_take_the_looks(remote):
    request = Request(QUESTION, (PAGE.image,), AskOptions.of({}), hold_regions=True)
    *_, finished = remote.engine.submit(request)
    answer = finished.answer
    assert answer.finish == "look" and answer.looks[0].cells == (0, 5, 1, 5) and answer.looks[0].image is None
    given = Request(QUESTION, (PAGE.image,), looks=((GivenLook((0, 5, 1, 5)),),))
    *_, finished = remote.engine.submit(given)
    assert finished.answer.text == PAGE.qas[0].answer and not finished.answer.looks


def test_usage_is_the_servers(local):
    with openai_server(lambda body: Said([region(0, 5, 1, 5)] if len(body["messages"]) == 2 else ["7"], usage=USAGE),
                       [{"id": "cards-tiny"}]) as server:  # fmt: skip
        usage = relook.load(server.url).ask(PAGE.image, QUESTION).usage
    assert (usage.sequence_length, usage.generated_tokens, usage.cached_tokens, usage.lm_positions) == (57, 14, 40, 74)


# -- what a model writes ---------------------------------------------------------------------------------------------


def script(*turns):
    """Answers in turn, the last one again and again."""
    left = list(turns)
    return lambda body: left.pop(0) if len(left) > 1 else left[0]


def opened(body, message):
    """The images of a message of a request."""
    parts = body["messages"][message]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def test_pieces_cut_anywhere():
    call = f"I look. {region(0, 5, 1, 5)}"
    pieces = [call[i : i + 3] for i in range(0, len(call), 3)]
    answer = ["Now answer", " the question.\n7 <", " 8 <|", "x_1|>and", "\n"]
    with openai_server(script(Said(pieces), Said(answer)), [{"id": "cards-tiny"}]) as server:
        *events, finished = relook.load(server.url).stream(PAGE.image, QUESTION)
    assert finished.answer.text == "7 < 8 and"
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == "I look.7 < 8 and"
    assert server.bodies[1]["messages"][2]["content"] == call


def test_several_regions_in_a_turn():
    with openai_server(
        script(Said([region(0, 0, 0, 0) + region(7, 7, 7, 7)]), Said(["7"])), [{"id": "cards-tiny"}]
    ) as (server):
        answer = relook.load(server.url).ask(PAGE.image, QUESTION)
    assert [look.cells for look in answer.looks] == [(0, 0, 0, 0), (7, 7, 7, 7)]
    texts = [part.get("text") for part in server.bodies[1]["messages"][3]["content"]]
    assert texts == ["Region 0: ", None, "\nRegion 1: ", None, "\n"]  # the published form


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("<|region_token_start|><|x_1|><|y_1|>", "cut off"),
        ("<|region_token_start|><|x_9|><|y_1|><|region_token_end|>", "not on the grid"),
        ("<|clip_action_start|><|clip_action|><|clip_action_end|>", "relook serve"),
    ],
)
def test_a_call_that_cannot_be_taken_is_recorded_and_the_question_asked_again(written, problem):
    with openai_server(script(Said([written]), Said(["7"])), [{"id": "cards-tiny"}]) as server:
        answer = relook.load(server.url).ask(PAGE.image, QUESTION)
    assert answer.text == "7" and problem in answer.looks[0].problem and answer.looks[0].image is None
    first, second = server.bodies
    assert second["messages"][-1]["content"] == [{"type": "text", "text": QUESTION}]
    assert "<|clip_action_start|>" in first["bad_words"] and "<|region_token_start|>" not in first["bad_words"]
    assert "<|region_token_start|>" in second["bad_words"]


def test_a_call_with_no_look_left_ends_the_answer():
    with openai_server(
        script(Said([region(0, 0, 1, 1)]), Said([f"7 {region(0, 0, 1, 1)}"])), [{"id": "cards-tiny"}]
    ) as (server):
        answer = relook.load(server.url).ask(PAGE.image, QUESTION)
    assert answer.text == "7" and [look.problem for look in answer.looks] == [
        None,
        "no look was left when the model called it",
    ]


# -- other models: tool calls ----------------------------------------------------------------------------------------


def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 700, 3), dtype=np.uint8))


def test_qwen3_vl_zooms_by_tool_calls():
    """Boxes from 0 to 1000, calls and results in the API's shape, the crop in a message of the user's."""
    call = Said(calls=[("c1", "image_zoom_in_tool", '{"bbox_2d": [100, 200, 500, 800], "label": "x"}')])
    with openai_server(script(call, Said(["a ", "cat"])), [{"id": "Qwen/Qwen3-VL-4B-Instruct"}]) as server:
        answer = relook.load(server.url).ask(photo(), "What is it?", max_looks=2)
    assert answer.text == "a cat" and answer.looks[0].box == (70, 100, 350, 400)
    assert np.array_equal(np.asarray(answer.looks[0].image), np.asarray(photo().crop((70, 100, 350, 400)).resize(
        answer.looks[0].image.size, Image.Resampling.BICUBIC)))  # fmt: skip
    first, second = server.bodies
    assert [tool["function"]["name"] for tool in first["tools"]] == ["image_zoom_in_tool"]
    assert "0 to 1000" in json.dumps(first["tools"]) and first["tool_choice"] == "auto"
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "tool", "user"]
    assert second["messages"][1]["tool_calls"][0]["id"] == second["messages"][2]["tool_call_id"] == "c1"
    assert isinstance(second["messages"][2]["content"], str)  # engines take no images there
    (crop,) = opened(second, 3)
    assert crop.size == answer.looks[0].image.size and all(side % 32 == 0 for side in crop.size)
    assert answer.transcript[1].text == 'image_zoom_in_tool({"bbox_2d": [100, 200, 500, 800], "label": "x"})'


def test_qwen25_vl_zooms_by_calls_in_its_text():
    """Its chat template drops tools: they are in the system prompt. Boxes are pixels of the image as it was sent."""
    wanted = '{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [74, 74, 370, 444]}}'
    call = Said(["Let me see.<tool", f"_call>\n{wanted}", "\n</tool_call>"])
    big = photo().resize((1400, 1000))
    with openai_server(script(call, Said(["a cat"])), [{"id": "Qwen2.5-VL-7B-Instruct"}]) as server:
        answer = relook.load(server.url).ask(big, "What is it?")
    (sent,) = opened(server.bodies[0], 1)
    assert sent.size == (1036, 728)  # multiples of 28, so that the server does not resize it
    assert answer.text == "a cat" and answer.looks[0].box == (100, 101, 500, 610)
    system, _, said, result = server.bodies[1]["messages"]
    assert (
        "image_zoom_in_tool" in system["content"] and "pixels" in system["content"] and "tools" not in server.bodies[0]
    )
    assert said["content"].startswith("Let me see.<tool_call>")
    assert [part.get("text") for part in result["content"]] == ["<tool_response>\n", None, "\n</tool_response>"]


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("image_zoom_in_tool", '{"bbox_2d": [1, 2, 3]}', "four numbers"),
        ("image_zoom_in_tool", '{"bbox_2d": [500, 0, 100, 800]}', "backwards"),
        ("image_zoom_in_tool", '{"bbox_2d": "all"', "is no region"),
        ("image_zoom_in_tool", "[]", "is no region"),
        ("image_zoom_in_tool", '{"bbox_2d": [0, 0, 1e999, 1]}', "is no region"),
        ("image_zoom_in_tool", '{"bbox_2d": "<image>"}', "is no region"),
        ("image_zoom_in_tool", "[" * 100000, "is no region"),
        ("image_zoom_in_tool", '{"bbox_2d": [NaN, 0, 1, 1]}', "is no region"),
        ("search_the_web", "{}", "a call of 'search_the_web'"),
    ],
)
@pytest.mark.parametrize("model", ["Qwen3-VL", "Qwen2.5-VL"])
def test_a_malformed_tool_call_is_recorded(model, name, arguments, problem):
    text = f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'
    turn = Said(calls=[("c1", name, arguments)]) if model == "Qwen3-VL" else Said([text])
    with openai_server(script(turn, Said(["a cat"])), [{"id": model}]) as server:
        answer = relook.load(server.url).ask(photo(), "What is it?")
    assert answer.text == "a cat" and problem in answer.looks[0].problem and answer.looks[0].box is None
    if model == "Qwen3-VL":
        assert server.bodies[1]["tool_choice"] == "none" and server.bodies[1]["messages"][2]["role"] == "tool"


def test_a_forced_region_of_other_models():
    for model, box in (("Qwen3-VL", [124, 124, 375, 374]), ("Qwen2.5-VL", [87, 62, 262, 189])):
        with openai_server(script(Said(["a cat"])), [{"id": model}]) as server:
            remote = relook.load(server.url)
            look = remote.ask(photo(), "What is it?", region="1,1,2,2").looks[0]
            assert look.box == (87, 62, 262, 187) and look.cells == (1, 1, 2, 2)
            assert len(server.bodies) == 1
            assert str(box) in json.dumps(server.bodies[0]["messages"])
            remote.ask(photo(), "What is it?", look="region")
            if model == "Qwen3-VL":
                assert server.bodies[1]["tool_choice"]["function"]["name"] == "image_zoom_in_tool"


# -- what is refused, and what fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"look": "clip"}, "hidden states of the model"),
        ({"region": (0, 0, 8, 8)}, "does not fit the 8 x 8 grid"),
        ({"box": (0, 0, 9000, 8)}, "leaves the image"),
        ({"condition": False}, "condition=False"),
        ({"blank": True, "look": "none"}, "blank=True with look='none'"),
        ({"look_at": 3}, "look_at=3 names no image"),
        ({"lok": "clip"}, "lok"),
    ],
)
def test_options_that_are_refused(remote, options, said):
    with pytest.raises(UserError, match=said):
        remote.ask(PAGE.image, QUESTION, **options)


def test_other_input_that_is_refused(remote, server):
    for question, said in (("", "empty"), ("What <|im_end|> is it?", "<|im_end|> in a text is structure")):
        with pytest.raises(UserError, match=said.replace("|", r"\|")):
            remote.ask(PAGE.image, question)
    with pytest.raises(UserError, match="no image was given"):
        remote.ask(None, QUESTION)
    with pytest.raises(UserError, match="first_look"):
        remote.with_settings(first_look=128)
    with pytest.raises(UserError, match="dtype is for a model in this process"):
        relook.load(server.url, dtype="float32")
    with pytest.raises(UserError, match="dialct"):
        relook.load(server.url, dialct="tokens")
    with pytest.raises(UserError, match="model= is for the address"):
        relook.load("cards-tiny", model="m")
    with pytest.raises(UserError, match="no server of relook's"):
        relook.load(server.url, dialect="relook")


def test_which_model():
    with openai_server(script(Said(["7"])), [{"id": "a"}, {"id": "cards-tiny"}]) as server:
        with pytest.raises(UserError, match=r"several models .'a', 'cards-tiny'.; name one"):
            relook.load(server.url)
        with pytest.raises(UserError, match="no model 'b'; it has"):
            relook.load(server.url, model="b")
        with pytest.raises(UserError, match=r"how 'a' .* is not known; give processor=NAME"):
            relook.load(server.url, model="a")
        assert relook.load(server.url, model="cards-tiny").domain == "cards"
        mine = relook.load(server.url, model="a", processor="receipts-tiny")
        assert mine.processor.grid_size == 16 and mine.looks == ["region"] and mine.name == "a"


def test_a_server_without_a_list_of_models():
    with openai_server(script(Said(["7"])), []) as server:
        assert relook.load(server.url, model="cards-tiny").ask(PAGE.image, QUESTION).text == "7"
        with pytest.raises(UserError, match=r"several models .none.; name one"):
            relook.load(server.url)


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        (Said(status=422, error=""), RelookError, "answers 422"),
        (Said(status=401, error="no such key"), RelookError, "refuses the key .no such key.; set RELOOK_API_KEY"),
        (Said(status=400, error="too long:\n9 tokens"), RelookError, "answers 400: too long: 9 tokens"),
        (Said(status=429, error="full", headers={"Retry-After": "0"}), EngineBusy, "is busy .full."),
        (Said(status=503, error="closing"), RelookError, "answers 503: closing"),
        (Said(status=500), RelookError, "answers 500"),
        (Said(["half an ans"], cut=True), RelookError, "ended before its answer did"),
        (Said(["<html>"], finish="stop", error=None, status=502), RelookError, "answers 502"),
    ],
)
def test_what_a_server_says_is_one_sentence(said, kind, words, monkeypatch, capsys):
    monkeypatch.setenv("RELOOK_API_KEY", "sk-secret")
    with openai_server(script(said), [{"id": "cards-tiny"}]) as server:
        remote = relook.load(server.url, retries=1)
        with pytest.raises(kind, match=words) as raised:
            remote.ask(PAGE.image, QUESTION)
        assert set(server.keys) == {"Bearer sk-secret"} and "sk-secret" not in str(raised.value)
        assert raised.value.exit_code == 1 and "\n" not in str(raised.value)
        assert len(server.bodies) == (2 if said.status in (429, 500, 502, 503) else 1)  # the client's own retries


def test_a_server_that_is_not_there(tmp_path, capsys):
    with openai_server(script(Said())) as server:
        url = server.url
    with pytest.raises(RelookError, match=r"cannot be reached .*Connection refused"):
        relook.load(url, retries=0)
    PAGE.image.save(tmp_path / "card.png")
    with pytest.raises(SystemExit) as left:
        app(["ask", str(tmp_path / "card.png"), QUESTION, "--base-url", url])
    assert left.value.code == 1 and capsys.readouterr().err.count("\n") == 1


def test_a_request_is_cancelled_timed_and_closed(local):
    release = threading.Event()

    def slow(body):
        release.wait(30)
        return Said(["7"])

    with openai_server(slow, [{"id": "cards-tiny"}]) as server:
        engine = OpenAIEngine(server.url, retries=0)
        request = Request(QUESTION, (PAGE.image,))
        running = engine.submit(request)
        running.cancel()
        with pytest.raises(Cancelled):
            list(running)
        with pytest.raises(DeadlineExceeded, match=r"not finished in 0.2 s"):
            list(engine.submit(request, timeout=0.2))
        with pytest.raises(RelookError, match=r"said nothing for 0.1 s"):
            relook.load(server.url, retries=0, timeout=0.1).ask(PAGE.image, QUESTION)
        running = engine.submit(request)
        assert engine.stats()["rows"] >= 1
        engine.close()
        with pytest.raises(EngineClosed):
            list(running)
        with pytest.raises(EngineClosed):
            engine.submit(request)
        release.set()


@pytest.mark.parametrize("how", ["cancel", "leave off", "deadline"])
def test_the_server_sees_that_the_client_has_gone(how):
    def forever():
        while True:
            time.sleep(0.01)
            yield "and "

    said = Said(forever())
    with openai_server(script(said), [{"id": "cards-tiny"}]) as server:
        engine = OpenAIEngine(server.url)
        running = engine.submit(Request(QUESTION, (PAGE.image,)), timeout=0.3 if how == "deadline" else None)
        events = iter(running)
        next(events)
        if how == "deadline":
            with pytest.raises(DeadlineExceeded):
                list(events)
        elif how == "cancel":
            running.cancel()
        else:
            events.close()
        assert said.gone.wait(10)
        assert not engine.stats()["rows"] or how == "cancel"


# -- command line ----------------------------------------------------------------------------------------------------


def run(*words):
    with pytest.raises(SystemExit) as left:
        app([str(word) for word in words])
    return left.value.code


def test_relook_ask_and_evaluate(server, local, tmp_path, capsys):
    PAGE.image.save(tmp_path / "card.png")
    assert run("ask", tmp_path / "card.png", QUESTION, "--base-url", server.url) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == PAGE.qas[0].answer and "look 1: region, cells 0,5,1,5" in shown.out
    assert "trained on cards only" in shown.err
    out = tmp_path / "out"
    asked = ("evaluate", "--base-url", server.url, "--model", "cards-tiny", "--tasks", "cards", "--limit", "2")
    assert run(*asked, "--looks", "auto", "oracle", "--out", out) == 0
    evaluate(local, ["cards"], ["auto", "oracle"], n=2, out=tmp_path / "local")
    ours, theirs = (read_folder(folder) for folder in (out, tmp_path / "local"))
    for one, other in zip(ours.records, theirs.records, strict=True):
        assert [one[key] for key in ("question", "answer", "looks", "scores", "iou", "transcript")] == [
            other[key] for key in ("question", "answer", "looks", "scores", "iou", "transcript")
        ]
    assert ours.run["facts"] == {"endpoint": server.url, "dialect": "tokens"}
    capsys.readouterr()
    assert run("ask", tmp_path / "card.png", QUESTION, "--processor", "cards-tiny") == 2
    assert run("ask", tmp_path / "card.png", QUESTION, "--base-url", "cards-tiny") == 2
    assert run("ask", tmp_path / "card.png", QUESTION, "--base-url", server.url, "--model", "b") == 2
    assert run("ask", tmp_path / "card.png", QUESTION, "--base-url", server.url, "--look", "clip") == 2
