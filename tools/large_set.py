"""Make a set of published size with small repeated images, and measure what each command does with it.

    nice -n 15 python tools/large_set.py /tmp/large --items 829000      # about 2 GB of JSON, in an array
    nice -n 15 python tools/large_set.py /tmp/large --items 829000 --only stream

Prints items a second and peak memory for each, every one in a process of its own, and how much is Python's start.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LOOKS = ("region", "region", "clip", "none")
IMAGES = 64
SIZE = (160, 120)


def make(folder: Path, items: int, padding: int = 1800, name: str = "items.json") -> Path:
    """`items` distinct items over `IMAGES` small pictures; `padding` characters lengthen each to a published length."""
    from PIL import Image

    from relook.data import BuildOptions, Question, build_item, write_items

    (folder / "img").mkdir(parents=True, exist_ok=True)
    for i in range(IMAGES):
        shade = (i * 37 % 256, i * 61 % 256, i * 97 % 256)
        Image.new("RGB", SIZE, shade).save(folder / f"img/{i:03d}.png")

    def built() -> Iterator:
        draw = random.Random(0)
        texts = [" ".join(f"{draw.getrandbits(24):06x}" for _ in range(padding // 7)) for _ in range(256)]
        for i in range(items):
            x, y = draw.randrange(SIZE[0] - 20), draw.randrange(SIZE[1] - 20)
            text = f"Question {i}: {draw.choice(texts)}"
            line = {"image": f"img/{i % IMAGES:03d}.png", "width": SIZE[0], "height": SIZE[1]}
            line |= {"question": text, "answer": f"{i}", "bboxs": [[x, y, x + 20, y + 20]]}
            item = build_item(Question.from_dict(line), BuildOptions(look=LOOKS[i % len(LOOKS)]))
            assert item is not None
            yield item

    write_items(folder / name, built())
    return folder / name


def opened(path: Path) -> int:
    from relook.data.dataset import ItemsDataset

    return len(ItemsDataset(path))


def at_random(path: Path) -> int:
    from relook.data.dataset import ItemsDataset

    dataset = ItemsDataset(path)
    order = random.Random(0)
    return sum(bool(dataset[order.randrange(len(dataset))].messages) for _ in range(len(dataset)))


def checked(path: Path) -> int:
    from relook.data.check import check

    report = check(path, images=False)
    assert report.ok, report
    return report.items


def streamed(path: Path) -> int:
    from relook.data.dataset import ItemStream

    return sum(1 for _ in ItemStream(path))


def converted(path: Path) -> int:
    from relook.data.remap import convert

    return convert(path, path.parent / "parquet").items


def streamed_parquet(path: Path) -> int:
    return streamed(path.parent / "parquet")


def counted(path: Path) -> int:
    from relook.data.stats import stats

    return stats(path).items


WORK = {
    "open": opened,
    "at random": at_random,
    "check": checked,
    "stats": counted,
    "stream": streamed,
    "convert": converted,
    "stream parquet": streamed_parquet,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=829_000)
    parser.add_argument("--only", choices=WORK, help="measure one, in this process")
    options = parser.parse_args()
    path = options.folder / "items.json"
    if options.only:
        start, clock = time.perf_counter(), time.process_time()
        items = WORK[options.only](path)
        seconds, cpu = time.perf_counter() - start, time.process_time() - clock
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        told = {"items": items, "seconds": round(seconds, 1), "cpu seconds": round(cpu, 1)}
        print(json.dumps({options.only: told | {"items/s": round(items / seconds), "peak MB": round(peak)}}))
        return
    if not path.exists():
        make(options.folder, options.items)
    print(f"{path}: {path.stat().st_size / 1e9:.2f} GB", flush=True)
    for name in WORK:
        subprocess.run([sys.executable, __file__, str(options.folder), "--only", name], check=True)


if __name__ == "__main__":
    main()
