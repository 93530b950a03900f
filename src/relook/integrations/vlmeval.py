"""Adapter to VLMEvalKit:

    python -m relook.integrations.vlmeval --config config.json --work-dir out

This runs VLMEvalKit's own `run.py` with all of its options; the config names the model as
`{"model": {"mine": {"class": "Relook", "model": "receipts-tiny", "look": "auto"}}, "data": {...}}`. Written for
ms-vlmeval 0.0.20 (VLMEvalKit's name on the package index): a subclass of its `BaseModel`, whose messages are lists of
{"type": "text" or "image", "value": text or path}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmeval.vlm.base import BaseModel

from relook.errors import UserError
from relook.integrations.answering import Answering


class Relook(BaseModel):
    """A relook model; arguments are those of `Answering`, and `max_new_tokens`.

    All images of a message precede its text, whatever their order in the message.
    """

    INTERLEAVE = False
    allowed_types = ["text", "image"]

    def __init__(self, model: str, max_new_tokens: int = 128, **options: Any) -> None:
        super().__init__()
        self.own = {"max_new_tokens": max_new_tokens}
        self.answering = Answering(model, batch=1, **options)

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """Answer one message."""
        images = [part["value"] for part in message if part["type"] == "image"]
        texts = [part["value"] for part in message if part["type"] == "text"]
        if not images:
            raise UserError(
                f"a question of {dataset or 'the dataset'} has no image; relook's models answer about images"
            )
        return self.answering.texts([(images, "\n".join(texts), self.own)])[0]


def register() -> None:
    """Register the class with VLMEvalKit as "Relook", for configs that name it."""
    import vlmeval.vlm

    vlmeval.vlm.Relook = Relook


def main() -> None:
    from vlmeval import run

    register()
    run.load_env()
    run.main()


if __name__ == "__main__":
    main()
