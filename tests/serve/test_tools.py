"""Region looks as calls of the client's `image_zoom_in_tool`: the client crops, and the answer is the one of `ask`."""

import json

import httpx
import openai
import pytest
from support.running_server import data_url, serving, user
from support.scripted_model import QUESTION, picture, writing
from support.synthetic import QUESTION as CODE
from support.synthetic import Pages

import relook
from relook.boxes import read_box
from relook.looks import IM_END, LOOKS, write_call
from relook.perceive.local import LocalEngine

IMAGE = Pages(1).sample(3)
ASKED = CODE.format(IMAGE.qas[0].field)


@pytest.fixture(scope="module")
def cards():
    engine = LocalEngine(relook.load("cards-tiny"))
    with serving(engine) as running:
        yield running
    engine.close()


@pytest.fixture(scope="module")
def random(tiny_vlm):
    """A random model with regions alone; its crops are of the cells that it names."""
    engine = LocalEngine(tiny_vlm(("region",), first_look=relook.processing.View(64)))
    with serving(engine) as running:
        yield running
    engine.close()


ZOOM = "image_zoom_in_tool"


def tool(description="", item="number", name=ZOOM, required=("bbox_2d",), **more):
    """A tool as Qwen-Agent and DeepEyes describe it."""
    box = {"type": "array", "items": {"type": item}, "description": "as [x1, y1, x2, y2]" + description}
    parameters = {"type": "object", "properties": {"bbox_2d": box, **more}, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": "Zoom in", "parameters": parameters}}


QWEN = tool(label={"type": "string"}, img_idx={"type": "number"}, required=("bbox_2d", "label", "img_idx"))


def cut(image, call, form="pixels"):
    """The crop, as a client makes it."""
    return image.crop(tuple(map(round, read_box(json.loads(call.function.arguments)["bbox_2d"], image.size, form))))


def picture_part(image):
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def refused(call):
    with pytest.raises(openai.BadRequestError) as caught:
        call()
    return caught.value.body["message"]


@pytest.mark.parametrize(
    ("said", "item", "form"),
    [
        ("", "number", "pixels"),
        (" in absolute pixels", "integer", "pixels"),
        (", values from 0 to 1000", "number", "0-1000"),
        (" in 0-1000 relative units", "integer", "0-1000"),
        (", normalized to [0, 1]", "number", "0-1"),
    ],
)
def test_a_call_in_the_units_that_the_tool_states(cards, said, item, form) -> None:
    look = cards.vlm.ask(IMAGE.image, ASKED).looks[0]
    (choice,) = cards.ask((IMAGE.image, ASKED), tools=[tool(said, item)]).choices
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"bbox_2d"} and call.function.name == "image_zoom_in_tool" and call.type == "function"
    scale = {"pixels": 512, "0-1000": 1000, "0-1": 1}[form]
    assert arguments["bbox_2d"] == pytest.approx([value * scale / 512 for value in look.box], abs=1e-5)
    other = cards.ask((IMAGE.image, ASKED), tools=[tool()], extra_body={"relook": {"boxes": "0-1000"}})
    other = json.loads(other.choices[0].message.tool_calls[0].function.arguments)["bbox_2d"]
    assert other == pytest.approx([value * 1000 / 512 for value in look.box])


def answers(call, crop):
    """Ways in which clients send a crop back."""
    in_tool = {"role": "tool", "tool_call_id": call.id, "content": [picture_part(crop)]}
    said = {"role": "tool", "tool_call_id": call.id, "content": "The crop is in the next message."}
    by_user = {"role": "user", "content": [{"type": "text", "text": "<tool_response>"}, picture_part(crop)]}
    return {
        "tool": [in_tool],
        "text of a tool": [{**in_tool, "content": data_url(crop)}],
        "user": [said, by_user],
        "user alone": [by_user],
        "none": [said],
    }


@pytest.mark.parametrize("way", ["tool", "text of a tool", "user", "user alone", "none"])
@pytest.mark.parametrize("form", ["pixels", "0-1000"])
def test_the_crop_comes_back_and_the_model_goes_on(cards, way, form) -> None:
    whole = cards.vlm.ask(IMAGE.image, ASKED)
    zoom = [tool("" if form == "pixels" else " 0-1000")]
    asked = [user(IMAGE.image, ASKED)]
    first = cards.ask(asked, tools=zoom).choices[0].message
    (call,) = first.tool_calls
    crop = cut(IMAGE.image, call, form)
    assert data_url(crop) == data_url(IMAGE.image.crop(whole.looks[0].box))
    for message in (first.model_dump(exclude_none=True), {"role": "assistant", "tool_calls": [call.model_dump()]}):
        reply = cards.ask([*asked, message, *answers(call, crop)[way]], tools=zoom)
        assert reply.choices[0].message.content == whole.text and reply.choices[0].finish_reason == "stop"
        told = [(turn["role"], turn["text"]) for turn in reply.relook["transcript"]]
        assert told == [(turn.role, turn.text) for turn in whole.transcript]
        assert reply.usage.total_tokens == whole.usage.sequence_length
        assert reply.usage.prompt_tokens_details.cached_tokens > 0
        beside = "text beside tool calls and crops is not shown to the model"
        assert reply.relook["warnings"].count(beside) == (way in ("user", "user alone", "none"))


