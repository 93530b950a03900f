"""How a request's images are opened: measured before they are decoded, nothing but an image, within limits."""

import asyncio
import base64
import contextlib
import shutil

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from support import hostile_images

from relook.errors import RelookError, UserError
from relook.perceive.engine import EngineBusy
from relook.serve.decode import Decoders, opened
from relook.serve.fetch import FetchSettings, load_images
from relook.serve.limits import Limits, Memory, hold
from relook.views import open_image

LIMITS = Limits()


def images(files, limits=LIMITS):
    """As a server opens them."""
    urls = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in files]
    return asyncio.run(load_images(urls, limits, FetchSettings()))


def refusal(data, limits=LIMITS):
    with pytest.raises(UserError) as caught:
        images([data], limits)
    sentence = str(caught.value)
    assert sentence.startswith("image 1") and "\n" not in sentence and len(sentence) < 300
    return sentence


@pytest.mark.parametrize("name", hostile_images.bombs())
def test_bombs_are_refused_before_they_are_unpacked(name):
    """A WebP's canvas is made with its header; the memory of the process that decodes it does not reach so far."""
    sentence = refusal(hostile_images.bombs()[name])
    assert ("pixels" in sentence) == (not name.startswith("webp"))
    if name == "png that keeps its word":
        assert "9,000 x 9,000" in sentence and "64,000,000" in sentence


@pytest.mark.parametrize("name", ["tile_bomb", "scan_bomb", "segment_bomb"])
def test_bombs_of_a_modest_size_are_ended(name):
    """Nothing in their headers tells them apart; the process that decodes them is ended by the system."""
    limits = Limits(pixels=20_000_000, decode_seconds=0.2)
    sentence = refusal(getattr(hostile_images, name)(), limits)
    assert "more than 0.2 seconds or more memory" in sentence or "damaged" in sentence
    assert images([hostile_images.encoded("PNG")], limits)  # a new process


def test_a_decoder_that_died_is_started_again():
    decoders = Decoders(1)
    data = hostile_images.encoded("PNG")
    assert decoders.open(data, 0, 10_000, 5).size == (48, 32)
    child = decoders._free.get()
    child.kill()
    child.wait()
    decoders._free.put(child)
    assert decoders.open(data, 0, 10_000, 5).size == (48, 32)
    last = decoders._free.get()
    last.stdin.close()
    assert last.wait(10) == 0  # a child ends with its parent's pipe


def test_decoders_that_cannot_start_are_no_fault_of_the_image(monkeypatch):
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    with pytest.raises(RelookError, match="status 1") as caught:
        Decoders(1).open(hostile_images.encoded("PNG"), 0, 10_000, 5)
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize("kind", ["truncated", "not_images", "polyglots"])
def test_what_is_no_image_or_more_than_one_thing(kind):
    for name, data in getattr(hostile_images, kind)().items():
        sentence = refusal(data)
        if kind == "polyglots":
            assert "(also)" in sentence, name
        if "svg" in name:
            assert "SVG" in sentence, name


def test_what_people_send_is_opened_as_everywhere():
    for name, data in hostile_images.odd().items():
        [image] = images([data])
        assert np.array_equal(np.asarray(image), np.asarray(open_image(data))), name


def test_pixels_are_counted_over_the_images_of_a_request():
    limits, data = Limits(pixels=4000), hostile_images.encoded("PNG", (48, 32))
    assert len(images([data] * 2, limits)) == 2
    with pytest.raises(
        UserError, match=r"image 3: 48 x 32 pixels are 1,536, 4,608 with the images before it; .* 4,000"
    ):
        images([data] * 3, limits)
    assert "48 x 32 pixels are 1,536; this server takes at most 1,535" in refusal(data, Limits(pixels=1535))


@pytest.mark.filterwarnings("ignore:Tag data")
def test_damaged_files_are_refused_or_opened_and_nothing_else():
    """Flipped bytes, cut and doubled stretches of files of every format."""
    draw = np.random.default_rng(0)
    outcomes = dict.fromkeys(hostile_images.FORMATS, 0)
    for name in hostile_images.FORMATS:
        data = hostile_images.encoded(name)
        for _ in range(150):
            damaged = bytearray(data)
            for at in draw.integers(0, len(data), draw.integers(1, 6)):
                damaged[at] = draw.integers(256)
            if draw.random() < 0.2:
                first, last = sorted(draw.integers(0, len(data), 2))
                damaged[first:last] = damaged[first:last] * int(draw.integers(0, 3))
            with contextlib.suppress(UserError):
                opened(bytes(damaged), 0, 100_000)
                outcomes[name] += 1
    assert sum(outcomes.values()) > 100  # some remain images


def test_conversations():
    limits = Limits(turns=3, images=2, question_characters=100)
    limits.check(["a" * 100] * 3, 2)
    for turns, images, said in (
        (["a"] * 4, 0, "4 messages, this server takes at most 3"),
        (["a"], 3, "3 images, this server takes at most 2"),
        (["a", "b" * 100_000], 1, "100,000 characters in one message, this server takes at most 100"),
    ):
        with pytest.raises(UserError, match=said):
            limits.check(turns, images)
    limits.check([], 0)


@pytest.mark.parametrize("wrong", [{"pixels": 0}, {"seconds": 0}, {"body_bytes": 10}, {"image": 3}, {"turns": -1}])
def test_limits_are_checked_when_the_server_starts(wrong):
    with pytest.raises(ValidationError):
        Limits(**wrong)


def test_memory_is_given_back_whatever_happens():
    memory = Memory(13_000)
    image = hostile_images.encoded("PNG", (48, 32))  # 6,144 bytes as Pillow holds it
    with memory.request():
        images([image] * 2)
        assert memory.held == 2 * 6144
        with pytest.raises(EngineBusy, match="12,288") as busy:
            images([image])
        assert busy.value.retry_after == 1
        with memory.request():  # another request
            hold(700)
            assert memory.held == 12_988
        assert memory.held == 12_288
    assert memory.held == 0
    with contextlib.suppress(ZeroDivisionError), memory.request():
        hold(5)
        raise ZeroDivisionError
    assert memory.held == 0
    hold(10**12)  # outside of a server nothing is counted


def test_images_are_the_callers_own():
    data = hostile_images.encoded("PNG")
    one, other = images([data, data])
    one.putpixel((0, 0), (1, 2, 3))
    assert isinstance(one, Image.Image) and other.getpixel((0, 0)) != (1, 2, 3)
