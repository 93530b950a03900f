"""What transformers' `generate` needs to know about looks. Nothing is kept on the model.

`generate` decodes one turn; the loop that answers a call and goes on is `relook.perceive`. Here: the token after a
`*_action_start` is forced, conditions travel from step to step in the model kwargs (`look_states`), positions are
computed from the ids each time, and per-row copies (`num_return_sequences`) repeat each row's images.

`look_states` (B, 2k, d) is what a cache does not hold of the calls in it: for each of the k conditioned looks, the
condition of its latest call, then the hidden state of its `*_action_start` where that is the last token; NaN where
there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerationMode

from relook.errors import UserError
from relook.processing.vocabulary import TENSORS

from .configuration import ReencodeIds
from .decoder import widen
from .segments import CallSite, find_calls

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


def states_after(
    hidden: Tensor, calls: Sequence[CallSite], before: Tensor | None, shown: Tensor, ids: Mapping[str, ReencodeIds]
) -> Tensor:
    """`look_states` at the end of an input, from its hidden states (B, L, d) and the states before it.

    `shown` (B, L) are its ids, negative where they are masked: a row ends at its last token that is not.
    """
    none = torch.full_like(hidden[:, 0], torch.nan)
    found = [none] * 2 * len(ids) if before is None else list(before.unbind(1))
    for call in calls:
        number, row = list(ids).index(call.look), torch.tensor([call.row], device=hidden.device)
        found[number] = found[number].index_copy(0, row, hidden[call.row, call.start][None])
    last = shown.shape[1] - 1 - (shown >= 0).flip(1).int().argmax(1, keepdim=True)  # (B, 1)
    state = hidden.gather(1, last[..., None].expand(-1, -1, hidden.shape[2]))[:, 0]
    for number, token in enumerate(ids.values(), start=len(ids)):
        found[number] = torch.where(shown.gather(1, last) == token.start, state, found[number])
    return torch.stack(found, dim=1)


def continue_call(
    embeds: Tensor, shown: Tensor, states: Tensor | None, ids: Mapping[str, ReencodeIds]
) -> tuple[Tensor, Tensor | None]:
    """A call whose `*_action_start` is the cache's last token and whose `*_action` is the first of the input.

    Args:
        embeds (B, L, d), shown (B, L): of the input; ids are negative where they are masked.

    Returns:
        embeds with the control token's replaced, and `look_states` with the condition of the call.

    Raises:
        UserError: no `states` for such a call.
    """
    real = shown >= 0
    place = real.int().argmax(1, keepdim=True)  # (B, 1), of each row's first token
    actions = torch.tensor([token.action for token in ids.values()], device=shown.device)
    acts = shown.gather(1, place) == actions  # (B, k)
    if states is None:
        if acts.any():
            raise UserError(
                "a look's action continues a cache, which does not hold the hidden state of its start: pass "
                "look_states of the output that the cache came with, or the whole conversation without a cache"
            )
        return embeds, None
    latest, started = states.to(embeds.dtype).chunk(2, dim=1)
    called = (acts & ~started.isnan().any(-1))[..., None]  # (B, k, 1), one look of a row at most
    state = torch.where(called, started, 0).sum(1, keepdim=True)  # (B, 1, d)
    here = torch.zeros_like(real).scatter(1, place, called.any(1))[..., None]
    open_still = torch.where(real.any(1)[:, None, None], torch.nan, started)  # of a row that is all padding
    embeds = torch.where(here, widen(state, embeds.shape[-1]), embeds)
    return embeds, torch.cat([torch.where(called, started, latest), open_still], dim=1)


def state_in_cache(look: str, row: int, states: Tensor | None, ids: Mapping[str, ReencodeIds]) -> Tensor | None:
    """The condition of an image whose call is not in the input: that of the latest call before, None without one."""
    if look not in ids:
        return None
    if states is None:
        raise UserError(
            f"the images of a {look} look continue a cache, which does not hold the condition of their call: pass "
            "look_states of the output that the cache came with, or the whole conversation without a cache"
        )
    state = states[row, list(ids).index(look)]
    return None if state.isnan().any() else state


class LookGenerationMixin:
    """Overrides of GenerationMixin; each calls up for everything that is not about looks."""

    config: Any
    _positions: Any
    _call_ids: Any

    def _extract_generation_mode_kwargs(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer):
        """A loop of one's own may check what transformers would drop without a word, such as the streamer."""
        if check := getattr(custom_generate, "check_arguments", None):
            check({**kwargs, "assistant_model": assistant_model, "streamer": streamer})
        return super()._extract_generation_mode_kwargs(  # type: ignore[misc]
            custom_generate, kwargs, synced_gpus, assistant_model, streamer
        )

    def _validate_generation_mode(self, generation_mode, *args, **kwargs):
        if self.config.reencodings and generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise UserError(
                f"{generation_mode.replace('_', ' ')} cannot follow looks (the condition of a call belongs to one "
                "continuation); decode greedily or by sampling, with num_beams=1"
            )
        super()._validate_generation_mode(generation_mode, *args, **kwargs)  # type: ignore[misc]

    def _get_logits_processor(self, generation_config, *args, logits_processor=None, **kwargs):
        tokens = [i for n in self.config.reencodings if (i := self.config.reencode_ids(n)) is not None]
        own = LogitsProcessorList([ForceAction(tokens)] if tokens else [])
        return super()._get_logits_processor(  # type: ignore[misc]
            generation_config, *args, logits_processor=LogitsProcessorList([*own, *(logits_processor or [])]), **kwargs
        )

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        looks = any(model_kwargs.get(name) is not None for name in LOOK_INPUTS)
        if generation_config.prefill_chunk_size is not None and (looks or find_calls(input_ids, self._call_ids())):
            raise UserError("prefill_chunk_size would cut a prompt that holds a look; leave it out")
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

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
        times = {name: model_kwargs[name] for name in self.config.base.position_inputs if name in model_kwargs}
        return self._positions(ids, model_kwargs.get("attention_mask"), *grids, **times)

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
