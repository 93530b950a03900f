"""Take the screenshots of the server's page in docs/: `relook serve` with a model that ships, in a real Chromium.

    python tools/screenshots.py [--model receipts-tiny] [--out docs]     # serve-1280.png, serve-390.png

Needs the extras `serve` and `browser`, and a Chromium on the PATH (or RELOOK_CHROMIUM=PATH).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, ViewportSize, sync_playwright

SHOTS: dict[str, tuple[int, ViewportSize]] = {
    "1280": (0, {"width": 1280, "height": 860}),
    "390": (2, {"width": 390, "height": 844}),
}  # number of the example, window


@contextmanager
def served(model: str) -> Iterator[str]:
    """The address of a server with `model`."""
    command = [sys.executable, "-m", "relook", "serve", model, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr or ():
                if found := re.search(r" at (http://\S+)", line):
                    yield found[1]
                    return
            sys.exit(f"{' '.join(command)} has ended: {line.strip()}")
        finally:
            process.terminate()


def shoot(browser: Browser, url: str, example: int, size: ViewportSize, path: Path) -> None:
    """Ask an example's question, and save the window when the answer stands."""
    phone = size["width"] < 600
    page = browser.new_page(viewport=size, is_mobile=phone, has_touch=phone)
    page.goto(url)
    page.locator("#examples button").nth(example).click()
    page.locator(".cost:visible").wait_for()
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)  # until nothing moves
    page.screenshot(path=path)
    page.close()
    with Image.open(path) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="receipts-tiny")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs")
    given = parser.parse_args()
    chromium = os.environ.get("RELOOK_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with served(given.model) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name, (example, size) in SHOTS.items():
            shoot(browser, url, example, size, given.out / f"serve-{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
