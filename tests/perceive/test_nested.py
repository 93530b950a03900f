"""Regions inside regions (`region_of="last"`), against a conversation written by hand.

The oracle (`by_hand`) has nothing of `relook.regions` or `relook.perceive`: cells are counted with fractions, crops are
cut by Pillow out of the crop before them, and the conversation is a text for the tokenizer. What every door gives is
compared with it, and what the model computed with one full forward over the training item of the same turns.
"""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from support.scripted_model import QUESTION, picture, recorded, writing

import relook
from relook.cli.ask import describe
from relook.errors import UserError
from relook.looks import IM_END, LOOKS, write_call
from relook.options import AskOptions
from relook.perceive.engine import GivenLook, Past, Request
from relook.perceive.local import LocalEngine
from relook.perceive.loop import Limits, Scheduler
from relook.perceive.memory import Memory
from relook.trace import Finished, LookTaken
from zoo.worlds.cards import Cards

PAGE = picture(3, (480, 320))
CASES = {
    "one": [[(1, 2, 5, 6)]],
    "two": [[(1, 2, 5, 6)], [(3, 0, 6, 3)]],
    "three": [[(0, 0, 7, 7)], [(2, 2, 5, 5)], [(1, 4, 2, 7)]],
    "two in one turn": [[(1, 2, 5, 6), (0, 0, 3, 3)], [(7, 7, 7, 7)]],
    "two inside one": [[(4, 4, 7, 7)], [(0, 0, 1, 1), (5, 5, 6, 6)], [(2, 2, 4, 4)]],
    "corners": [[(7, 7, 7, 7)], [(0, 0, 0, 0)], [(7, 0, 7, 0)]],
}


@pytest.fixture(scope="module")
def vlm(base, tiny_vlm):
    return tiny_vlm(("region", "clip"), region_of="last", max_looks=3, free_choice=True)


def edge(start, stop, cells, grid=8):
    """Pixel where the first of `cells` more cells begins, rounded down."""
    return start + int(Fraction(stop - start) * cells / grid)


def by_hand(image, turns, margin=1, grid=8):
    """For every call of every turn: (frame, box, the crop cut out of the view before)."""
    view, frame, found = image, (0, 0, *image.size), []
    for turn in turns:
        crops = []
        for x0, y0, x1, y1 in turn:
            wide = (max(x0 - margin, 0), max(y0 - margin, 0), min(x1 + margin, grid - 1), min(y1 + margin, grid - 1))
            inside = (
                *(edge(0, side, cell) for side, cell in zip(view.size, wide[:2], strict=True)),
                *(edge(0, side, cell + 1) for side, cell in zip(view.size, wide[2:], strict=True)),
            )
            box = tuple(value + frame[i % 2] for i, value in enumerate(inside))
            crops.append((frame, box, view.crop(inside)))
        found.append(crops)
        _, frame, view = crops[-1]
    return found


def texts(turns, answer="7"):
    """What the model writes: its calls, turn by turn, and an answer."""
    return [*(piece for turn in turns for piece in ("".join(write_call("region", c) for c in turn), IM_END)), answer]


def item_of(question, turns, crops, answer):
    """The training item of the same turns, its crops as images."""
    messages = [{"role": "user", "content": f"<image>\n{question}"}]
    for turn in turns:
        shown = ["<image>"] if len(turn) == 1 else [f"Region {i}: <image>\n" for i in range(len(turn))]
        messages.append({"role": "assistant", "content": "".join(write_call("region", cells) for cells in turn)})
        messages.append({"role": "user", "content": "".join(shown)})
    images = [crop for turn in crops for _, _, crop in turn]
    return {"messages": [*messages, {"role": "assistant", "content": answer}], "images": images}


