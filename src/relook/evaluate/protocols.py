"""Protocols: how large an image is seen, how a token is chosen, how many items are asked. A protocol is a row.

`default` asks all items greedily, at the views of the checkpoint. `paper` is as published: the first 1000 items, images
of 512 pixels at most (`paper-224`: 224) made smaller by the nearest neighbour, a region widened by one cell, and
sampling at top-p 0.1, top-k 10, temperature 0.95, turns of at most 1024 tokens (LLaMA-Factory's default, with which
the published evaluation generated). Knows a processor's views and `ask`'s options; not tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from relook.errors import UserError
from relook.views import View

PAPER = {"do_sample": True, "top_p": 0.1, "top_k": 10, "temperature": 0.95}


@dataclass(frozen=True)
class Protocol:
    """One row. `n`: items of a task where nobody says otherwise (None: the task's own number); `view`: of every look
    through the model's own eyes, None for the checkpoint's; `options`: of `ask`; `tokens`: of a turn where nobody says
    otherwise (None: the task's own)."""

    name: str
    about: str
    n: int | None = None
    view: View | None = None
    margin: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    tokens: int | None = None

    @contextmanager
    def seen(self, processor: Any) -> Iterator[None]:
        """Within, the processor sees as the protocol says."""
        wanted: dict[str, Any] = {}
        if self.view is not None:
            wanted |= {"first_look": self.view, "second_look": self.view, "reencode_look": None}
        if self.margin is not None:
            wanted["region_margin"] = self.margin
        before = {name: getattr(processor, name) for name in wanted}
        try:
            for name, value in wanted.items():
                setattr(processor, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(processor, name, value)


PROTOCOLS: dict[str, Protocol] = {
    row.name: row
    for row in (
        Protocol("default", "greedy, all items, the checkpoint's own views"),
        Protocol("paper", "as published, images of at most 512 pixels", 1000, View(512, "nearest"), 1, PAPER, 1024),
        Protocol("paper-224", "as published, images of at most 224 pixels", 1000, View(224, "nearest"), 1, PAPER, 1024),
    )
}


def find_protocol(name: str) -> Protocol:
    """The row of that name.

    Raises:
        UserError: no such row.
    """
    if name not in PROTOCOLS:
        raise UserError(f"protocol {name!r} is unknown; expected one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
