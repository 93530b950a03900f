"""The queue of a collection: questions of any form of data, and what the model answers to them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relook.data.build import BuildOptions, BuildReport, build_item, things
from relook.data.forms import Found, Source
from relook.data.items import Item, LeftOut, Question, column, item_question
from relook.data.reader import folder_of, readable
from relook.errors import RelookError, UserError
from relook.looks import without_triggers
from relook.options import AskOptions
from relook.perceive import engine as seam
from relook.serve.completions import Reply, png_url
from relook.serve.types import ChatRequest
from relook.trace import Answer, Finished
from relook.views import existing_ref, load_item_image

if TYPE_CHECKING:
    from relook.serve.app import Server


@dataclass(eq=False)
class Queued:
    """A question of the queue.

    Attributes:
        question: its image can be opened; no `answers` where the file has none.
        name: of the image, from the folder of the collection.
        reply: the model's, as a `chat.completion` without pictures; None: not asked yet.
        sure: probability of its answer's text; None where an engine names none.
        problem: why it could not be asked.
    """

    question: Question
    name: str
    reply: dict[str, Any] | None = None
    sure: float | None = None
    problem: str | None = None

    def ask(self, server: Server) -> None:
        """Let the model answer. Raises EngineClosed."""
        try:
            image = load_item_image(self.question.image)
            options = AskOptions.of({"max_new_tokens": server.settings.max_tokens})
            answer = _answer(server.engine, seam.Request(self.question.text, (image,), options, logprobs=0))
        except seam.EngineClosed:
            raise
        except RelookError as error:
            self.problem = str(error)
            return
        logprobs = [token.logprob for token in answer.tokens]
        self.sure = math.exp(sum(logprobs)) if logprobs else None if answer.text else 0.0
        body = ChatRequest.model_validate({"messages": [{"role": "user", "content": self.question.text}]})
        reply = Reply(body, server.name).whole(answer)
        for look in reply["relook"]["looks"]:  # which would fill the memory
            look |= {"crop": None, "map": None, "attention": None}
        self.reply = reply

    def kept(self, line: dict[str, Any]) -> dict[str, Any]:
        """What a line about it keeps of it: its field, and the other accepted answers where the answer is one."""
        if line["question"] != self.question.text:
            return {}
        known, answer = self.question.answers, line["answer"]
        others = [each for each in known if each != answer]
        kept = {"answer": [answer, *others]} if others and answer in known else {}
        return kept | ({} if self.question.field is None else {"field": self.question.field})

    def shown(self) -> dict[str, Any] | None:
        """The reply, with the crops of its regions."""
        if self.reply is None:
            return None
        image, looks = load_item_image(self.question.image), self.reply["relook"]["looks"]
        looks = [look | {"crop": png_url(image.crop(look["box"]))} if look["cells"] else look for look in looks]
        return self.reply | {"relook": self.reply["relook"] | {"looks": looks}}


def read_queue(path: Path, beside: Path, report: BuildReport) -> Iterator[Queued]:
    """The questions of a file of any form; images of datasets are written beside the collection."""
    source, here = Source(path), beside.parent
    root = here if source.form.name == "hub" else folder_of(source.path)
    one_folder = os.path.realpath(root) == os.path.realpath(here)
    for thing in (_questions if source.form.name == "questions" else things)(source, beside, report):
        name = thing.image if isinstance(thing, Question) else next(iter(thing.images["images"]), None)
        placed = thing.under(root)
        question = item_question(placed) if isinstance(placed, Item) else placed
        if question is None or not isinstance(name, str):
            continue
        if isinstance(question.image, str) and existing_ref(question.image)[1] is not None:
            report.left_out.append(f"{question.where}: {name} is a part of an image; give the whole image")
            continue
        question = replace(question, text=without_triggers(question.text))  # the sentences that a build adds
        try:
            question = question.in_pixels(source.fit)
            build_item(replace(question, answers=question.answers or ("?",)), BuildOptions("none"))
        except UserError as error:
            report.left_out.append(str(error))
            continue
        moved = not (one_folder or os.path.isabs(name) or name.startswith("data:"))
        yield Queued(question, os.path.relpath(question.image, here) if moved else name)
    source.fit.refuse(path)  # boxes that are not in pixels


def _questions(source: Source, beside: Path, report: BuildReport) -> Iterator[Found]:
    """As `things`, of records that need no answer."""
    for record in map(readable, source.scan()):
        without = column(record.value, "answer", {}) is None
        try:
            thing = source.thing(replace(record, value={**record.value, "answer": "?"}) if without else record)
        except LeftOut as error:
            report.left_out.append(str(error))
            continue
        yield replace(thing, answers=()) if without and isinstance(thing, Question) else thing


def _answer(engine: seam.Engine, request: seam.Request) -> Answer:
    while True:
        try:
            for event in engine.submit(request):
                if isinstance(event, Finished):
                    return event.answer
            raise RelookError("the engine ended without an answer")
        except seam.EngineBusy as busy:
            time.sleep(busy.retry_after)