def rendered(processor, item):
    """The ids of an item: its text, put together by hand, through the tokenizer in the published pieces."""
    pads = []
    for number, image in enumerate(item["images"]):
        seen = processor.view(image, "crop" if number else "first")
        t, h, w = processor.image_processor([seen], return_tensors="pt")["image_grid_thw"][0].tolist()
        pads.append("<|vision_start|>" + "<|image_pad|>" * (t * h * w // 4) + "<|vision_end|>")
    ids, left = [], iter(pads)
    opening = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    for message in item["messages"]:
        content = "".join(part + (next(left) if more else "") for part, more in split(message["content"]))
        if message["role"] == "assistant":
            piece, opening = content + "<|im_end|>", "\n"
        else:
            piece = f"{opening}<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
        ids += processor.tokenizer.encode(piece, add_special_tokens=False)
    return ids


def split(content):
    parts = content.split("<image>")
    return [(part, i < len(parts) - 1) for i, part in enumerate(parts)]


def check(answer, turns, crops, processor):
    """The looks of an answer are the crops cut by hand."""
    flat, calls = [each for turn in crops for each in turn], [cells for turn in turns for cells in turn]
    assert [look.cells for look in answer.looks] == calls and len(flat) == len(calls)
    for look, (frame, box, crop) in zip(answer.looks, flat, strict=True):
        assert (look.frame, look.box, look.problem) == (frame, box, None)
        seen = np.asarray(processor.view(crop, "crop"))
        assert np.array_equal(np.asarray(look.image), seen)
    for (frame, _, _), (_, before, _) in pairwise([turn[-1] for turn in crops][::-1]):
        assert frame == before


@pytest.mark.parametrize("case", CASES)
def test_the_loop_is_the_conversation_by_hand(vlm, case):
    turns = CASES[case]
    crops = by_hand(PAGE, turns)
    with writing(vlm, *texts(turns)):
        request = (PAGE, QUESTION, {"max_new_tokens": 40, "max_looks": len(turns)})
        (answer,), (conversation,), (logits,) = recorded(vlm, [request])
    assert answer.text == "7"
    check(answer, turns, crops, vlm.processor)
    item = item_of(QUESTION, turns, [[(None, None, PAGE)], *crops], "7")
    assert conversation.ids == rendered(vlm.processor, item)
    encoded = vlm.processor.encode_item(item)
    assert encoded["input_ids"] == conversation.ids
    learnt = [label != -100 for label in encoded["labels"]]
    assert learnt == conversation.sampled
    tensors = {k: v for k, v in encoded.items() if isinstance(v, torch.Tensor)}
    ids = torch.tensor([conversation.ids])
    with torch.no_grad():
        full = vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids), **tensors).logits[0]
    assert max(float((full[i] - values).abs().max()) for i, values in logits.items()) < 1e-4


def doors(vlm, image, question, **options):
    """(door, answer): the same question through every door of a model in this process."""
    yield "ask", lambda: vlm.ask(image, question, **options)
    yield "stream", lambda: [*vlm.stream(image, question, **options)][-1].answer
    yield "chat", lambda: vlm.chat(image).ask(question, **options)
    request = Request(question, (image,), AskOptions.of(options))
    for kept in (0, 2**22):
        engine = LocalEngine(vlm, cache_bytes=kept, prefill_tokens=19, turn=3)
        for _ in range(2):  # the second from what is remembered
            yield f"engine, {kept} bytes", lambda engine=engine: [*engine.submit(request)][-1].answer
        engine.close()
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
    inputs = vlm.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )

    def generated():
        own = {k: v for k, v in options.items() if k != "max_new_tokens"}
        looking = relook.LookAgain(vlm.processor, [image], **own)
        vlm.model.generate(**inputs, max_new_tokens=40, do_sample=False, custom_generate=looking)
        return looking.answers[0]

    yield "generate", generated


@pytest.mark.parametrize("case", ["two", "two inside one", "three"])
def test_every_door_gives_the_same_answer(vlm, case):
    turns = CASES[case]
    crops = by_hand(PAGE, turns)
    options = {"max_new_tokens": 40, "max_looks": len(turns)}
    lengths = set()
    for door, asked in doors(vlm, PAGE, QUESTION, **options):
        with writing(vlm, *texts(turns)):
            answer = asked()
        assert answer.text == "7", door
        check(answer, turns, crops, vlm.processor)
        lengths.add(answer.usage.sequence_length)
    assert len(lengths) == 1


