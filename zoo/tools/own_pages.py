"""A document set as somebody might own one: delivery notes (`zoo.worlds.notes`) as image files and files of questions.

    python zoo/tools/own_pages.py own --pages 200

writes own/images/, own/questions.jsonl (the pages to learn from; with fewer pages, the first of the same ones),
own/test.jsonl (other pages of the same five forms) and own/new-form.jsonl (a form that is in no other file). Images are
of mixed size, mode and orientation: grey and color, PNG and JPEG, some stored sideways with an EXIF tag that says so.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from zoo.worlds.base import Page
from zoo.worlds.notes import HELD_OUT, TAUGHT, Notes

PARTS = {"questions": (TAUGHT, 0), "test": (TAUGHT, 100_000), "new-form": (HELD_OUT, 200_000)}  # forms, first page
ORIENTATION, QUARTER_TURN = 0x0112, 6  # stored so, an image is upright after a quarter turn clockwise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder")
    parser.add_argument("--pages", type=int, default=200, help="to learn from")
    parser.add_argument("--test", type=int, default=60, help="pages of each of the two files of others")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    counts = {"questions": options.pages, "test": options.test, "new-form": options.test}
    for part, (forms, first) in PARTS.items():
        world = Notes(options.seed, forms)
        folder = options.out / "images" / part
        folder.mkdir(parents=True, exist_ok=True)
        with (options.out / f"{part}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(counts[part]):
                page = world.sample(first + number)
                name = save(page, folder / f"{number:03}", number)
                for qa in page.qas:
                    asked = {"image": f"images/{part}/{name}", "question": qa.question, "answer": qa.answer}
                    file.write(json.dumps({**asked, "bboxs": qa.boxes, "field": qa.field}) + "\n")
        print(f"{options.out / part}.jsonl: {counts[part]} pages")


def save(page: Page, path: Path, number: int) -> str:
    """Write the image as one of three kinds in turn (by sevens, so that every form has all); returns the name."""
    kind = number // 7 % 3
    if kind == 0:
        page.image.save(path.with_suffix(".png"))
        return f"{path.name}.png"
    if kind == 1:
        page.image.convert("L").save(path.with_suffix(".jpg"), quality=85)
        return f"{path.name}.jpg"
    exif = Image.Exif()
    exif[ORIENTATION] = QUARTER_TURN
    page.image.transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".jpg"), quality=85, exif=exif)
    return f"{path.name}.jpg"


if __name__ == "__main__":
    main()