def test_the_crop_that_was_sent_is_what_the_model_sees(cards) -> None:
    """Not the one that the server would make."""
    asked, zoom = [user(IMAGE.image, ASKED)], [tool()]
    first = cards.ask(asked, tools=zoom).choices[0].message
    others = {qa.answer: IMAGE.image.crop((x1 - 24, y1 - 24, x2 + 24, y2 + 24)) for qa in IMAGE.qas
              for x1, y1, x2, y2 in qa.boxes}  # fmt: skip
    read = set()
    for crop in others.values():
        result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": [picture_part(crop)]}
        read.add(
            cards.ask([*asked, first.model_dump(exclude_none=True), result], tools=zoom).choices[0].message.content
        )
    assert len(read) > 1


def test_a_call_of_another_server_is_mapped_by_its_box(cards) -> None:
    box, zoom = [200, 130, 260, 250], [QWEN]
    call = {"id": "call_7", "type": "function", "function": {"name": "image_zoom_in_tool"}}
    for arguments in ({"bbox_2d": box}, {"bbox_2d": box, "label": "x", "img_idx": 0}):
        call["function"]["arguments"] = json.dumps(arguments)
        history = [user(IMAGE.image, ASKED), {"role": "assistant", "content": None, "tool_calls": [call]},
                   {"role": "tool", "tool_call_id": "call_7", "content": "done"}]  # fmt: skip
        reply = cards.ask(history, tools=zoom)
        answer = cards.vlm.ask(IMAGE.image, ASKED, region=(3, 2, 4, 3))
        assert reply.choices[0].message.content == answer.text
        assert [t["text"] for t in reply.relook["transcript"]] == [t.text for t in answer.transcript]


def test_nested_looks_stay_on_the_original_image(random) -> None:
    """The box of the second call is of the image that the user sent, not of the crop."""
    image, vlm = picture(2, (300, 200)), random.vlm
    turns = [write_call("region", (1, 1, 6, 5)), write_call("region", (2, 3, 4, 4)), "742"]
    with writing(vlm, turns[0], IM_END, turns[1], IM_END, turns[2]):
        whole = vlm.ask(image, QUESTION, max_looks=2)
    fields = {"tools": [tool()], "extra_body": {"relook": {"max_looks": 2}}}
    messages, boxes = [user(image, QUESTION)], []
    for turn in turns:
        with writing(vlm, turn):
            reply = random.ask(messages, **fields)
        message = reply.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls or []:
            boxes.append(tuple(json.loads(call.function.arguments)["bbox_2d"]))
            crop = picture_part(cut(image, call))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": [crop]})
    assert boxes == [look.box for look in whole.looks] and len(boxes) == 2
    assert message.content == whole.text == "742"
    assert [turn["text"] for turn in reply.relook["transcript"]] == [turn.text for turn in whole.transcript]
    assert reply.usage.total_tokens == whole.usage.sequence_length


@pytest.fixture(scope="module")
def nesting(tiny_vlm):
    """A random model whose regions nest, and which looks three times."""
    settings = {"first_look": relook.processing.View(64), "region_of": "last", "max_looks": 3, "free_choice": True}
    engine = LocalEngine(tiny_vlm(("region", "clip"), **settings))
    with serving(engine) as running:
        yield running
    engine.close()


NESTED = [write_call("region", (1, 1, 6, 5)), write_call("region", (0, 4, 2, 7)), write_call("region", (5, 5, 6, 7))]


def told(reply):
    return [turn["text"] for turn in reply.relook["transcript"]]


