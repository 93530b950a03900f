"""Interventions on region looks, against crops cut by hand and conversations written by hand.

The oracle (`by_hand`) has nothing of `relook.interventions`, `relook.regions` or `relook.perceive`: cells are counted
here, pixels come from Pillow and NumPy. What the model computed is compared with one full forward over the training
item that holds the turns and images that an intervention is said to leave.
"""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.openai_server import PlainQwen, Said, openai_server
from support.scripted_model import QUESTION, picture, recorded, writing

import relook
from relook.errors import UserError
from relook.interventions import INTERVENTIONS, STEPS, Intervention, box_in_other, moved
from relook.looks import IM_END, LOOKS, write_call
from relook.model.export import export
from relook.options import AskOptions
from relook.processing import View
from zoo.worlds.cards import Cards

PAGE, OTHER = picture(3, (480, 320)), picture(8, (300, 500))
MEAN = (123, 117, 104)  # CLIP's, of 255
TURNS = {
    "one": [(1, 2, 5, 6)],
    "two": [(1, 2, 5, 6), (3, 0, 6, 3)],
    "three": [(2, 2, 5, 5), (4, 5, 6, 6), (0, 0, 0, 0)],
}
WIDE, LONG = {"region_of": "last", "max_looks": 3, "free_choice": True}, {"max_new_tokens": 40}


@pytest.fixture(scope="module")
def vlm(tiny_vlm):
    return tiny_vlm(("region", "clip"), **WIDE)


def change(name, step=(1, 0)):
    return Intervention(name, OTHER if name == "other" else None, step)


