"""Second looks for transformers' own ways in: `model.generate` and `pipeline("image-text-to-text")`.

inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt", ...)
ids = model.generate(**inputs, custom_generate=LookAgain(processor, images))

pipe = pipeline("image-text-to-text", model=..., pipeline_class=LookPipeline)
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import ImageTextToTextPipeline
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria
from transformers.utils.chat_template_utils import Chat

from relook.errors import UserError
from relook.options import AskOptions
from relook.processing.processor import opened
from relook.trace import Answer, Finished

from .loop import run
from .row import Row, image_runs
from .vlm import VLM

NOT_FOLLOWED = (
    *("streamer", "past_key_values", "inputs_embeds", "assistant_model", "prompt_lookup_num_tokens", "stop_strings"),
    *("prefill_chunk_size", "output_scores", "output_logits", "output_hidden_states", "output_attentions"),
)


class LookAgain:
    """The decoding loop with looks, for `generate(..., custom_generate=...)`.

    `generate` then returns the prompt and the answer after the last look; the looks are in `answers`. They see the
    original images, which a processor's tensors do not hold: these are given here.

    Args:
        processor: the model's.
        images: of the prompts, as they were given to the processor, in the order of their pads.
        options: of `relook.options.AskOptions`, such as `look="none"`, `max_looks` or `constrain`.

    Attributes:
        answers: one `Answer` for each sequence of the last call.
    """

    def __init__(self, processor: Any, images: Any, **options: Any):
        self.processor, self.images, self.options = processor, opened(images), options
        self.answers: list[Answer] = []

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = (),
        generation_config: Any = None,
        **prepared: Any,
    ) -> Any:
        """Called by `generate` with (B, L) ids, padded on the left; returns (B, L + the longest answer)."""
        self.check_arguments(vars(generation_config))
        for criterion in stopping_criteria:
            if not isinstance(criterion, (MaxLengthCriteria, EosTokenCriteria)):
                raise UserError(f"{type(criterion).__name__} is not followed over looks; leave it out of generate")
        vlm = VLM(model, self.processor)
        vlm.logits_processors, vlm.sampling, ends = logits_processor, {}, generation_config.eos_token_id
        vlm.vocabulary.ends |= {ends} if isinstance(ends, int) else set(ends or ())
        room, drawn = generation_config.max_length - input_ids.shape[1], generation_config.do_sample
        real = prepared.get("attention_mask")
        real = torch.ones_like(input_ids) if real is None else real
        rows, images, copies = list[Row](), iter(self.images), generation_config.num_return_sequences or 1
        for ids, mask in zip(input_ids[::copies], real[::copies], strict=True):
            prompt = ids[mask.bool()].tolist()
            shown = list(islice(images, len(image_runs(vlm, prompt))))
            for _ in range(copies):
                seed = {"seed": int(torch.randint(2**62, ()))} if drawn else {}
                options = AskOptions.of({"max_new_tokens": room, "do_sample": drawn, **seed, **self.options})
                rows.append(Row(vlm, vlm._begin(), vlm._fitted(options)).go_on(prompt, shown))
        if any(True for _ in images):
            raise UserError(
                f"LookAgain has {len(self.images)} images, more than the prompts; give those of the prompts"
            )
        done = {i: event.answer for i, event in run(vlm, rows) if isinstance(event, Finished)}
        self.answers = [done[i] for i in range(len(rows))]
        answered = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row.answer_ids) for row in rows],
            batch_first=True,
            padding_value=self.processor.tokenizer.pad_token_id,
        )
        sequences: Any = torch.cat([input_ids, answered.to(input_ids)], dim=1)
        as_dict = generation_config.return_dict_in_generate
        return GenerateDecoderOnlyOutput(sequences=sequences) if as_dict else sequences

    def check_arguments(self, given: Mapping[str, Any]) -> None:
        """Refuse arguments of `generate` that the loop does not follow."""
        for name in NOT_FOLLOWED:
            if given.get(name) is not None and given[name] is not False:
                raise UserError(
                    f"{name} is not followed over looks; leave it out of generate (or use relook.VLM.stream)"
                )


class LookPipeline(ImageTextToTextPipeline):
    """`pipeline("image-text-to-text", ..., pipeline_class=LookPipeline)`: transformers' pipeline, with looks.

    Called like transformers' own; images are opened by relook's opener.
    """

    processor: Any

    def preprocess(self, inputs=None, timeout=None, continue_final_message=None, **kwargs):  # type: ignore[override]
        images: list[Any] = []
        if isinstance(inputs, Chat):
            chats, _ = self.processor._normalize_conversations(inputs.messages)
            images = opened(self.processor._multimodal_inputs_from_conversations(chats, {})[0])
            kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), "images": images}
        elif isinstance(inputs, dict):
            images = opened(inputs["images"])
            inputs = {**inputs, "images": images}
        out: Any = super().preprocess(inputs, timeout, continue_final_message, **kwargs)
        out["shown"] = images
        return out

    def _forward(self, model_inputs, generate_kwargs=None):  # type: ignore[override]
        looking = LookAgain(self.processor, model_inputs.pop("shown"))
        return super()._forward(model_inputs, {**(generate_kwargs or {}), "custom_generate": looking})
