"""Adapter to lmms-eval:

    python -m lmms_eval --model relook --model_args model=receipts-tiny,look=auto --tasks TASK --batch_size 8

lmms-eval finds it by the entry point `lmms_eval.models` when both are installed. Written for lmms-eval 0.7.3, as a
model of its "simple" kind, whose requests are (prompt, generation options, images of a document, its number, task,
split). Runs in a single process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmms_eval.api.model import lmms

from relook.errors import UserError
from relook.integrations.answering import Answering

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

SAMPLING = ("temperature", "top_p", "top_k")


def manifest() -> ModelManifest:
    """The manifest that lmms-eval loads through the entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("relook", simple_class_path=f"{__name__}.Relook")


class Relook(lmms):
    """A relook model. Model arguments: `model` (or `pretrained`), and those of `Answering`.

    Only generation is supported: the likelihood of a given answer depends on the looks taken, and so is undefined.
    """

    is_simple = True

    def __init__(
        self,
        model: str = "",
        pretrained: str = "",
        batch_size: int | str = 8,
        device: str | None = None,
        max_batch_size: int | None = None,  # lmms-eval passes it to every model
        **options: Any,
    ) -> None:
        super().__init__()
        if not (model or pretrained):
            raise UserError("no model was named; give --model_args model=NAME (a shipped one, a folder, a hub id)")
        self.answering = Answering(model or pretrained, device=device, batch=batch_size, **options)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer each request, cut at the first of its `until` strings."""
        asked = []
        for prompt, kwargs, doc_to_visual, number, task, split in (request.args for request in requests):
            images = doc_to_visual(self.task_dict[task][split][number])
            asked.append((images if isinstance(images, list) else [images], prompt, generation(kwargs)))
        texts = self.answering.texts(asked)
        done = []
        for text, request in zip(texts, requests, strict=True):
            prompt, kwargs = request.args[:2]
            done.append(cut(text, kwargs.get("until")))
            self.cache_hook.add_partial("generate_until", (prompt, kwargs), done[-1])
        return done

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "relook's models take looks while they answer, so the likelihood of a given answer is not defined; "
            "choose tasks whose output_type is generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("relook answers tasks of one round; choose tasks whose output_type is generate_until")


def generation(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Translate lmms-eval's generation options to those of `ask`; greedy unless it samples at a temperature over 0."""
    own: dict[str, Any] = {}
    if kwargs.get("max_new_tokens"):
        own["max_new_tokens"] = int(kwargs["max_new_tokens"])
    if kwargs.get("do_sample") and kwargs.get("temperature") != 0:
        own |= {"do_sample": True, **{name: kwargs[name] for name in SAMPLING if kwargs.get(name) is not None}}
    if (kwargs.get("num_beams") or 1) > 1:
        raise UserError(f"num_beams={kwargs['num_beams']}: relook has no beams; let the task ask for 1")
    return own


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """Cut a text at the first of the `until` strings that it contains.

    >>> cut("12.50\\n\\nThanks", ["\\n\\n"])
    '12.50'
    """
    for end in [until] if isinstance(until, str) else until or []:
        if end:
            text = text.split(end)[0]
    return text.strip()
