"""An evaluation that kills itself at its N-th event: `interrupted_evaluation.py FOLDER N [RANK]`.

Events are batches, writes, syncs and renames; N = 0 disables the kill. Prints the number of batches and of events.
Under torchrun only the process of that rank kills itself.
"""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from relook.evaluate import evaluate
from relook.evaluate.record_writer import RecordWriter
from relook.trace import Answer, Usage


class Echo:
    """A model that answers with the last word of the question and the size of the batch."""

    name, looks, processor = (
        "echo",
        ["region"],
        SimpleNamespace(grid_size=8, region_margin=0, region_of="whole", max_looks=1),
    )
    asked = 0

    def ask_many(self, requests, **_):
        event()
        self.asked += 1
        told = [(r["question"].split()[-1], len(requests)) for r in requests]
        return [Answer(f"{word} of {count}", [], Usage(), question=word) for word, count in told]


EVENTS, LAST = 0, 0


def event() -> None:
    global EVENTS
    EVENTS += 1
    if EVENTS == LAST:
        os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name) -> None:
    inner = getattr(owner, name)

    def watched(*args, **kwargs):
        event()
        return inner(*args, **kwargs)

    setattr(owner, name, watched)


def write_questions(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    rows = [{"image": "a.png", "question": f"say {i}", "answer": str(i), "bboxs": [[0, 0, 4, 4]]} for i in range(11)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "own.jsonl"


def run(folder: Path, kill_at: int = 0) -> dict[str, int]:
    """Evaluate, killing the process at its `kill_at`-th event; returns the number of batches and of events."""
    global LAST
    LAST = kill_at
    path = folder / "own.jsonl"
    if not path.exists():
        write_questions(folder)
    before(os, "fsync")
    before(os, "replace")
    add = RecordWriter.add

    def torn(self, records):
        """Write a partial record, as a kill in the middle of a write leaves it."""
        if LAST == EVENTS + 1:
            with self.part.open("ab") as file:
                file.write(json.dumps(records[0]).encode() + b"\n" + json.dumps(records[-1]).encode()[:20])
        event()
        return add(self, records)

    RecordWriter.add = torn
    model = Echo()
    evaluate(model, [str(path)], ["none", "oracle"], out=folder / "run", batch=4)
    return {"asked": model.asked, "events": EVENTS}


if __name__ == "__main__":
    here = sys.argv[3:] in ([], [os.environ.get("RANK")])
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]) if here else 0)))
