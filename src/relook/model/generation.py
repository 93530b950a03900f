"""What transformers' `generate` needs to know about looks. Nothing is kept on the model.

`generate` decodes one turn; the loop that answers a call and goes on is `relook.perceive`. Here: the token after a
`*_action_start` is forced, its condition travels from step to step in the model kwargs, positions are computed from the
ids each time, and per-row copies (`num_return_sequences`) repeat each row's images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from relook.errors import UserError
from relook.processing.vocabulary import TENSORS

from .configuration import ReencodeIds

LOOK_INPUTS = [name for look, names in TENSORS.items() if look != "image" for name in names]


class ForceAction(LogitsProcessor):
    """After `*_action_start` only `*_action` can follow (the published code overwrites the token there).

    Pads stand for images and are never written.
    """

    def __init__(self, tokens: list[ReencodeIds]):
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for token in self.tokens:
            forced = torch.full_like(scores, -torch.inf)
            forced[:, token.action] = 0
            scores = torch.where(input_ids[:, -1:] == token.start, forced, scores)
            scores[:, token.pad] = -torch.inf
        return scores


class LookGenerationMixin:
    """Overrides of GenerationMixin; each calls up for everything that is not about looks."""

    config: Any
    _positions: Any

    def _get_logits_processor(self, generation_config, *args, logits_processor=None, **kwargs):
        tokens = [i for n in self.config.reencodings if (i := self.config.reencode_ids(n)) is not None]
        if tokens and generation_config.num_beams and generation_config.num_beams > 1:
            raise UserError("beam search cannot follow looks (the condition belongs to one beam); use num_beams=1")
        own = LogitsProcessorList([ForceAction(tokens)] if tokens else [])
        return super()._get_logits_processor(  # type: ignore[misc]
            generation_config, *args, logits_processor=LogitsProcessorList([*own, *(logits_processor or [])]), **kwargs
        )

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        seen = LOOK_INPUTS if model_kwargs.get("use_cache", True) else ()  # without a cache all is read again
        return {**{k: v for k, v in model_kwargs.items() if k not in seen}, "look_states": outputs.look_states}

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """(3, B, L) for the whole conversation so far; the base model would keep offsets of the last call on itself."""
        ids = model_kwargs.get("input_ids")
        ids = inputs_tensor if ids is None or ids.shape[1] == 0 else ids
        if ids.is_floating_point():
            raise UserError(
                "generate from inputs_embeds needs position_ids: image places cannot be read from embeddings"
            )
        grids = (model_kwargs.get("image_grid_thw"), model_kwargs.get("video_grid_thw"))
        return self._positions(ids, model_kwargs.get("attention_mask"), *grids)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        looks = {k: model_kwargs.pop(k) for k in list(model_kwargs) if k in LOOK_INPUTS}
        repeated = self._repeat_look_images(looks, input_ids, expand_size) if expand_size > 1 else {}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **looks, **repeated}

    def _repeat_look_images(self, looks: dict[str, Any], input_ids: Tensor, times: int) -> dict[str, Any]:
        """Repeat every row's images `times` times, row by row, so that they stay in row-major order of the pads."""
        out = {}
        for look in self.config.reencodings:
            name, *grid_name = TENSORS[look]
            if looks.get(name) is None:
                continue
            # An image starts where its pad follows something else.
            pads = (input_ids == self.config.reencode_ids(look).pad).int()
            starts = (pads.diff(dim=1, prepend=torch.zeros_like(pads[:, :1])) == 1).sum(1).tolist()
            rows = torch.arange(sum(starts)).split(starts)
            order = torch.cat([row.repeat(times) for row in rows])
            sizes = looks[grid_name[0]].prod(-1).tolist() if grid_name else 1
            images = looks[name].split(sizes)
            out[name] = torch.cat([images[i] for i in order])
            out |= {key: looks[key][order] for key in grid_name}
        return out