def test_as_many_looks_as_the_model_was_taught(vlm):
    """And one where nothing is said of it, or as many as the question allows."""
    turns = [[(0, 0, 7, 7)]] * 4
    for model, options, number in (
        (vlm, {}, 3),
        (vlm.with_settings(max_looks=2), {}, 2),
        (vlm.with_settings(max_looks=1), {}, 1),
        (vlm, {"max_looks": 1}, 1),
        (vlm, {"max_looks": 0}, 0),
        (vlm.with_settings(max_looks=1), {"max_looks": 2}, 2),
    ):
        with writing(model, *texts(turns)):
            answer = model.ask(PAGE, QUESTION, max_new_tokens=20, **options)
        assert len([look for look in answer.looks if look.problem is None]) == number


def test_regions_of_the_whole_image_stay_what_they_were(vlm, tiny_vlm):
    for whole in (vlm.with_settings(region_of="whole"), tiny_vlm(("region", "clip"), free_choice=True)):
        with writing(whole, *texts(CASES["two"])):
            answer = whole.ask(PAGE, QUESTION, max_new_tokens=40, max_looks=2)
        boxes = [by_hand(PAGE, [turn])[0][0][1] for turn in CASES["two"]]
        assert [look.box for look in answer.looks] == boxes
        assert {look.frame for look in answer.looks} == {(0, 0, 480, 320)}


def test_a_new_question_begins_at_the_whole_image(vlm):
    chat, turns = vlm.chat(PAGE), CASES["two"]
    for _ in range(2):
        with writing(vlm, *texts(turns)):
            answer = chat.ask(QUESTION, max_new_tokens=40, max_looks=2)
        check(answer, turns, by_hand(PAGE, turns), vlm.processor)


def test_a_re_encoding_in_between_sees_the_whole_image_and_changes_nothing(vlm):
    turns = CASES["two"]
    script = [*texts(turns)[:2], LOOKS["clip"].start, *texts(turns)[2:]]
    with writing(vlm, *script):
        answer = vlm.ask(PAGE, QUESTION, max_new_tokens=40, max_looks=3)
    assert [look.kind for look in answer.looks] == ["region", "clip", "region"]
    (_, first, _), (frame, second, crop) = (turn[0] for turn in by_hand(PAGE, turns))
    assert [look.box for look in answer.looks] == [first, (0, 0, 480, 320), second]
    assert [look.frame for look in answer.looks] == [(0, 0, 480, 320), None, frame]
    assert np.array_equal(np.asarray(answer.looks[2].image), np.asarray(vlm.processor.view(crop, "crop")))


def test_blank_crops_and_calls_with_a_problem_change_nothing_but_what_is_shown(vlm):
    turns = CASES["two"]
    with writing(vlm, *texts(turns)):
        blank = vlm.ask(PAGE, QUESTION, max_new_tokens=40, max_looks=2, blank=True)
    assert [look.box for look in blank.looks] == [turn[0][1] for turn in by_hand(PAGE, turns)]
    assert all(look.image.getextrema() == blank.looks[0].image.getextrema() for look in blank.looks)
    broken = LOOKS["region"].start + "<|x_1|>" + LOOKS["region"].end
    script = [*texts(turns)[:2], broken + texts(turns)[2], IM_END, "7"]
    with writing(vlm, *script):
        answer = vlm.ask(PAGE, QUESTION, max_new_tokens=40, max_looks=2, constrain=False)
    assert [look.problem is None for look in answer.looks] == [True, False, True]
    assert answer.looks[2].box == blank.looks[1].box and answer.looks[1].frame is None


BOXES = [(300, 200, 310, 206), (0, 0, 3, 3), (470, 310, 480, 320), (100, 50, 420, 300), (33.5, 70.2, 60, 81)]


