"""Draw the pages of this folder again: two receipts and a page of cards, from the project's own worlds.

    python examples/make_pages.py [FOLDER]

The receipts are written, printed, creased and scanned by code (zoo.worlds); no real document is among them. The
seed is used by no recipe, so a model has seen none of these pages. Beside them goes `questions.jsonl`: every question a
page can answer, with the boxes, as `relook data build` and `relook evaluate --tasks` read them. Without FOLDER, the
pages that the server's web page offers are written too (src/relook/web/examples; index.json there has their questions).
"""

import json
import sys
from pathlib import Path

from zoo.worlds import make_world

HERE = Path(__file__).parent
WEB = HERE.parent / "src/relook/web/examples"
SEED = 700_000_000
PAGES = {  # file -> world, page number
    "receipt-1.jpg": ("receipts", 0),
    "receipt-2.jpg": ("receipts", 4),
    "card.png": ("cards", 0),
}
WEB_PAGES = {"receipts": (0, 4, 8), "cards": (0, 1, 2)}  # receipt-1.webp, ..., card-3.webp


def main(folder: Path) -> None:
    lines = []
    for name, (world, number) in PAGES.items():
        page = make_world(world, SEED).sample(number)
        grey = world == "receipts"  # as a scanner saves them
        (page.image.convert("L") if grey else page.image).save(folder / name, **({"quality": 85} if grey else {}))
        for qa in page.qas:
            size = {"width": page.image.width, "height": page.image.height}
            what = {"question": qa.question, "answer": qa.answer, "bboxs": [list(box) for box in qa.boxes]}
            lines.append(json.dumps({"image": name, **size, **what, "field": qa.field}) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"written: {', '.join(PAGES)}, questions.jsonl")


def write_web_pages(folder: Path) -> None:
    for world, numbers in WEB_PAGES.items():
        for i, number in enumerate(numbers, 1):
            image = make_world(world, SEED).sample(number).image.convert("L" if world == "receipts" else "RGB")
            image.convert("RGB").save(folder / f"{world[:-1]}-{i}.webp", quality=80, method=6)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
    if len(sys.argv) == 1:
        write_web_pages(WEB)
