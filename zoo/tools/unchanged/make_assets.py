"""What the cases of `unchanged.py` start from, made once by the code of one tree: `make_assets.py TREE ASSETS`.

Run with PYTHONPATH=TREE/src:TREE/tests. Tiny Qwen2-VL, DINOv2 and SAM folders, models with looks, sets of own items.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from own_items import conversation, write_items_of
from relook.data.worlds import make_world
from test_assembling import write_text_model
from tiny_starts import parts, start


def questions(folder: Path, world: str, seed: int, pages: int, each: int) -> None:
    """Pages of a world and questions about them."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(pages):
        page = make_world(world, seed).sample(number)
        page.image.save(folder / f"{number}.png")
        for qa in page.qas[:each]:
            line = {"image": f"{number}.png", "question": qa.question, "answer": qa.answer, "field": qa.field}
            lines.append(line | {"bboxs": [list(map(int, box)) for box in qa.boxes]})
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def items(folder: Path) -> None:
    """Items of several looks on the pages of `questions`, and a faulty set."""
    from typer.testing import CliRunner

    from relook.cli import app

    given = [str(folder / "questions.jsonl"), str(folder / "items.json"), "--look", "region=0.5,clip=0.35,none=0.15"]
    done = CliRunner().invoke(app, ["data", "build", *given])
    assert done.exit_code == 0, done.output
    lines = [json.dumps(item) for item in json.loads((folder / "items.json").read_text())]
    cut = json.loads(lines[1])
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:300])
    cut["images"] = ["cut.png"]
    missing = json.loads(lines[2].replace(".png", "-gone.png"))
    lines[1], lines[2], lines[5] = json.dumps(cut), json.dumps(missing), lines[5][:40]
    (folder / "faulty.jsonl").write_text("\n".join([*lines, lines[3]]) + "\n")
    (folder / "tasks.yaml").write_text("mine: {questions: questions.jsonl, scores: [exact, anls, vqa_exact]}\n")


def scans(folder: Path) -> None:
    """As ../shared/data/receipts, from synthetic pages."""
    (folder / "images").mkdir(parents=True)
    for split, seed, count in (("train", 7, 4), ("val", 8, 3)):
        world, lines, asked = make_world("receipts", seed), [], []
        for number in range(count):
            page, name = world.sample(number), f"images/{split}-{number}.png"
            page.image.save(folder / name)
            texts = [{"box": list(map(int, line.box)), "text": line.text} for line in page.meta["lines"]]
            size = {"width": page.image.width, "height": page.image.height}
            lines.append({"image": name, **size, "fields": {}, "lines": texts})
            for qa in page.qas[:4]:
                line = {"image": name, **size, "question": qa.question, "answer": qa.answer, "field": qa.field}
                asked.append(line | {"bboxs": [list(map(int, box)) for box in qa.boxes]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / f"{split}_qa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))


def others(folder: Path) -> None:
    """Small files in others' forms."""
    viscot = {
        "image": ["cot/gqa/1.jpg", "cot/gqa/1.jpg###[217, 343, 242, 393]"],
        "conversations": [
            {"from": "human", "value": "<image>\nWhat are the tree branches in front of? Please provide the bounding "
             "box coordinate of the region that can help you answer the question better."},
            {"from": "gpt", "value": "[0.543,0.697,0.592,0.799]"},
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": "building"},
        ],
    }  # fmt: skip
    (folder / "viscot.json").write_text(json.dumps([viscot]))
    coco = {
        "images": [{"id": 1, "file_name": "0.png", "width": 512, "height": 512}],
        "categories": [{"id": 1, "name": "box"}, {"id": 2, "name": "code"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 1 + n % 2, "bbox": [20 * n, 30, 60, 40], "iscrowd": 0}
            for n in range(1, 5)
        ],
    }
    (folder / "coco.json").write_text(json.dumps(coco))
    theirs = [
        json.dumps(item).replace('["', '["/root/data/gqa/images/')
        for item in (conversation(["clip"], image=f"{n}.png") for n in (0, 1, 2, 50))
    ]
    (folder / "theirs.jsonl").write_text("\n".join(theirs) + "\n")


def main(tree: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = parts(folder)
    for look in ("clip", "detection", "seg"):
        start(folder / f"with-{look}", made, ("region", look))
        (folder / look).mkdir()
        write_items_of(folder / look / "items.json", [look, "region"], count=8)
    questions(folder / "own", "cards", 5, 6, 3)
    items(folder / "own")
    scans(folder / "shared/data/receipts")
    others(folder)
    write_text_model(folder / "text")
    shutil.copytree(tree / "recipes/receipts-tower", folder / "tower")
    shutil.copytree(tree / "examples", folder / "examples")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