@pytest.mark.parametrize("box", BOXES)
def test_a_box_is_reached_step_by_step(vlm, box):
    """Forced calls: each view holds the box, the next is at most half of it, and the model may go on where it may."""
    for most in (1, 2, 3):
        answers = []
        for _, asked in doors(vlm, PAGE, QUESTION, box=box, max_looks=most, max_new_tokens=1):
            answers.append(asked())
        looks = answers[0].looks
        assert all(answer.looks == looks and answer.text == answers[0].text for answer in answers[:-1])
        assert [look.cells for look in answers[-1].looks][: len(looks)] == [look.cells for look in looks]
        crops = by_hand(PAGE, [[look.cells] for look in looks])
        assert [look.box for look in looks] == [turn[0][1] for turn in crops]
        areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (look.box for look in looks)]
        assert 1 <= len(looks) <= most and all(2 * small <= large for large, small in pairwise(areas))
        x1, y1, x2, y2 = box
        assert all(b[0] <= x1 and b[1] <= y1 and b[2] >= x2 and b[3] >= y2 for b in (look.box for look in looks))
    assert vlm.ask(PAGE, QUESTION, box=box, max_new_tokens=1, max_looks=1).looks == vlm.with_settings(
        region_of="whole"
    ).ask(PAGE, QUESTION, box=box, max_new_tokens=1, max_looks=1).looks  # fmt: skip


def test_a_step_without_room_is_in_the_record_and_the_rest_is_answered(vlm):
    """At every size of the context that has room for the first call."""
    box = (300, 200, 310, 206)
    whole, short = vlm.ask(PAGE, QUESTION, box=box, max_new_tokens=5), vlm.with_settings()
    seen = set()
    for context in range(70, whole.usage.sequence_length + 3):
        short.context_limit = context
        answer, other = short.ask_many([(PAGE, QUESTION, {"box": box}), (PAGE, QUESTION)], max_new_tokens=1)
        assert other.looks == [] and answer.usage.sequence_length <= context
        *taken, last = answer.looks
        problems = [look.problem for look in taken]
        assert [(look.cells, look.box, look.frame) for look in answer.looks] == [
            (look.cells, look.box, look.frame) for look in whole.looks[: len(answer.looks)]
        ]
        assert problems == [None] * len(taken) and (last.problem is None or "no room" in last.problem)
        seen.add((len(taken), last.problem is None, "its call" in str(last.problem)))
    assert seen >= {(1, False, True), (1, False, False), (2, False, True), (2, True, False)}


def test_a_region_is_of_the_whole_image_and_the_model_goes_on(vlm):
    turns = CASES["two"]
    with writing(vlm, *texts(turns)[2:]):
        answer = vlm.ask(PAGE, QUESTION, region=turns[0][0], max_new_tokens=40)
    check(answer, turns, by_hand(PAGE, turns), vlm.processor)
    assert [turn.sampled for turn in answer.transcript if turn.role == "assistant"] == [False, True, True]


def test_a_history_is_continued_as_a_chat_is(vlm):
    """Looks of earlier questions by their cells or their boxes, re-encodings before them, other images in between."""
    other = picture(5, (300, 420))
    chat, past = vlm.chat(PAGE), []
    script = [*texts(CASES["two"])[:2], LOOKS["clip"].start, *texts(CASES["two"])[2:]]
    with writing(vlm, *script):
        first = chat.ask(QUESTION, max_new_tokens=40, max_looks=3)
    with writing(vlm, *texts(CASES["two inside one"])):
        second = chat.ask("And?", image=other, max_new_tokens=40, max_looks=3)
    with writing(vlm, *texts(CASES["two"])):
        third = chat.ask("Then?", max_new_tokens=40, max_looks=2)
    for boxes in (False, True):
        past = [
            Past(QUESTION, (PAGE,), "7", given(first, [1, 1, 1], boxes)),
            Past("And?", (other,), "7", given(second, [1, 2, 1], boxes)),
        ]
        for kept in (0, 2**22):
            engine = LocalEngine(vlm, cache_bytes=kept)
            request = Request("Then?", (), AskOptions.of({"max_new_tokens": 40, "max_looks": 2}), tuple(past))
            with writing(vlm, *texts(CASES["two"])):
                answer = [*engine.submit(request)][-1].answer
            engine.close()
            assert answer.looks == third.looks and answer.usage.sequence_length == third.usage.sequence_length
            assert [turn.text for turn in answer.transcript] == [turn.text for turn in third.transcript]


