"""Questions answered by hand on the page: the file they go to, and a queue that the model answers beforehand.

`relook serve MODEL --collect own.jsonl --queue questions.jsonl`. A line of the file is a question with its answer and
boxes, as `relook data build` takes it. The model answers the queue in the background, one question after the other, and
those come first of whose answers it was least sure. How sure is the probability of the answer: the product of those of
its tokens, which tells wrong answers better than their mean does, or the least of them.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from anyio import to_thread
from fastapi import FastAPI, Query, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from relook.data.build import BuildOptions, BuildReport, build_item
from relook.data.forms.table import write_image
from relook.data.items import Question, image_size
from relook.data.reader import TABLES
from relook.errors import RelookError, UserError
from relook.files import reading, split_page
from relook.io import append_lines, locked_file, read_lines, replacing_file
from relook.perceive import engine as seam
from relook.serve.decode import FORMATS
from relook.serve.fetch import image_bytes, load_images
from relook.serve.queued import Queued, read_queue
from relook.serve.types import BadField
from relook.views import load_item_image

if TYPE_CHECKING:
    from relook.serve.app import Server

SHOWN = {"JPEG": "image/jpeg", "MPO": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}  # by every browser


class Answered(BaseModel):
    """A question answered by hand, about an image that is sent, or about that of a question of the queue."""

    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)

    image: str | None = None
    """A data URL."""
    number: int | None = None
    """Of a question of the queue."""
    question: str
    answer: str
    bboxs: list[Annotated[list[int], Field(min_length=4, max_length=4)]] = Field([], max_length=100)
    """Where the answer stands: x1, y1, x2, y2 in pixels of the upright image, x2 and y2 exclusive. None: nowhere."""


class Collection:
    """A file of questions answered by hand, one line for each question about an image, and a queue of others.

    Args:
        path: JSON lines; what is there stays.
        queue: questions to answer, of any form that `relook.data.read` reads, with answers and boxes or without.

    Raises:
        UserError: one of them is something else.
    """

    def __init__(self, path: str | Path, queue: str | Path | None = None):
        self.path, self._lock = Path(path), threading.Lock()
        if self.path.suffix in (*TABLES, ".parquet"):
            raise UserError(f"{path}: lines of JSON are written there; give it a name that ends in .jsonl")
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"{path}: not a file; choose another place")
        try:
            self.path.open("ab").close()
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
        self._read()
        if queue is not None and Path(queue).resolve() == self.path.resolve():
            raise UserError(f"{queue} is the queue; give another place for the answers")
        report = BuildReport()
        self.queue = [] if queue is None else list(read_queue(Path(queue), self.path, report))
        self.left_out = report.left_out  # sentences about what the queue has besides
        if queue is not None and not self.queue:
            raise UserError(f"{queue}: has no question about an image; give one with questions")
        self._asking: threading.Thread | None = None

    # -- the file

    def save(self, line: dict[str, Any], image: bytes | None = None, page: int | None = None) -> tuple[int, str]:
        """Append a line, or correct that of the same image and question; on the disk when this returns.

        Args:
            image: a file for its `image`, which is written beside the collection, once.
            page: of that file.

        Returns:
            Its number, and "new", "corrected" or "same" (it was there).

        Raises:
            RelookError: the disk is full.
        """
        with self._lock:
            try:
                kept = {} if image is None else {"image": self._keep_image(image) + (f"#page={page}" if page else "")}
                return self._save(kept | line)
            except OSError as error:
                raise RelookError(f"{self.path.name}: cannot be written ({error.strerror}); make room first") from error

    def _save(self, line: dict[str, Any]) -> tuple[int, str]:
        if self._state() != self._seen:  # somebody has edited it
            self._read()
        asked = _asked(line)
        number = self._numbers.get(asked, len(self.lines))
        if number == len(self.lines):
            self._append(line)
            self._numbers[asked] = number
            return number + 1, "new"
        if line == self.lines[number]:
            return number + 1, "same"
        self._write([*self.lines[:number], line, *self.lines[number + 1 :]])
        return number + 1, "corrected"

    def _state(self) -> tuple[int, int]:
        state = self.path.stat()
        return state.st_size, state.st_mtime_ns

    def _read(self) -> None:
        self._seen = self._state()
        data, lines = self.path.read_bytes(), read_lines(self.path)
        unread = len([line for line in data.splitlines() if line.strip()]) - len(lines)
        begun = lines or data.startswith(b'{"image": ')
        cut = bool(begun) and not data.endswith(b"\n")  # where a process that was writing has ended
        if unread > cut or not all(isinstance(line, dict) and "question" in line for line in lines):
            raise UserError(f"{self.path}: not a file of questions, a JSON object a line; give another place")
        self.lines, self._numbers = lines, {_asked(line): number for number, line in enumerate(lines)}
        if unread:
            self._write(lines)

    def _append(self, line: dict[str, Any]) -> None:
        try:
            append_lines(self.path, [line])
        except OSError:
            os.truncate(self.path, self._seen[0])
            raise
        self.lines, self._seen = [*self.lines, line], self._state()

    def _write(self, lines: list[dict[str, Any]]) -> None:
        with replacing_file(self.path.resolve()) as aside:  # what a link leads to
            append_lines(aside, lines)
        self.lines, self._seen = lines, self._state()

    def check(self, line: dict[str, Any]) -> None:
        """Refuse texts that `relook data build` would leave out."""
        build_item(Question.from_dict(line | {"image": "sent", "bboxs": []}, self.path.name), BuildOptions("none"))

    def _keep_image(self, data: bytes) -> str:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            name = write_image(data, image, self.path.with_name(f"{self.path.stem}_images"))
        with (self.path.parent / name).open("r+b") as file:
            os.fsync(file.fileno())
        return name

    # -- the queue

    def start(self, server: Server) -> None:
        """Ask the queue in the background, while the engine takes requests."""
        self._asking = threading.Thread(target=self._ask, args=(server,), name="relook queue", daemon=True)
        self._asking.start()

    def _ask(self, server: Server) -> None:
        for each in self.queue:
            if not self.is_saved(each):
                try:
                    each.ask(server)
                except seam.EngineClosed:
                    return

    def is_saved(self, each: Queued) -> bool:
        return _asked({"image": each.name, "question": each.question.text}) in self._numbers

    def entry(self, number: int) -> Queued:
        """A question of the queue by its number, from 1."""
        if not 1 <= number <= len(self.queue):
            raise BadField("number", f"question {number} is not in the queue, which has {len(self.queue)}")
        return self.queue[number - 1]

    def next(self, skipped: list[int]) -> int | None:
        """The number of the question to answer now: of those asked the one the model was least sure of, else the first.

        None where the others are saved, skipped, or could not be asked.
        """
        left = [
            (each.reply is None, 2.0 if each.sure is None else each.sure, number)
            for number, each in enumerate(self.queue, 1)
            if number not in skipped and each.problem is None and not self.is_saved(each)
        ]
        return min(left)[-1] if left else None

    def state(self) -> dict[str, Any]:
        """How far it is."""
        problems = [f"question {n}: {each.problem}" for n, each in enumerate(self.queue, 1) if each.problem]
        asked, saved = [each for each in self.queue if each.reply], [each for each in self.queue if self.is_saved(each)]
        queue = {
            "total": len(self.queue),
            "asked": len(asked),
            "left": len(self.queue) - len({*asked, *saved}) - len(problems),
            "asking": self._asking is not None and self._asking.is_alive(),
            "saved": len(saved),
            "failed": len(problems),
            "problem": next(iter(problems), None),
        }
        return {"file": self.path.name, "lines": len(self.lines), "queue": queue if self.queue else None}


@contextmanager
def collecting(path: str | Path | None, queue: str | Path | None = None) -> Iterator[Collection | None]:
    """The collection at `path`, held for this process while the block runs; None for none."""
    if path is None:
        if queue is not None:
            raise UserError("--queue has questions to answer for --collect FILE; give that, too")
        yield None
        return
    with locked_file(path):
        yield Collection(path, queue)


def mount(app: FastAPI, server: Server, collection: Collection) -> None:
    """The routes of the page for a collection."""

    @app.get("/v1/collect")
    async def state() -> dict[str, Any]:
        """The file that answers go to, and how far the queue is."""
        return collection.state()

    @app.get("/v1/collect/next")
    def following(skip: Annotated[list[int], Query()] = []) -> dict[str, Any]:  # noqa: B006
        """The question to answer now, with the model's reply where there is one; `number` is null at the end."""
        while number := collection.next(skip):
            each = collection.entry(number)
            try:
                reply = each.shown()
            except UserError as error:  # its image has gone meanwhile
                each.problem = str(error)
                continue
            asked = {"question": each.question.text, "answers": each.question.answers, "bboxs": each.question.boxes}
            return {"number": number, **asked, "name": os.path.basename(each.name), "sure": each.sure, "reply": reply}
        return {"number": None}

    @app.get("/v1/collect/images/{number}", response_class=Response)
    def image(number: int) -> Response:
        """The image of a question of the queue, as a file that browsers show."""
        ref = collection.entry(number).question.image
        opened, kind = load_item_image(ref), None
        if os.path.isfile(ref):
            with reading(ref, ref) as file:
                kind = SHOWN.get(file.format or "")
        if kind:
            return Response(Path(ref).read_bytes(), media_type=kind)
        buffer = io.BytesIO()
        opened.save(buffer, format="PNG")
        return Response(buffer.getvalue(), media_type="image/png")

    @app.post("/v1/collect")
    async def save(body: Answered) -> dict[str, Any]:
        """Save a question with its answer and boxes, once: a second answer to the same question corrects the first."""
        server.settings.limits.check([body.question, body.answer], 0)
        line: dict[str, Any] = {"question": body.question.strip(), "answer": body.answer.strip(), "bboxs": body.bboxs}
        collection.check(line)
        data, number = None, None
        if body.number is not None and body.image is None:
            each = collection.entry(body.number)
            _check_boxes(body.bboxs, await to_thread.run_sync(image_size, each.question))
            line = {"image": each.name, **line, **each.kept(line)}
        elif body.image is not None and body.image.startswith("data:") and body.number is None:
            (opened,) = await load_images([body.image], server.settings.limits, server.settings.fetch)
            _check_boxes(body.bboxs, opened.size)
            url, page = split_page(body.image)
            data, number = await image_bytes(url, server.settings.fetch), page.number
        else:
            raise BadField("image", "image: expected a data URL, or the number of a question of the queue in its place")
        at, how = await to_thread.run_sync(collection.save, line, data, number)
        return {"line": at, "saved": how}

    collection.start(server)


def _asked(line: dict[str, Any]) -> tuple[str, str]:
    """What tells the line of a question from others: its image and its words, however they are written."""
    image, question = line.get("image"), line["question"]
    if isinstance(image, list) and len(image) == 1:
        (image,) = image
    if isinstance(image, str) and not image.startswith("data:"):
        image = os.path.normpath(image)
    return str(image), str(question).strip()


def _check_boxes(boxes: list[list[int]], size: tuple[int, int]) -> None:
    width, height = size
    for x1, y1, x2, y2 in boxes:
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise BadField("bboxs", f"box {x1}, {y1}, {x2}, {y2} is not inside the image of {width} x {height} pixels")
