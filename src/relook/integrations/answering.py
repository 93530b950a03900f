"""What a harness wants of a model: texts for images and prompts. Looks are taken on the way and not handed on.

A harness passes options as words ("max_looks=2" on a command line), and prompts that may hold a placeholder for each
image. Knows `relook.load` and `VLM.ask_many`; refuses to know any harness.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from relook.errors import UserError
from relook.looks import ANSWER_PREFIX

PLACEHOLDERS = ("<image>", "<image 1>")  # harnesses write these into prompts; the images come first with us
OPTIONS = ("look", "max_looks", "constrain")  # of `VLM.ask`, for every question


class Answering:
    """A model with the options that all its answers share.

    Args:
        model: a name, folder or hub id for `relook.load`, or a loaded `VLM`.
        dtype, device: as `relook.load` takes them.
        batch: questions asked side by side.
        options: some of `OPTIONS`.

    Raises:
        UserError: another option, or what `relook.load` refuses.
    """

    def __init__(
        self, model: Any, dtype: str | None = None, device: str | None = None, batch: int | str = 8, **options: Any
    ) -> None:
        if unknown := options.keys() - set(OPTIONS):
            raise UserError(f"option {min(unknown)!r} is unknown; expected model, dtype, device, {', '.join(OPTIONS)}")
        self.options = {name: _read(value) for name, value in options.items()}
        self.batch = int(batch)
        if isinstance(model, str):
            import relook

            model = relook.load(model, dtype=dtype, device=device)
        self.vlm = model

    def texts(self, requests: Iterable[tuple[Sequence[Any], str, Mapping[str, Any]]]) -> list[str]:
        """The answer to each (images, prompt, options of `ask` of its own), in order.

        Raises:
            UserError: a prompt without an image, or what `VLM.ask` refuses.
        """
        asked = [{"image": list(images), "question": bare(prompt), **own} for images, prompt, own in requests]
        answers = self.vlm.ask_many(asked, batch_size=self.batch, **self.options)
        return [answer.text.removeprefix(ANSWER_PREFIX).strip() for answer in answers]


def bare(prompt: str) -> str:
    """A prompt without the placeholders of images.

    >>> bare("<image>\\nWhat is the total?")
    'What is the total?'
    """
    for placeholder in PLACEHOLDERS:
        prompt = prompt.replace(placeholder, "")
    return prompt.strip()


def _read(value: Any) -> Any:
    """An option as a command line has it: "2" -> 2, "False" -> False."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    return int(value) if value.isdigit() else value