def by_hand(name, turns, page=PAGE, first=(64, 40), grid=8, margin=1):
    """(frame, box, what is shown at the box's size) of one call a turn. `first`: the size of the first look."""
    frame, found = (0, 0, *page.size), []
    for x0, y0, x1, y1 in turns:
        left, top, right, bottom = frame
        wide, high = right - left, bottom - top
        lower, upper = (
            (max(x0 - margin, 0), max(y0 - margin, 0)),
            (min(x1 + margin + 1, grid), min(y1 + margin + 1, grid)),
        )
        box = [left + lower[0] * wide // grid, top + lower[1] * high // grid]
        box += [left + upper[0] * wide // grid, top + upper[1] * high // grid]
        if name == "moved":  # to the right; where there is no room to the left, then down, then up
            dx, dy = round(wide / grid), round(high / grid)
            for x, y in ((dx, 0), (-dx, 0), (0, dy), (0, -dy)):
                there = [box[0] + x, box[1] + y, box[2] + x, box[3] + y]
                if there[0] >= left and there[1] >= top and there[2] <= right and there[3] <= bottom:
                    box = there
                    break
        size = box[2] - box[0], box[3] - box[1]
        shown = page.crop(box)
        if name == "blank":
            shown = Image.new("RGB", size, MEAN)
        elif name == "other":
            place = [int(box[i] / page.size[i % 2] * OTHER.size[i % 2] + 1e-9) for i in range(4)]
            shown = OTHER.crop(place).resize(size, Image.Resampling.BICUBIC)
        elif name == "blurred":
            small = page.resize(first, Image.Resampling.BICUBIC)
            shown = small.resize(page.size, Image.Resampling.BICUBIC).crop(box)
        found.append((frame, tuple(box), shown))
        frame = tuple(box)
    return found


def near(one, other, most=1):
    return np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= most


# -- pixels


@pytest.mark.parametrize("name", ["blank", "other", "blurred", "moved"])
@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
def test_what_is_shown(vlm, name, turns):
    """The image of every look, and the pixels that reach the vision encoder."""
    asked = {**LONG, "intervention": change(name)}
    script = [*(piece for cells in turns for piece in (write_call("region", cells), IM_END)), "7"]
    with writing(vlm, *script):
        (answer,), (conversation,), _ = recorded(vlm, [(PAGE, QUESTION, asked)])
    first = vlm.processor.view(PAGE, "first").size
    expected = by_hand(name, turns, first=first)
    assert [look.cells for look in answer.looks] == turns
    assert [(look.frame, look.box) for look in answer.looks] == [(frame, box) for frame, box, _ in expected]
    pixels = [view.tensors["pixel_values"] for view in conversation.features.entries.values()]
    for look, (_, _, shown) in zip(answer.looks, expected, strict=True):
        seen = vlm.processor.view(shown, "crop")
        assert look.image.size == seen.size and near(look.image, seen, 4 if name == "blurred" else 0)  # two roundings
        wanted = torch.as_tensor(vlm.processor.image_processor([look.image], return_tensors="pt")["pixel_values"])
        assert any(given.shape == wanted.shape and torch.equal(given, wanted) for given in pixels)
    with writing(vlm, *script):
        plain = vlm.ask(PAGE, QUESTION, **LONG)
    assert all(
        not near(a.image, b.image, 20)
        for a, b in zip(plain.looks, answer.looks, strict=True)
        if a.box != (0, 0, 480, 320)
    )
    if name != "moved":  # of which later crops may be a pixel larger or smaller
        assert [look.box for look in plain.looks] == [look.box for look in answer.looks]
        assert plain.usage.sequence_length == answer.usage.sequence_length
        assert [turn.text for turn in plain.transcript] == [turn.text for turn in answer.transcript]


def test_blurred_has_the_first_looks_pixels_and_no_others(tiny_vlm):
    """Two pages that differ only in what the first look drops: stripes of one pixel, of one mean."""
    vlm = tiny_vlm(("region",))
    rows = np.indices((512, 512))[1]
    pages = [Image.fromarray(np.where((rows + shift) % 2, 255, 0).astype(np.uint8)).convert("RGB") for shift in (0, 1)]
    there = {"region": (2, 2, 4, 4), "max_new_tokens": 1}
    seen = [vlm.ask(page, QUESTION, intervention=change("blurred"), **there) for page in pages]
    assert near(seen[0].looks[0].image, seen[1].looks[0].image, 8)
    wide = vlm.with_settings(second_look=View(None))
    sharp = wide.ask(pages[0], QUESTION, **there).looks[0]
    soft = wide.ask(pages[0], QUESTION, intervention=change("blurred"), **there).looks[0]
    assert np.asarray(sharp.image).std() > 100 and np.asarray(soft.image).std() < 10 and sharp.box == soft.box


def test_where_the_first_look_drops_nothing_blurred_is_the_crop(tiny_vlm):
    vlm = tiny_vlm(("region",), first_look=None)
    page = picture(1, (96, 64))
    plain, blurred = (
        vlm.ask(page, QUESTION, region=(1, 1, 4, 4), max_new_tokens=1, **more).looks[0].image
        for more in ({}, {"intervention": change("blurred")})
    )
    assert np.array_equal(np.asarray(plain), np.asarray(blurred))


def test_a_region_moves_by_a_cell_and_keeps_its_size():
    view, cell = (0, 0, 640, 400), (80, 50)
    assert moved((80, 100, 320, 250), view, cell, (0, -1)) == (80, 50, 320, 200)
    assert moved((80, 0, 320, 250), view, cell, (0, -1)) == (80, 50, 320, 300)  # no room above: down
    assert moved((0, 100, 640, 250), view, cell, (1, 0)) == (0, 150, 640, 300)  # no room beside it: down
    assert moved((0, 150, 640, 400), view, cell, (-1, 0)) == (0, 100, 640, 350)
    assert moved((0, 0, 640, 400), view, cell) == (0, 0, 640, 400)
    assert box_in_other((0, 0, 5, 5), (500, 500), (20, 30)) == (0, 0, 1, 1)
    assert box_in_other((495, 495, 500, 500), (500, 500), (20, 30)) == (19, 29, 20, 30)
    for step in STEPS:
        x1, y1, x2, y2 = Intervention("moved", step=step).region((200, 200, 300, 260), (100, 100, 500, 500), 8)
        assert (x1 - 200, y1 - 200) == (50 * step[0], 50 * step[1]) and (x2 - x1, y2 - y1) == (100, 60)


# -- history


def encoded(processor, name, turns, shown, answer):
    """The ids and images of what is left in the history, put together as text."""
    images, text = [(PAGE, "first")], "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    pieces = [f"{text}<|im_start|>user\n<image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"]
    for cells, (_, _, crop) in zip(turns, shown, strict=True):
        pieces.append(("" if name == "image-only" else write_call("region", cells)) + "<|im_end|>")
        there = "" if name == "text-only" else "<image>"
        pieces.append(f"\n<|im_start|>user\n{there}<|im_end|>\n<|im_start|>assistant\n")
        images += [(crop, "crop")] if there else []
    views = [processor.view(image, stage) for image, stage in images]
    tensors = {key: torch.as_tensor(np.asarray(value)) for key, value in
               dict(processor.image_processor(views, return_tensors="pt")).items()}  # fmt: skip
    ids, grids = [], iter(tensors["image_grid_thw"].prod(1).tolist())
    for piece in [*pieces, f"{answer}<|im_end|>"]:
        pads = (
            "<|vision_start|>" + "<|image_pad|>" * (next(grids) // 4) + "<|vision_end|>" if "<image>" in piece else ""
        )
        ids += processor.tokenizer.encode(piece.replace("<image>", pads), add_special_tokens=False)
    return ids, tensors


@pytest.mark.parametrize("name", list(INTERVENTIONS))
@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("forced", [False, True])
def test_the_history_is_the_one_written_by_hand(vlm, name, turns, forced):
    """Token for token, and the logits of the answer are those of one full forward over it."""
    asked = {**LONG, "intervention": change(name)}
    calls = [(write_call("region", cells), IM_END) for cells in turns]
    if forced:  # the first call is written for the model, before anything has run
        asked |= {"region": turns[0], "max_looks": len(turns)}
        calls = calls[1:]
    with writing(vlm, *(piece for call in calls for piece in call), "7"):
        (answer,), (conversation,), (logits,) = recorded(vlm, [(PAGE, QUESTION, asked)])
    assert answer.text == "7" and [look.cells for look in answer.looks] == turns
    shown = by_hand(name, turns, first=vlm.processor.view(PAGE, "first").size)
    if name == "blurred":  # up to a grey level
        shown = [(*each[:2], change(name).crop(PAGE, each[1], vlm.processor)) for each in shown]
    ids, tensors = encoded(vlm.processor, name, turns, shown, "7")
    assert conversation.ids == ids and len(conversation.sampled) == len(ids)
    with torch.no_grad():
        full = vlm.model(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), **tensors
        ).logits[0]
    after = max(i for i, token in enumerate(ids) if token == vlm.vocabulary["<|im_start|>"])
    assert [i for i in logits if i > after], "the answer's own places"
    assert max(float((full[i] - logits[i]).abs().max()) for i in logits if i > after) < 1e-4
    assert [look.image is None for look in answer.looks] == [name == "text-only"] * len(turns)
    assert answer.picture().size > (0, 0)


def test_a_forgotten_call_is_paid_for(vlm):
    """What ran and was left out is in lm_positions, and in no later question."""
    with writing(vlm, write_call("region", (1, 2, 5, 6)), IM_END, "7"):
        answer = vlm.ask(PAGE, QUESTION, intervention=change("image-only"), max_looks=1)
    assert answer.usage.lm_positions > answer.usage.sequence_length
    assert [turn.text for turn in answer.transcript[2:4]] == ["", "<image>"]
    assert [turn.sampled for turn in answer.transcript if turn.role == "assistant"] == [False, True]


def test_rows_of_a_batch_do_not_meet(vlm):
    """All interventions side by side give what each gives alone."""
    requests = [(picture(i, (200 + 30 * i, 150)), QUESTION, {"region": (1, 1, 4, 5), "intervention": change(name)})
                for i, name in enumerate(INTERVENTIONS)]  # fmt: skip
    requests.append((PAGE, QUESTION, {"region": (1, 1, 4, 5)}))
    together = vlm.ask_many(requests, max_new_tokens=6, batch_size=8)
    for request, answer in zip(requests, together, strict=True):
        alone = vlm.ask(request[0], request[1], max_new_tokens=6, **request[2])
        assert (alone.text, alone.looks, alone.transcript) == (answer.text, answer.looks, answer.transcript)
        assert alone.usage.lm_positions == answer.usage.lm_positions


@pytest.mark.parametrize("name", list(INTERVENTIONS))
def test_re_encodings_and_direct_answers_are_left_alone(vlm, name):
    for script in ([LOOKS["clip"].start, "7"], ["7"]):
        with writing(vlm, *script):
            plain = vlm.ask(PAGE, QUESTION)
        with writing(vlm, *script):
            changed = vlm.ask(PAGE, QUESTION, intervention=change(name))
        assert (plain.looks, plain.transcript, plain.text) == (changed.looks, changed.transcript, changed.text)


def test_earlier_questions_stay_as_they_were(vlm):
    """In a conversation, an intervention is on its own question; the next one goes on from what was shown."""
    chat = vlm.chat(PAGE)
    for name in (None, "image-only", "text-only"):
        more = {} if name is None else {"intervention": change(name)}
        answer = chat.ask(QUESTION, region=(1, 1, 4, 4), max_looks=1, max_new_tokens=3, **more)
    call = write_call("region", (1, 1, 4, 4))
    turns = [turn.text for turn in answer.transcript if turn.role == "assistant"]
    assert [turn == call for turn in turns] == [True, False, False, False, True, False] and turns[2] == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"intervention": "blurred"}, "instance of Intervention"),
        ({"intervention": Intervention("moved"), "blank": True}, "blank=True and intervention 'moved'"),
        ({"intervention": Intervention("moved"), "look": "clip"}, "intervention 'moved' with look='clip'"),
        ({"intervention": Intervention("moved"), "look": "none"}, "leaves nothing out"),
    ],
)
def test_what_is_refused(vlm, options, said):
    with pytest.raises(UserError, match=said):
        vlm.with_settings(max_looks=1).ask(PAGE, QUESTION, **options)


