"""How often `relook data locate` finds an annotated answer, and on the annotated box: n, share, 95 % interval.

    python tools/measure_locate.py ../shared/data/receipts/train_qa.jsonl --images 24 --seed 0
    python tools/measure_locate.py photos.jsonl --by DETECTOR

Images are drawn by the seed; all of their questions with boxes are located as if they had none. A place is on the box
where half of the smaller of the two lies in the other. Intervals are of images drawn with replacement (2000 draws).
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace

from relook.data import read_questions
from relook.data.locate import find_locator
from relook.evaluate.statistics import bootstrap
from relook.regions import covered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions")
    parser.add_argument("--by", default="ocr")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="name what was not found, at several places, or elsewhere")
    options = parser.parse_args()
    asked = [question for question in read_questions(options.questions) if question.boxes]
    names = sorted({str(question.image) for question in asked})
    drawn = set(random.Random(options.seed).sample(names, min(options.images, len(names))))
    asked = [question for question in asked if question.image in drawn]
    locator, kinds = find_locator(options.by), []
    begun = time.perf_counter(), time.process_time()
    for question in asked:
        found = locator.places(replace(question, boxes=()))
        on = [any(max(covered(b, p.box), covered(p.box, b)) >= 0.5 for b in question.boxes) for p in found]
        kinds.append("none" if not found else "several" if len(found) > 1 else "on" if on[0] else "off")
        if options.list and kinds[-1] != "on":
            print(kinds[-1], question.where, question.field, question.answer, question.boxes, found)
    wall, processor = time.perf_counter() - begun[0], time.process_time() - begun[1]
    images = [str(question.image) for question in asked]
    print(f"{len(asked)} questions on {len(drawn)} images, seed {options.seed}, {locator.source}")
    rows = {
        "found": [kind in ("on", "off") for kind in kinds],
        "found, on the annotated box": [kind == "on" for kind in kinds],
        "at several places, listed": [kind == "several" for kind in kinds],
        "not found": [kind == "none" for kind in kinds],
    }
    for name, values in rows.items():
        share = bootstrap([float(value) for value in values], clusters=images, seed=options.seed)
        mean, low, high = share.scaled(100) or (0.0, 0.0, 0.0)
        print(f"{name:30} {sum(values):4d}   {mean:5.1f} % ({low:.1f}-{high:.1f})")
    print(f"{wall / len(drawn):.1f} s an image, {processor / len(drawn):.1f} s of it processor time")


if __name__ == "__main__":
    main()