def given(answer, turns, boxes=False):
    """An answer's looks as a client says them; as boxes, those of the named cells, before they were widened."""
    looks, rest = [], iter(answer.looks)
    for number in turns:
        turn = []
        for _ in range(number):
            look = next(rest)
            if look.kind != "region" or not boxes:
                turn.append(GivenLook(look.cells, look.kind))
                continue
            (_, box, _), *_ = by_hand(Image.new("RGB", frame_size(look.frame)), [[look.cells]], margin=0)[0]
            turn.append(GivenLook(box=tuple(v + look.frame[i % 2] for i, v in enumerate(box))))
        looks.append(tuple(turn))
    return tuple(looks)


def frame_size(frame):
    return frame[2] - frame[0], frame[3] - frame[1]


def test_a_box_outside_the_view_is_refused(vlm):
    looks = ((GivenLook((0, 0, 1, 1)),), (GivenLook(box=(400, 300, 420, 310)),))
    engine = LocalEngine(vlm)
    request = Request(QUESTION, (PAGE,), AskOptions.of({"max_new_tokens": 2}), looks=looks)
    with pytest.raises(UserError, match=r"lies outside \(0, 0, 180, 120\), which was seen last"):
        list(engine.submit(request))
    engine.close()


def test_whoever_asks_takes_nested_looks(vlm):
    """Turn by turn, as a client with a tool does; forced chains go on, too."""
    engine = LocalEngine(vlm)
    for options in ({"max_looks": 3}, {"max_looks": 3, "box": (300, 200, 310, 206)}):
        script = texts(CASES["three"]) if "box" not in options else ["7"]
        with writing(vlm, *script):
            whole = vlm.ask(PAGE, QUESTION, max_new_tokens=40, **options)
        looks, answer = [], None
        for number in range(len(whole.looks) + 1):
            chosen = AskOptions.of({"max_new_tokens": 40, **options})
            request = Request(QUESTION, (PAGE,), chosen, hold_regions=True, looks=tuple(looks))
            with writing(vlm, *script[2 * number :]) if len(script) > 1 else writing(vlm, *script):
                answer = [*engine.submit(request)][-1].answer
            if answer.finish != "look":
                break
            (look,) = answer.looks
            wanted = whole.looks[number]
            assert (look.cells, look.box, look.frame, look.image) == (wanted.cells, wanted.box, wanted.frame, None)
            looks.append((GivenLook(look.cells, image=PAGE.crop(look.box)),))
        assert answer.text == whole.text and len(looks) == len(whole.looks) > 1
        assert answer.usage.sequence_length == whole.usage.sequence_length
    engine.close()


def test_generate_goes_on_from_a_prompt_with_looks(vlm):
    turns, processor = CASES["two inside one"], vlm.processor
    crops = by_hand(PAGE, turns)
    earlier = by_hand(PAGE, CASES["one"])  # of a question before
    item = item_of("Before?", CASES["one"], [[(None, None, PAGE)], *earlier], "3")
    rest = item_of(QUESTION, turns[:2], crops[:2], "")
    rest["messages"][0] = {"role": "user", "content": QUESTION}
    images = [*item["images"], *rest["images"]]
    messages = [*item["messages"], *rest["messages"][:-1]]
    shown = iter(images)
    chat = [{"role": m["role"], "content": [part for text, more in split(m["content"]) for part in (
        *([{"type": "text", "text": text}] if text else []),
        *([{"type": "image", "image": next(shown)}] if more else []))]} for m in messages]  # fmt: skip
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["input_ids"][0].tolist() == rendered(processor, {"messages": messages, "images": images})
    looking = relook.LookAgain(processor, images, max_looks=1)
    script = texts(turns)[4:]
    with writing(vlm, *script):
        vlm.model.generate(**inputs, max_new_tokens=40, do_sample=False, custom_generate=looking)
    (answer,) = looking.answers
    assert answer.text == "7" and [look.cells for look in answer.looks] == turns[2]
    assert (answer.looks[0].frame, answer.looks[0].box) == crops[2][0][:2]