def test_interventions_that_are_none():
    for arguments, said in ((("blur",), "'blur' is unknown"), (("other",), "with image=None"),
                            (("blank", OTHER), "'blank' with image="), (("moved", None, (2, 0)), "step=")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            Intervention(*arguments)
    assert AskOptions.of({"blank": True}).change.name == "blank" and AskOptions.of({}).change is None
    assert AskOptions.of({"intervention": change("other")}).model_dump(mode="json")["intervention"] == "other"


# -- endpoints


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    plain = PlainQwen(export("cards-tiny", tmp_path_factory.mktemp("export") / "plain"))
    with openai_server(plain, [{"id": "cards-tiny"}]) as server:
        yield relook.load(server.url)


@pytest.mark.parametrize("name", list(INTERVENTIONS))
def test_an_endpoint_gives_what_the_model_itself_gives(remote, name):
    local = relook.load("cards-tiny")
    for number in range(2):
        page = Cards(7).sample(number)
        for qa in page.qas[:2]:
            theirs, ours = (each.ask(page.image, qa.question, intervention=change(name)) for each in (local, remote))
            assert theirs.looks[0].kind == "region"
            assert (ours.text, ours.looks) == (theirs.text, theirs.looks)
            assert [turn.text for turn in ours.transcript] == [turn.text for turn in theirs.transcript]
            assert ours.usage.sequence_length == theirs.usage.sequence_length
            seen = [(a.looks[0].image, b.looks[0].image) for a, b in ((ours, theirs),)]
            assert all(a is b is None or np.array_equal(np.asarray(a), np.asarray(b)) for a, b in seen)


def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 1600, 3), dtype=np.uint8))