@pytest.mark.parametrize("form", ["pixels", "0-1000", "0-1"])
@pytest.mark.parametrize("way", ["tool", "none"])
def test_regions_that_nest_are_called_in_pixels_of_the_original(nesting, form, way) -> None:
    image, vlm = picture(2, (300, 200)), nesting.vlm
    script = [piece for call in NESTED for piece in (call, IM_END)] + ["742"]
    with writing(vlm, *script):
        whole = vlm.ask(image, QUESTION)
    assert len(whole.looks) == 3 and whole.looks[2].frame == whole.looks[1].box
    said = {"pixels": "", "0-1000": " relative, 0-1000", "0-1": " normalized to 0-1"}[form]
    fields = {"tools": [tool(said)], "extra_body": {"relook": {"boxes": form}}}
    messages = [user(image, QUESTION)]
    for number, turn in enumerate([*NESTED, "742"]):
        with writing(vlm, turn):
            reply = nesting.ask(messages, **fields)
        message = reply.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls or []:
            seen, wanted = (
                read_box(json.loads(call.function.arguments)["bbox_2d"], image.size, form),
                whole.looks[number],
            )
            assert seen == pytest.approx(wanted.box, abs=0.2 if form == "0-1000" else 1e-3)
            assert reply.relook["looks"][0]["frame"] == list(wanted.frame)
            messages += answers(call, cut(image, call, form))[way]
    assert message.content == whole.text == "742" and told(reply) == [turn.text for turn in whole.transcript]
    assert reply.usage.total_tokens == whole.usage.sequence_length