def test_rows_beside_each_other_at_random_steps(vlm):
    """Calls drawn at random, rows that come and go, prompts read in pieces: every row as if alone."""
    dice = random.Random(11)
    scripts = []
    for _ in range(10):
        turns = []
        for _ in range(dice.randint(1, 3)):
            x, y = sorted(dice.sample(range(8), 2)), sorted(dice.sample(range(8), 2))
            turns.append([(x[0], y[0], x[1], y[1])])
        scripts.append(turns)
    image = [picture(i, (dice.randint(40, 400), dice.randint(40, 400))) for i in range(10)]
    requests = [
        Request(
            QUESTION, (image[i],), AskOptions.of({"max_new_tokens": 2, "max_looks": len(turns)}), looks=looks_of(turns)
        )
        for i, turns in enumerate(scripts)
    ]
    alone = [[*LocalEngine(vlm).submit(request)][-1].answer for request in requests]
    for limits, kept in ((Limits(), 0), (Limits(rows=3, piece=13, turn=2), 2**20)):
        scheduler, arrivals, rows, step = Scheduler(vlm, limits, Memory(kept)), [*range(10)], {}, 0
        answers = {}
        while arrivals or scheduler.rows:
            if arrivals and dice.random() < 0.3:
                number = arrivals.pop(dice.randrange(len(arrivals)))
                row = vlm._row_of(requests[number], vlm._begin(scheduler.memory))
                rows[id(row)] = number
                scheduler.add(row)
            for row, event in scheduler.step():
                assert not isinstance(event, Exception), event
                if isinstance(event, Finished):
                    answers[rows[id(row)]] = event.answer
            step += 1
        for number, expected in enumerate(alone):
            assert answers[number].text == expected.text
            assert answers[number].usage.sequence_length == expected.usage.sequence_length
            crops = by_hand(image[number], [*scripts[number]])
            item = item_of(QUESTION, scripts[number], [[(None, None, image[number])], *crops], "")
            written = expected.usage.sequence_length - expected.usage.generated_tokens
            assert len(rendered(vlm.processor, item)) - 1 == written


def looks_of(turns):
    return tuple(tuple(GivenLook(cells) for cells in turn) for turn in turns)


def test_a_trained_model_with_forced_chains():
    """cards-tiny was taught nothing of it; what it says of the same views is the same through every door."""
    vlm = relook.load("cards-tiny").with_settings(region_of="last", max_looks=3, region_margin=0)
    page = Cards(7).sample(0)
    for qa in page.qas[:2]:
        box = tuple(qa.boxes[0])
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        answers = [asked() for _, asked in doors(vlm, page.image, qa.question, box=(x - 2, y - 2, x + 2, y + 2))]
        assert len(answers[0].looks) > 1
        for answer in answers:
            assert answer.text == answers[0].text and answer.looks == answers[0].looks
        crops = by_hand(page.image, [[look.cells] for look in answers[0].looks], margin=0)
        check(answers[0], [[look.cells] for look in answers[0].looks], crops, vlm.processor)
        pairs = [(page.image, qa.question, {"box": (x - 2, y - 2, x + 2, y + 2)}), (PAGE, QUESTION)]
        many = vlm.ask_many(pairs)
        assert many[0].text == answers[0].text and many[0].looks == answers[0].looks


def test_the_record(vlm, tmp_path):
    """JSON names the frame; the picture draws the grid of a nested look inside the view before."""
    with writing(vlm, *texts(CASES["two"])):
        *events, finished = vlm.stream(PAGE, QUESTION, max_new_tokens=40, max_looks=2)
    answer = finished.answer
    taken = [event.to_dict()["look"] for event in events if isinstance(event, LookTaken)]
    assert [look["frame"] for look in taken] == [[0, 0, 480, 320], list(answer.looks[0].box)]
    assert describe(answer).splitlines()[1:] == [
        "look 1: region, cells 1,2,5,6, box 0,40,420,320 (x1,y1,x2,y2 pixels)",
        "look 2: region, cells 3,0,6,3 of the last view, box 105,40,420,215 (x1,y1,x2,y2 pixels)",
    ]
    nested = answer.picture()
    answer.looks[1].frame = None
    assert answer.save(tmp_path / "a.png").is_file() and nested.tobytes() != answer.picture().tobytes()