def asked(model, name, turns):
    """The requests of a conversation with a scripted server under an intervention."""
    left = list(turns)
    with openai_server(lambda body: left.pop(0), [{"id": model}]) as server:
        answer = relook.load(server.url).ask(photo(), "What is it?", intervention=change(name))
    return server.bodies, answer


def image_of(message):
    (url,) = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def zoom(text="I look."):
    return Said([text], calls=[("c1", "image_zoom_in_tool", '{"bbox_2d": [100, 200, 500, 800]}')])


def test_tool_calls_and_what_is_shown_instead():
    """Qwen3-VL: the box 100,200,500,800 of a thousand is 160,140,800,560 of 1600 x 700 pixels."""
    box, sent = (160, 140, 800, 560), (1024, 448)
    for name, there in (("moved", (360, 140, 1000, 560)), ("blank", box), ("blurred", box)):
        (_, second), answer = asked("Qwen3-VL", name, [zoom(), Said(["a cat"])])
        assert answer.looks[0].box == there and answer.text == "a cat"
        seen, crop = image_of(second["messages"][-1]), photo().crop(there)
        if name == "blank":
            crop = Image.new("RGB", crop.size, (127, 127, 127))
        if name == "blurred":
            crop = (
                photo().resize(sent, Image.Resampling.BICUBIC).resize((1600, 700), Image.Resampling.BICUBIC).crop(box)
            )
        assert near(seen, crop.resize(seen.size, Image.Resampling.BICUBIC), 4 if name == "blurred" else 0)
        assert [message["role"] for message in second["messages"]] == ["user", "assistant", "tool", "user"]


def test_tool_calls_without_their_words_or_their_image():
    (_, second), answer = asked("Qwen3-VL", "image-only", [zoom(), Said(["a cat"])])
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][1] == {"role": "assistant", "content": ""} and image_of(second["messages"][2])
    assert answer.text == "a cat" and answer.looks[0].box == (160, 140, 800, 560)
    (_, second), answer = asked("Qwen3-VL", "text-only", [zoom(), Said(["a cat"])])
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "tool"]
    assert second["messages"][1]["content"] == "I look." and second["messages"][1]["tool_calls"]
    assert second["messages"][2]["content"] == "" and answer.looks[0].image is None
    call = '<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [0, 0, 80, 80]}}\n</tool_call>'
    (_, second), _ = asked("Qwen2.5-VL", "text-only", [Said([call]), Said(["a cat"])])
    assert second["messages"][-1]["content"] == [{"type": "text", "text": "<tool_response>\n</tool_response>"}]
    (_, second), _ = asked("Qwen2.5-VL", "image-only", [Said([call]), Said(["a cat"])])
    assert second["messages"][-2] == {"role": "assistant", "content": ""} and call not in json.dumps(second)


def test_relooks_own_server_has_views_of_its_own():
    own = {"id": "m", "relook": {"looks": ["region"], "grid": 8, "regions": {}, "context_window": 500}}
    with openai_server(lambda body: Said(["7"]), [own]) as server:
        remote = relook.load(server.url)
        for name in ("blurred", "image-only", "text-only"):
            with pytest.raises(UserError, match=f"'{name}' is for a model in this process"):
                remote.ask(PAGE, QUESTION, intervention=change(name))
        assert remote.ask(PAGE, QUESTION, intervention=change("moved")).text == "7"
        remote.processor.region_of = "last"
        assert remote.interventions == ("blank", "other")
