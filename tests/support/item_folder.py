"""A folder of items with two pictures, functions that corrupt them, and pages of them, for tests of `relook data`."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image, ImageDraw
from typer.testing import CliRunner

from relook.cli import app
from relook.data import BuildOptions, Question, build_item
from relook.looks import write_call

WIDE, SIDEWAYS = (640, 400), (400, 640)


def call(*argv: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in argv])
    assert result.exit_code == code, result.output
    return result.stdout


def refused(*argv: object) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in argv])
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Eight random rectangles, different for each seed."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for i in range(8):
        x, y = (seed * 97 + i * 131) % size[0], (seed * 61 + i * 173) % size[1]
        draw.rectangle((x, y, x + 60 + 9 * i, y + 40 + 7 * seed % 50), fill=(30 * i % 256, 40 + 20 * seed % 200, 90))
    return image


def pictures_in(folder: Path) -> Path:
    """Write wide.png (640 x 400) and turned.jpg (stored 640 x 400, upright 400 x 640, stored top-left quarter red)."""
    picture(WIDE).save(folder / "wide.png")
    stored = Image.new("RGB", WIDE, "blue")
    stored.paste("red", (0, 0, 320, 200))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(folder / "turned.jpg", exif=exif)
    return folder


def item(image: str = "wide.png", size: tuple[int, int] = WIDE, answer: str = "ACME corp.", **options) -> dict:
    line = {"image": image, "width": size[0], "height": size[1], "question": "Who?", "answer": answer}
    question = Question.from_dict(line | {"bboxs": [[100, 120, 300, 240]]})
    return build_item(question, BuildOptions(**options)).to_dict()


def write(path: Path, *items: dict) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in items), encoding="utf-8")
    return path


def x8(good: dict) -> dict:
    """The published builder's output for a box at the right border: the label, and a crop beyond it."""
    good["messages"][1]["content"] = write_call("region", (5, 2, 7, 4)).replace("x_7", "x_8")
    good["images"][1] = "wide.png_400,100,720,250"
    return good


def as_stored(good: dict) -> dict:
    """Cells and crop of the red quarter before the EXIF rotation."""
    good["messages"][1]["content"] = write_call("region", (0, 0, 3, 3))
    good["images"] = ["turned.jpg", "turned.jpg_0,0,320,200"]
    return good


def changed(**turns: str):
    def change(good: dict) -> dict:
        for key, text in turns.items():
            good["messages"][int(key[1:])]["content"] = text
        return good

    return change


def with_images(*refs: str):
    return lambda good: good | {"images": list(refs)}


class Page(HTMLParser):
    """Parses a page, checks that tags are closed in order, and keeps elements and text."""

    VOID = ("meta", "img", "rect", "path", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag, kind=None):
        return [attrs for name, attrs in self.elements if name == tag and kind in (None, attrs.get("class"))]