def test_a_nested_call_of_another_server_is_mapped_by_its_box(nesting) -> None:
    """The cells of the view before that cover it; a box outside that view is none of this model's."""
    image, vlm = picture(2, (300, 200)), nesting.vlm
    boxes = [(0, 0, 150, 100), (38, 50, 75, 75)]  # the upper left quarter: cells 0,0 to 3,3, widened to 187 x 125
    expected = [write_call("region", (0, 0, 3, 3)), write_call("region", (1, 3, 3, 4))]
    messages = [user(image, QUESTION)]
    for number, box in enumerate(boxes):
        function = {"name": "image_zoom_in_tool", "arguments": json.dumps({"bbox_2d": box})}
        messages += [
            {"role": "assistant", "tool_calls": [{"id": f"call_{number}", "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": f"call_{number}", "content": "done"},
        ]
    with writing(vlm, "742"):
        reply = nesting.ask(messages, tools=[tool()])
    assert reply.choices[0].message.content == "742" and [text for text in told(reply) if "region" in text] == expected
    function["arguments"] = json.dumps({"bbox_2d": [250, 150, 280, 180]})
    assert "lies outside (0, 0, 187, 125), which was seen last" in refused(
        lambda: nesting.ask(messages, tools=[tool()])
    )


def test_looks_that_nest_without_a_tool(nesting) -> None:
    """The server takes them; `/v1/looks` and chats agree with `ask`, and a conversation is rebuilt turn by turn."""
    image, vlm = picture(2, (300, 200)), nesting.vlm
    script = [NESTED[0], IM_END, LOOKS["clip"].start, NESTED[1], IM_END, "742"]
    chat = vlm.chat(image)
    with writing(vlm, *script):
        whole = chat.ask(QUESTION)
    with writing(vlm, *script):
        reply = nesting.ask((image, QUESTION))
    taken = reply.relook["looks"]
    assert [(look["cells"], look["frame"], look["box"]) for look in taken] == [
        tuple(value and list(value) for value in (look.cells, look.frame, look.box)) for look in whole.looks
    ]
    messages = [user(image, QUESTION), reply.choices[0].message.model_dump(exclude_none=True), user([], "And now?")]
    with writing(vlm, *script[:2], "7"):
        expected = chat.ask("And now?")
    with writing(vlm, *script[:2], "7"):
        again = nesting.ask(messages)
    assert told(again) == [turn.text for turn in expected.transcript]
    assert again.usage.total_tokens == expected.usage.sequence_length
    assert again.relook["looks"][0]["frame"] == [0, 0, 300, 200]
    body = {"image": data_url(image), "question": QUESTION, "box": [130, 90, 136, 96], "max_new_tokens": 1}
    shown = httpx.post(f"{nesting.url}/v1/looks", json=body).json()
    forced = vlm.ask(image, QUESTION, box=(130, 90, 136, 96), max_new_tokens=1)
    assert [look["box"] for look in shown["looks"]] == [list(look.box) for look in forced.looks]
    assert len(forced.looks) > 1
    described = nesting.client.models.list().data[0].relook["regions"]
    assert described == {"region_of": "last", "region_margin": 1, "max_looks": 3}


def test_a_servers_limit_of_looks_holds_for_the_models_own_number(nesting) -> None:
    """What it answers, it takes back in a conversation."""
    image, script = picture(2, (300, 200)), [piece for call in NESTED for piece in (call, IM_END)]
    with serving(nesting.engine, limits={"looks": 1}) as limited:
        with writing(nesting.vlm, *script[:2], "742"):
            message = limited.ask((image, QUESTION)).choices[0].message
        assert message.content == "742" and len(message.relook["looks"]) == 1
        with writing(nesting.vlm, *script[:2], "7"):
            again = limited.ask([user(image, QUESTION), message.model_dump(exclude_none=True), user([], "And now?")])
        assert len(again.relook["looks"]) == 1
        body = {"image": data_url(image), "question": QUESTION, "box": [130, 90, 136, 96], "max_new_tokens": 1}
        assert len(httpx.post(f"{limited.url}/v1/looks", json=body).json()["looks"]) == 1
        assert "2 looks, this server takes at most 1" in refused(
            lambda: limited.ask((image, QUESTION), extra_body={"relook": {"max_looks": 2}})
        )


def test_a_look_of_the_server_before_a_call(tiny_vlm) -> None:
    """A re-encoding is the server's to take; it stays in the conversation while the client crops."""
    vlm, image = tiny_vlm(("region", "clip")), picture(2, (300, 200))
    call = write_call("region", (2, 3, 4, 4))
    with writing(vlm, LOOKS["clip"].start, call, IM_END, "742"):
        whole = vlm.ask(image, QUESTION, max_looks=2)
    engine = LocalEngine(vlm)
    with serving(engine) as served:
        own = {"tools": [tool()], "extra_body": {"relook": {"max_looks": 2}}}
        with writing(vlm, LOOKS["clip"].start, call):
            reply = served.ask((image, QUESTION), **own)
        message = reply.choices[0].message
        assert [look["kind"] for look in reply.relook["looks"]] == ["clip", "region"]
        assert message.relook == {"looks": [{"kind": "clip", "cells": None, "turn": 0}], "look": "auto"}
        result = answers(message.tool_calls[0], cut(image, message.tool_calls[0]))["tool"]
        with writing(vlm, "742"):
            reply = served.ask([user(image, QUESTION), message.model_dump(exclude_none=True), *result], **own)
        assert [turn["text"] for turn in reply.relook["transcript"]] == [turn.text for turn in whole.transcript]
        assert reply.usage.total_tokens == whole.usage.sequence_length
    engine.close()


def test_several_calls_of_one_turn(random) -> None:
    image, vlm = picture(2, (300, 200)), random.vlm
    turn = write_call("region", (1, 1, 6, 5)) + write_call("region", (2, 3, 4, 4))
    with writing(vlm, turn, IM_END, "742"):
        whole = vlm.ask(image, QUESTION)
    with writing(vlm, turn):
        message = random.ask((image, QUESTION), tools=[tool()]).choices[0].message
    assert [call.id.startswith(f"call_look_{cells}_") for call, cells in zip(
        message.tool_calls, ("1_1_6_5", "2_3_4_4"), strict=True)] == [True, True]  # fmt: skip
    crops = [picture_part(cut(image, call)) for call in message.tool_calls]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "see below"} for call in message.tool_calls]
    by_user = [{"role": "user", "content": crops}]
    by_tools = [{**result, "content": [crop]} for result, crop in zip(results, crops, strict=True)]
    for way in (by_user, [*results[::-1], *by_user], by_tools[::-1]):
        with writing(vlm, "742"):
            reply = random.ask([user(image, QUESTION), message.model_dump(exclude_none=True), *way], tools=[tool()])
        assert [turn["text"] for turn in reply.relook["transcript"]] == [turn.text for turn in whole.transcript]
    assert "one tool call" not in refused(
        lambda: random.ask([user(image, QUESTION), message.model_dump(exclude_none=True), results[0]], tools=[tool()])
    )
    with writing(vlm, turn):
        reply = random.ask((image, QUESTION), tools=[tool()], parallel_tool_calls=False)
    assert len(reply.choices[0].message.tool_calls) == 1


def test_img_idx_counts_what_the_user_sent_and_no_crops(cards) -> None:
    images = [Pages(1).sample(i).image for i in range(3)]
    messages = [user(images[:2], ASKED)]
    own = {"tools": [QWEN], "tool_choice": "required"}
    (call,) = cards.ask(messages, extra_body={"relook": {"look_at": 1}}, **own).choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert arguments["img_idx"] == 1 and arguments["label"]
    messages += [{"role": "assistant", "tool_calls": [call.model_dump()]}, user(cut(images[1], call))]
    reply = cards.ask(messages, **own).choices[0].message  # img_idx says where to look
    assert reply.content == cards.vlm.ask(images[:2], ASKED, look="region", look_at=1).text
    messages += [{"role": "assistant", "content": reply.content}, user(images[2], ASKED)]
    (call,) = cards.ask(messages, **own).choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["img_idx"] == 2


