"""Second looks for transformers' own ways in: `model.generate` and `pipeline("image-text-to-text")`.

inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt", ...)
ids = model.generate(**inputs, custom_generate=LookAgain(processor, images))

pipe = pipeline("image-text-to-text", model=..., pipeline_class=LookPipeline)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ImageTextToTextPipeline
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria
from transformers.utils.chat_template_utils import Chat

from relook.errors import UserError
from relook.looks import ANSWER_PREFIX, IM_START, IMAGE_PAD, LOOKS, VISION_START, parse_calls
from relook.options import AskOptions
from relook.processing.processor import opened
from relook.processing.turns import pad_stages
from relook.regions import Cells
from relook.trace import Answer, Finished, Turn

from .engine import Request
from .loop import run
from .row import Row
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
        rows, images, copies = list[PromptRow](), iter(self.images), generation_config.num_return_sequences or 1
        for ids, mask in zip(input_ids[::copies], real[::copies], strict=True):
            prompt = ids[mask.bool()].tolist()
            shown = list(islice(images, len(image_runs(vlm, prompt))))
            for _ in range(copies):
                seed = {"seed": int(torch.randint(2**62, ()))} if drawn else {}
                options = AskOptions.of({"max_new_tokens": room, "do_sample": drawn, **seed, **self.options})
                rows.append(
                    PromptRow(vlm, vlm._begin(), Request("", options=vlm._fitted(options))).go_on(prompt, shown)
                )
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


class PromptRow(Row):
    """A row that begins with a prompt in token ids."""

    def go_on(self, prompt: list[int], images: Sequence[Image.Image]) -> PromptRow:
        """Begin with a prompt in token ids, as `generate` takes it, and its images in the order of their pads.

        What follows the last header of the assistant is the beginning of its turn.
        """
        vocabulary, processor, conversation = self.vlm.vocabulary, self.vlm.processor, self.conversation
        runs, header = image_runs(self.vlm, prompt), processor.tokenizer.encode(f"{IM_START}assistant\n")
        last = len(prompt) - 1 - prompt[::-1].index(header[0]) if header[0] in prompt else 0
        cut = last + len(header) if prompt[last : last + len(header)] == header else len(prompt)
        texts = [(token, vocabulary.text_of(token)) for token, _ in groupby(prompt)]
        # plain text may spell a control token, which it is not
        plain = [text if token in vocabulary.hidden_ids else text.replace("<", "") for token, text in texts]
        stages = pad_stages(["".join(plain)])
        shown = self._first_views(images, stages)
        counts = [processor.pad_count("image", image.view.grid) for image in shown]
        if counts != [length for _, length in runs]:
            found = ", ".join(str(length) for _, length in runs) or "no"
            raise UserError(
                f"the prompt has {found} pads for its images, which make {', '.join(map(str, counts)) or 'none'}; "
                "give the images that the processor was given, in that order"
            )
        turn_of = [prompt[:at].count(vocabulary[IM_START]) for at, _ in runs]
        made, latest = (
            0,
            max((turn for turn, stage in zip(turn_of, stages, strict=True) if stage == "first"), default=None),
        )
        if latest is None:
            self._looks_left = 0
        else:
            self._aim(turn_of.index(latest), self.options.look_at)
            made = self._follow("".join(plain).split(IM_START))
        conversation.add(prompt[:cut], shown=[(at, image) for (at, _), image in zip(runs, shown, strict=True)])
        conversation.turns.append(Turn("user", processor.decode(prompt[:cut])))
        after_start = {token for spec in LOOKS.values() if spec.action for token in (spec.action, spec.end)}
        self._forced.extend(token for token in prompt[cut:] if vocabulary.text_of(token) not in after_start)
        self._prompted = len(prompt) - cut
        if not self._prompted and self._looks_left:
            self._force_look(made)
            self._force_given()
        self._write_forced()
        return self

    def _follow(self, turns: Sequence[str]) -> int:
        """Go on from the view that the turns of a prompt have shown last; the number of looks of the latest answer."""
        whole, made, calls = self._frame, 0, list[Cells]()
        for turn in turns if whole.nested else ():
            if turn.startswith("assistant"):
                calls = [call.cells for call in parse_calls(turn, whole.grid) if call.cells is not None]
            elif turn.startswith("user"):
                looked = bool(calls) and VISION_START in turn
                self._frame = self._frame.after([self._frame.shown(cells) for cells in calls]) if looked else whole
                made = made + 1 if looked else 0
        return made

    @property
    def answer_ids(self) -> list[int]:
        """The ids of the last turn, with its end; without a prompt's part of it and the prefix of published answers."""
        ids, decode = self._turn_ids[self._prompted :], self.vlm.processor.decode
        if not decode(ids).startswith(ANSWER_PREFIX):
            return ids
        return ids[next(n for n in range(len(ids)) if len(decode(ids[:n])) >= len(ANSWER_PREFIX)) :]


def image_runs(vlm: Any, ids: Sequence[int]) -> list[tuple[int, int]]:
    """(first pad, number of pads) of every image in a prompt. Raises UserError for re-encoded ones."""
    pads = {vlm.vocabulary.get(spec.pad): spec.pad for spec in LOOKS.values() if spec.reencodes}
    if other := next((pads[token] for token in ids if token in pads), None):
        raise UserError(f"the prompt holds {other}, a look taken before; go on with it by `VLM.chat`")
    starts = [i + 1 for i, token in enumerate(ids) if token == vlm.vocabulary[VISION_START]]
    image = vlm.vocabulary[IMAGE_PAD]
    return [(at, next((n for n, t in enumerate(ids[at:]) if t != image), len(ids) - at)) for at in starts]
