"""What people do on the page, by playwright."""

from __future__ import annotations

import pytest

from relook.serve.page import FOLDER

WIDE, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
EVIL = """</p><script>alert(1)</script><img src=x onerror=alert(2)> "quotes' `id` $HOME \\n {{ 7 * 7 }}"""
QUESTION = "Which code does the blue box show?"


def pick(page):
    page.locator("#file").set_input_files(FOLDER / "examples/card-1.webp")
    page.locator("#stage").wait_for()


def ask(page, question=QUESTION):
    page.locator("#question").fill(question)
    page.locator("#send").click()
    page.locator(".cost:visible").last.wait_for()
    page.get_by_role("button", name="Ask again").wait_for()


def place(page, selector):
    """[left, top, right, bottom] of an element, as shares of the image on the stage."""
    area, box = page.locator("#picture").bounding_box(), page.locator(selector).bounding_box()
    x, y = (box["x"] - area["x"]) / area["width"], (box["y"] - area["y"]) / area["height"]
    return [x, y, x + box["width"] / area["width"], y + box["height"] / area["height"]]


def shares(cells, grid=8):
    x0, y0, x1, y1 = cells
    return pytest.approx([x0 / grid, y0 / grid, (x1 + 1) / grid, (y1 + 1) / grid], abs=0.02)


def drag(page, start, end):
    """From one share of the image to another, with the mouse, or with a finger where there is no mouse."""
    area = page.locator("#picture").bounding_box()
    points = [(area["x"] + x * area["width"], area["y"] + y * area["height"]) for x, y in (start, end)]
    if page.evaluate("matchMedia('(pointer: coarse)').matches"):
        touch = page.context.new_cdp_session(page)
        for kind, at in (("touchStart", points[:1]), ("touchMove", points[1:]), ("touchEnd", [])):
            touches = [{"x": x, "y": y} for x, y in at]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})
    else:
        page.mouse.move(*points[0])
        page.mouse.down()
        page.mouse.move(*points[1], steps=4)
        page.mouse.up()
