"""The main job on the pages of this folder: ask, look again, answer, draw. `make demo` runs it.

    python examples/demo.py

Each line of PAGES is a question to a model that ships, answered right or wrong; the pictures go to out/. Where real
scanned receipts lie in ../shared/data/receipts (they are not part of the project), one of those is asked about too.
"""

import sys
from functools import cache
from pathlib import Path

import relook

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "out"
REAL = HERE.parent.parent / "shared" / "data" / "receipts" / "images" / "400.jpg"
TOTAL = "What is the total amount on this receipt?"

PAGES = [  # image, question, model, what is printed there
    (HERE / "receipt-1.jpg", TOTAL, "receipts-tiny", "2.40"),
    (HERE / "receipt-2.jpg", TOTAL, "receipts-tiny", "737.95"),
    (HERE / "card.png", "Which code does the blue box show?", "cards-tiny", "164"),
    (REAL, TOTAL, "receipts-tiny", "110.00"),
]
NEXT = """
Go on:
  .venv/bin/relook ask YOUR.jpg "What is the date on this receipt?" --save out/mine.png   (--json for the whole trace)
  .venv/bin/relook --help            every command            README.md   the ten lines of Python
  make test                          lint and tests           make receipts-tiny   train the model again
"""


@cache
def load(name: str) -> relook.VLM:
    return relook.load(name)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for image, question, name, truth in PAGES:
        if not image.is_file():
            continue
        print(f"\n{_short(image)}: {question}   [{name}]", flush=True)
        answer = load(name).ask(image, question)
        picture = answer.save(OUT / f"{image.stem}.png")
        print(f"  {answer.text}   (on the page: {truth})")
        for look in answer.looks:
            print(f"  looked again ({look.kind}) at cells {look.cells}, pixels {look.box}")
        print(f"  picture: {_short(picture)}")
    print(NEXT)


def _short(path: Path) -> str:
    """The path from here, where it is below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    try:
        main()
    except relook.RelookError as error:
        sys.exit(f"relook: {error}")
