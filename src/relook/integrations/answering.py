"""Answers for an evaluation harness: texts from images and prompts, without the looks.

Harnesses pass options as strings ("max_looks=2" on a command line), and prompts that may contain a placeholder for each
image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from relook.looks import ANSWER_PREFIX
from relook.options import AskOptions

PLACEHOLDERS = ("<image>", "<image 1>")  # written into prompts by harnesses; relook puts images first


class Answering:
    """A model with fixed options for all its answers.

    Args:
        model: a name, folder or hub id for `relook.load`, or a loaded `VLM`.
        dtype, device: passed to `relook.load`.
        batch: batch size.
        options: of `ask` (`relook.options.AskOptions`).

    Raises:
        UserError: an unknown or wrong option, or an error of `relook.load`.
    """

    def __init__(
        self, model: Any, dtype: str | None = None, device: str | None = None, batch: int | str = 8, **options: Any
    ) -> None:
        given = {name: _read(value) for name, value in options.items()}
        self.options = AskOptions.of(given).model_dump(exclude_unset=True)
        self.batch = int(batch)
        if isinstance(model, str):
            import relook

            model = relook.load(model, dtype=dtype, device=device)
        self.vlm = model

    def texts(self, requests: Iterable[tuple[Sequence[Any], str, Mapping[str, Any]]]) -> list[str]:
        """Answer each (images, prompt, options of `ask` for this request), in order.

        Raises:
            UserError: a prompt without an image, or an error of `VLM.ask`.
        """
        asked = [{"image": list(images), "question": bare(prompt), **own} for images, prompt, own in requests]
        answers = self.vlm.ask_many(asked, batch_size=self.batch, **self.options)
        return [answer.text.removeprefix(ANSWER_PREFIX).strip() for answer in answers]


def bare(prompt: str) -> str:
    """Remove image placeholders from a prompt.

    >>> bare("<image>\\nWhat is the total?")
    'What is the total?'
    """
    for placeholder in PLACEHOLDERS:
        prompt = prompt.replace(placeholder, "")
    return prompt.strip()


def _read(value: Any) -> Any:
    """Parse an option from a command line: "2" -> 2, "False" -> False."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    return int(value) if value.isdigit() else value