def test_a_conversation_goes_on_after_tool_calls(cards) -> None:
    chat, questions, messages = cards.vlm.chat(IMAGE.image), [CODE.format(qa.field) for qa in IMAGE.qas[:2]], []
    for question in questions:
        answer = chat.ask(question, look="region")
        messages.append(user([] if messages else IMAGE.image, question))
        call = cards.ask(messages, tools=[tool()], tool_choice="required").choices[0].message.tool_calls[0]
        messages.append({"role": "assistant", "tool_calls": [call.model_dump()]})
        messages += answers(call, cut(IMAGE.image, call))["tool"]
        reply = cards.ask(messages, tools=[tool()], tool_choice="required")
        assert reply.choices[0].message.content == answer.text
        messages.append({"role": "assistant", "content": answer.text})
    assert [turn["role"] for turn in reply.relook["transcript"]] == [turn.role for turn in answer.transcript]


def test_streamed_calls_are_assembled_by_the_client(cards) -> None:
    with cards.client.chat.completions.stream(
        model=cards.model, messages=[user(IMAGE.image, ASKED)], tools=[tool()]
    ) as stream:
        final = stream.get_final_completion().choices[0]
    (call,) = final.message.tool_calls
    whole = cards.ask((IMAGE.image, ASKED), tools=[tool()]).choices[0]
    assert final.finish_reason == "tool_calls"
    assert call.function.arguments == whole.message.tool_calls[0].function.arguments
    assert call.id.startswith("call_look_") and call.id != whole.message.tool_calls[0].id


def test_tool_choice(random) -> None:
    ask = lambda **fields: random.ask((picture(), QUESTION), max_tokens=6, **fields).choices[0]  # noqa: E731
    named = {"type": "function", "function": {"name": "image_zoom_in_tool"}}
    own = {"relook": {"look": "region"}}
    for choice in ("required", named):
        assert ask(tools=[tool()], tool_choice=choice).finish_reason == "tool_calls"
    assert ask(tools=[tool()], tool_choice="none", extra_body=own).message.content == (
        random.vlm.ask(picture(), QUESTION, look="region", max_new_tokens=6).text
    )
    other = {"type": "function", "function": {"name": "search", "parameters": {}}}
    reply = random.ask((picture(), QUESTION), max_tokens=6, tools=[other])
    assert reply.relook["warnings"] == ["tools that this model never calls: search"]
    for fields in (
        {"tools": [other], "tool_choice": "required"},
        {"tools": [tool(), other], "tool_choice": {"type": "function", "function": {"name": "search"}}},
        {"tool_choice": "required"},
    ):
        assert "can call image_zoom_in_tool only" in refused(lambda fields=fields: ask(**fields))


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ([tool(required=("bbox_2d", "path"))], "requires 'path'"),
        ([{"type": "function", "function": {"name": ZOOM, "parameters": {"properties": {}}}}], "bbox_2d"),
        ([{"type": "retrieval"}], "tools[0]"),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_called(random, tools, said) -> None:
    assert said in refused(lambda: random.ask((picture(), QUESTION), tools=tools))


def called(arguments='{"bbox_2d": [1, 2, 30, 40]}', name=ZOOM):
    call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


CALLED = called()
DONE = {"role": "tool", "tool_call_id": "call_1", "content": "done"}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([called("{}"), DONE], "arguments {} are not understood"),
        ([called("[" * 9999), DONE], "not understood"),
        ([called('{"bbox_2d": [1, 2, "3"]}'), DONE], "not four numbers"),
        ([called('{"bbox_2d": [9, 9, 1, 1]}'), DONE], "runs backwards"),
        ([called('{"img_idx": 3}'), DONE], "img_idx=3 names no image"),
        ([called(name="search"), DONE], "'search'"),
        ([CALLED], "no result of tool call 'call_1' follows"),
        ([CALLED, {**DONE, "tool_call_id": "call_2"}], "'call_2' is not that of an open call"),
        ([DONE], "not that of an open call"),
        ([CALLED, DONE, DONE], "not that of an open call"),
        ([CALLED, DONE, {"role": "user", "content": "Go on ."}], "before the question is answered"),
        ([CALLED, user([picture(), picture()])], "2 images of the user for 1 tool calls"),
        ([CALLED, {**DONE, "content": user([picture(), picture()])["content"]}], "2 images for one tool call"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_histories_that_cannot_be_read(random, messages, said) -> None:
    assert said in refused(lambda: random.ask([user(picture(), QUESTION), *messages], tools=[tool()]))
