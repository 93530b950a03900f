"""The trace as JSON, and the picture of an answer, whose pixels are compared with the expected geometry."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from relook.errors import UserError
from relook.regions import cells_to_box, crop, widen
from relook.render import ACCENTS, PAPER, WARN
from relook.trace import Answer, Finished, Look, LookTaken, TextDelta, Turn, Usage

BLUE = (0, 0, 255)


def page(size: tuple[int, int] = (160, 240), colour: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    return Image.new("RGB", size, colour)


def region(image: Image.Image, cells: tuple[int, int, int, int], margin: int = 1) -> Look:
    part, box = crop(image, cells, margin=margin)
    return Look("region", cells, box, part)


def answer(image: Image.Image | None, *looks: Look, text: str = "12.50", **kw) -> Answer:
    return Answer(
        text, list(looks), Usage(341, 341, 612, 14, {"look": 0.5}), [], "What is the total?", image, "m", **kw
    )


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def places(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """(n, 2) rows and columns of the pixels that have exactly `colour`."""
    return np.argwhere((pixels(picture) == colour).all(-1))


# -- the record --------------------------------------------------------------------------------------


def test_usage_adds_up_stage_by_stage() -> None:
    total = Usage(10, 10, 4, 3, {"look": 0.5, "write": 1.0}) + Usage(5, 6, 0, 1, {"write": 0.25, "vision": 2.0})
    assert total == Usage(15, 16, 4, 4, {"look": 0.5, "write": 1.25, "vision": 2.0})
    assert Usage() + total == total and sum([total, total], Usage()).lm_positions == 30


def test_the_trace_is_json_in_and_out() -> None:
    image = page()
    map_ = np.array([[0.5, float("nan")], [-1.0, 1 / 3]], dtype=np.float32)
    trace = answer(
        image,
        Look(
            "region",
            tuple(np.int64(v) for v in (1, 2, 3, 4)),
            (20, 60, 80, 150),
            image.crop((20, 60, 80, 150)),
            frame=(0, 0, 160, 240),
            turn=1,
        ),
        Look("clip", None, (0, 0, 160, 240), image, map_),
        Look("seg", problem="the model has no seg look"),
        warnings=["cut at 64 tokens"],
    )
    trace.transcript = [Turn("user", "<image>\nWhat?"), Turn("assistant", "12.50", sampled=True)]
    seen = json.loads(json.dumps(trace.to_dict(), allow_nan=False))
    assert seen["question"] == "What is the total?" and seen["text"] == "12.50" and seen["model"] == "m"
    assert seen["image"] == {"width": 160, "height": 240} and seen["grid"] == 8
    assert seen["looks"][0] == {
        "kind": "region",
        "cells": [1, 2, 3, 4],
        "frame": [0, 0, 160, 240],
        "box": [20, 60, 80, 150],
        "image": {"width": 60, "height": 90},
        "attention": None,
        "problem": None,
        "turn": 1,
    }
    assert seen["looks"][1]["attention"] == [[0.5, None], [-1.0, 0.333333]]
    assert seen["looks"][2]["problem"] == "the model has no seg look" and seen["looks"][2]["image"] is None
    assert seen["usage"]["lm_positions"] == 341 and seen["usage"]["seconds"] == {"look": 0.5}
    assert seen["transcript"][1] == {"role": "assistant", "text": "12.50", "sampled": True}
    assert seen["warnings"] == ["cut at 64 tokens"]


def test_images_travel_as_png_when_asked_for() -> None:
    image = page((9, 7), BLUE)
    png = answer(image, region(image, (0, 0, 7, 7))).to_dict(images=True)["looks"][0]["image"]["png"]
    with Image.open(io.BytesIO(base64.b64decode(png))) as again:
        assert again.size == (9, 7) and again.convert("RGB").getpixel((3, 3)) == BLUE


def test_events_are_json_too() -> None:
    trace = answer(page(), Look("clip"))
    events = [TextDelta("12"), LookTaken(trace.looks[0]), Finished(trace)]
    sent = [json.loads(json.dumps(event.to_dict())) for event in events]
    assert [event["event"] for event in sent] == ["text", "look", "finished"]
    assert sent[0]["text"] == "12" and sent[1]["look"]["kind"] == "clip" and sent[2]["answer"]["text"] == "12.50"


def test_traces_with_images_and_maps_can_be_compared_and_printed() -> None:
    one, two = (answer(page(), Look("clip", attention=np.ones((2, 2)), image=page())) for _ in range(2))
    assert one == two and "array" not in repr(one) and "PIL" not in repr(one)


# -- the picture -------------------------------------------------------------------------------------


def test_the_crop_is_drawn_from_the_original_pixels_and_framed() -> None:
    """A blue page with a small red mark: it shows in the image and, larger, in the crop, though the view lost it."""
    image = page((160, 240), BLUE)
    image.paste((255, 0, 0), (48, 70, 52, 74))
    look = region(image, (2, 2, 2, 2))  # widened: columns 1 to 3, rows 1 to 3
    look.image = look.image.resize((4, 4)) if look.image else None
    picture = pixels(answer(image, look).picture())
    red = np.argwhere((picture[..., 0] > 240) & (picture[..., 1] < 15) & (picture[..., 2] < 15))
    columns = red[:, 1]
    split = (columns.min() + columns.max()) // 2
    assert columns.max() - columns.min() > 300
    assert (columns >= split).sum() > 2 * (columns < split).sum() > 0
    assert len(places(Image.fromarray(picture.astype(np.uint8)), ACCENTS[0])) > 500  # the frames of box and crop


def test_the_box_is_outlined_where_it_is() -> None:
    """In a 160 x 240 page shown 620 / 160 times as large, cells (4, 4, 5, 5) are the box (80, 120, 120, 180)."""
    image = page()
    picture = answer(image, region(image, (4, 4, 5, 5), margin=0)).picture()
    scale = min(620 / 160, 860 / 240)
    frame = places(picture, ACCENTS[0])
    dots = frame[frame[:, 1] < frame[:, 1].max() / 2]  # the crop stands to the right
    # where the panel starts is not part of the promise: the box's size is, and its place relative to the grid's corner
    height, width = dots.max(0) - dots.min(0) + 1
    assert width == pytest.approx(40 * scale, abs=2) and height == pytest.approx(60 * scale, abs=2)
    dimmed = pixels(picture)
    white = np.argwhere((dimmed == 255).all(-1))
    inside = white[(white[:, 1] > dots[:, 1].min()) & (white[:, 1] < dots[:, 1].max())]
    assert len(inside) > 0.8 * width * height  # the box is not dimmed, what no look saw is
    assert len(white[white[:, 1] < dots[:, 1].min() - 2]) < 50


def test_attention_brightens_where_it_is_high() -> None:
    image = page((160, 160), (128, 128, 128))
    heat = np.zeros((4, 4))
    heat[0, 3] = -9.0  # the sign does not matter
    picture = answer(image, Look("clip", None, (0, 0, 160, 160), image, heat)).picture()
    frame = places(picture, ACCENTS[0])
    top, left, side = frame[:, 0].min(), frame[:, 1].min(), frame[:, 1].max() - frame[:, 1].min()
    view = pixels(picture)[top : top + side, left : left + side].sum(-1)
    quarter = side // 4
    high, low = view[10:quarter, -quarter:-10].mean(), view[-quarter:-10, 10:quarter].mean()
    assert high > low + 150


@pytest.mark.parametrize(("kind", "covered"), [("clip", 1.0), ("detection", 0.5 * 0.875**2), ("seg", 1.0)])
def test_the_map_lies_over_what_the_encoder_saw(kind: str, covered: float) -> None:
    """DINOv2 sees a centred square of 7/8 of the shorter side; the rest of a 2:1 image is faded, not darkened."""
    image = page((320, 160), (128, 128, 128))
    look = Look(kind, None, (0, 0, 320, 160), image, np.zeros((16, 16)))
    picture = answer(image, look).picture()
    frame = places(picture, ACCENTS[0])
    top, left, bottom, right = *frame.min(0), frame[:, 0].max(), frame[:, 1].max()
    rows = frame[frame[:, 1] == left][:, 0]  # the view's left edge, above the caption
    view = pixels(picture)[top + 4 : rows.max() - 4, left + 4 : right - 4, 0]
    assert bottom > rows.max()
    assert (view < 128).mean() == pytest.approx(covered, abs=0.03)


def test_a_look_that_was_not_taken_says_why_in_red() -> None:
    image = page()
    fine = answer(image, Look("region", problem="cut off")).picture()
    assert len(places(fine, WARN)) > 50
    assert len(places(answer(image).picture(), WARN)) == 0


def test_the_picture_of_a_hint_of_an_answer() -> None:
    assert answer(None, text="").picture().size[1] < 300
    long = answer(page(), text="word " * 3000).picture()
    assert long.height < 1600
    unbroken = answer(page(), text="x" * 5000, warnings=["w" * 300]).picture()
    assert unbroken.height < 1600 and tuple(unbroken.getpixel((unbroken.width - 5, 60))) == PAPER


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([(1, 1), (1, 30), (30, 1), (2000, 100), (100, 2000), (64, 64), (463, 1013), (640, 400)]),
    st.lists(st.sampled_from(["region", "clip", "detection", "seg", "none", "new-kind"]), max_size=8),
    st.sampled_from([1, 3, 8, 16]),
)
def test_any_answer_has_a_picture(size: tuple[int, int], kinds: list[str], grid: int) -> None:
    image = page(size, (90, 120, 90))
    looks = []
    for kind in kinds:
        if kind == "region":
            cells = (0, 0, grid // 2, grid - 1)
            looks.append(Look(kind, cells, cells_to_box(widen(cells, 1, grid), size, grid)))
        elif kind == "none":
            looks.append(Look("clip", problem="no such look"))
        else:
            looks.append(Look(kind, None, (0, 0, *size), image, np.random.default_rng(0).normal(size=(3, 5))))
    picture = answer(image, *looks, grid=grid).picture()
    assert picture.mode == "RGB" and 700 <= picture.width <= 1300 and picture.height < 4000


def test_save_writes_by_suffix_and_refuses_clearly(tmp_path: Path) -> None:
    trace = answer(page())
    for name, form in {"a.png": "PNG", "a.jpg": "JPEG", "a.WEBP": "WEBP", "plain": "PNG"}.items():
        path = trace.save(tmp_path / name)
        with Image.open(path) as image:
            assert image.format == form
    for name in ("a.xyz", "missing/a.png", "a.json"):
        with pytest.raises(UserError) as error:
            trace.save(tmp_path / name)
        assert "\n" not in str(error.value) and Path(name).name in str(error.value)
        assert not (tmp_path / name).exists()


def test_a_notebook_shows_the_picture_and_text_only_answers_have_none() -> None:
    assert answer(None)._repr_png_() is None
    assert (answer(page())._repr_png_() or b"").startswith(b"\x89PNG")


def test_a_tiny_wide_image_with_several_looks_has_a_picture() -> None:
    image = page().resize((3, 1))
    seen = answer(image, *[Look("region", (0, 0, 1, 1), (0, 0, 1, 1), image, frame=(0, 0, 3, 1))] * 3)
    assert seen.picture().width > 700
