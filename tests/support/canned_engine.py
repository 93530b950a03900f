"""An engine that answers in words given beforehand, each token with the probability given for the question."""

from __future__ import annotations

import math
import threading

from relook.perceive import engine as seam
from relook.regions import cells_to_box
from relook.trace import Answer, Finished, Look, LookTaken, TextDelta, Token, Turn, Usage

CELLS = (2, 3, 4, 4)


class CannedEngine:
    """Answers "<question in capitals>" after a look at `CELLS`.

    Args:
        sure: probability of the answer to a question, by the question; None: no probabilities.
        silent: questions that are answered with nothing.
        busy: how many requests are refused before the first is taken.

    Attributes:
        asked: (question, size of the image, whether probabilities were asked for) of every request.
        gate: answers wait until it is set.
    """

    name, looks, domain, warnings, grid, context = "canned", ["region"], None, [], 8, None
    regions = {"region_of": "whole", "region_margin": 1, "max_looks": 1}

    def __init__(self, sure=None, silent=(), busy=0):
        self.sure, self.silent, self.busy = sure, silent, busy
        self.asked, self.gate, self.closed = [], threading.Event(), False
        self.gate.set()

    def submit(self, request, timeout=None):
        if self.closed:
            raise seam.EngineClosed("closed")
        if self.busy:
            self.busy -= 1
            raise seam.EngineBusy("busy", retry_after=0.01)
        running = seam.Running()
        (image,) = request.images
        self.asked.append((request.question, image.size, request.logprobs is not None))
        threading.Thread(target=self._answer, args=(request, image, running), daemon=True).start()
        return running

    def _answer(self, request, image, running):
        self.gate.wait(60)
        box = cells_to_box(CELLS, image.size)
        look = Look("region", CELLS, box, image.crop(box))
        text = "" if request.question in self.silent else request.question.upper()
        tokens = ()
        if self.sure is not None and text and request.logprobs is not None:
            tokens = tuple(Token(each, math.log(self.sure[request.question]) / len(text)) for each in text)
        running.put(LookTaken(look))
        if text:
            running.put(TextDelta(text, tokens))
        turns = [Turn("user", request.question), Turn("assistant", text, True)]
        usage = Usage(1, 1, 1, 1, {"decode": 0.25})
        running.put(
            Finished(Answer(text, [look], usage, turns, request.question, image, self.name, tokens=list(tokens)))
        )

    def stats(self):
        return {"rows": 0.0, "waiting": 0.0, "tokens_held": 0.0, "cache_bytes": 0.0}

    def close(self, drain=0):
        self.closed = True
