"""One pass over a batch whose rows stop to look: stretch by stretch over one growing cache.

By causality the hidden state of a control token depends only on what stands before it. So every row runs up to its
call, the look is spent (`model.spend`), and the rest continues from the same keys and values: no position runs twice.
It refuses to know token ids, images and losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from relook.errors import UserError

from .packed import Packed
from .splice import Block, CallSite, Wave, cut_into_waves, prefixes, take


@dataclass
class Job:
    """One batch with calls, between embedding and language model."""

    inputs_embeds: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    calls: Sequence[CallSite]
    blocks: Sequence[Block]
    features: dict[str, list[Tensor]]
    packed: Packed | None = None
    least: int = 0  # see `depth`

    @property
    def depth(self) -> int:
        """Largest number of calls in one conversation; `least`, where other processes have more (`lockstep`)."""
        return max(self.least, *(c.order + 1 for c in self.calls), 0)

    @property
    def numbers(self) -> Tensor | None:
        """(B, L) the conversation of each column, None where each row holds one."""
        return None if self.packed is None else self.packed.numbers

    def whole(self) -> dict[str, Any]:
        """attention_mask and position_ids for all columns in one pass."""
        if self.packed is not None:
            return self.packed.whole(self.position_ids, self.inputs_embeds.dtype)
        return {"attention_mask": self.attention_mask, "position_ids": self.position_ids}


class Waves:
    """Runs a job stretch by stretch over one growing cache (`splice.cut_into_waves`)."""

    def __init__(self, model: Any, job: Job, run: dict[str, Any]):
        self.model, self.job = model, job
        self.extra = {k: v for k, v in run.items() if k not in ("past_key_values", "use_cache")}
        given = run.get("past_key_values")
        if given is not None and not isinstance(given, DynamicCache):
            raise UserError(f"calls in the input need a DynamicCache to continue from, got {type(given).__name__}")
        self.keep_cache = given is not None or bool(run.get("use_cache"))
        self.cache = given if given is not None else DynamicCache()
        self.past = self.cache.get_seq_length()
        rows, length = job.inputs_embeds.shape[:2]
        mask = job.attention_mask
        if mask is None:
            mask = torch.ones(rows, self.past + length, dtype=torch.long, device=job.inputs_embeds.device)
        if mask.ndim != 2 or mask.shape[1] != self.past + length:
            raise UserError(f"attention_mask has shape {tuple(mask.shape)}; expected ({rows}, {self.past + length})")
        self.mask = mask[:, self.past :]
        self.seen = [mask[:, : self.past].bool()]
        self.columns = [torch.zeros(rows, self.past, dtype=torch.long, device=mask.device)]
        self.waves = cut_into_waves(self.mask, job.calls, job.numbers, job.depth)

    def _run(self, wave: Wave, embeds: Tensor) -> Any:
        self.columns.append(wave.columns)
        output = self.model.model.language_model(
            inputs_embeds=take(embeds, wave.columns),
            past_key_values=self.cache,
            use_cache=True,
            **self._arguments(wave, torch.cat(self.columns, dim=1), torch.cat([*self.seen, wave.real], dim=1)),
            **self.extra,
        )
        self.seen.append(wave.real)
        return output

    def _arguments(self, wave: Wave, columns: Tensor, seen: Tensor) -> dict[str, Any]:
        """attention_mask and position_ids of a wave; it can attend to `columns` (B, T), itself last, where `seen`."""
        positions = self.job.position_ids.gather(2, wave.columns.expand(3, -1, -1))
        if self.job.packed is not None:
            dtype = self.job.inputs_embeds.dtype
            return self.job.packed.arguments(positions, dtype, wave.columns, wave.real, columns, seen)
        # A row without tokens in this wave would have nothing to attend to: for this wave its padding sees itself.
        here = wave.real | ~wave.real.any(dim=1, keepdim=True)
        mask = torch.cat([seen[:, : seen.shape[1] - here.shape[1]], here], dim=1)
        return {"attention_mask": mask.long(), "position_ids": positions}

    def _look(self, order: int, wave: Wave, states: Tensor, embeds: Tensor) -> Tensor:
        calls = [call for call in self.job.calls if call.order == order]
        for call in calls:
            at = (wave.real[call.row] & (wave.columns[call.row] == call.start)).nonzero()
            embeds = self.model.spend(self.job, embeds, call, states[call.row, int(at)])
        if not calls and order < self.job.depth:  # a stretch that other processes need: backward runs it, too
            embeds = embeds + 0 * states.sum()
        return embeds

    def conditions(self) -> Tensor:
        """All waves but the last: the embeddings with every condition spent."""
        embeds = self.job.inputs_embeds
        for order, wave in enumerate(self.waves[:-1]):
            embeds = self._look(order, wave, self._run(wave, embeds).last_hidden_state, embeds)
        return embeds

    def conditions_apart(self) -> Tensor:
        """The same without a cache to continue: before each call, its whole prefix runs again."""
        embeds = self.job.inputs_embeds
        for order in range(self.job.depth):
            wave = prefixes(self.mask, self.job.calls, order, self.job.numbers)
            states = self.model.model.language_model(
                inputs_embeds=take(embeds, wave.columns),
                use_cache=False,
                **self._arguments(wave, wave.columns, wave.real),
            ).last_hidden_state
            embeds = self._look(order, wave, states, embeds)
        return embeds

    def run(self) -> Any:
        """All waves; hidden states (and the cache, where it is kept) come back in the batch's own column order."""
        embeds, outputs = self.job.inputs_embeds, []
        for order, wave in enumerate(self.waves):
            outputs.append(self._run(wave, embeds))
            embeds = self._look(order, wave, outputs[-1].last_hidden_state, embeds)
        last = outputs[-1]
        last.last_hidden_state = self._restore([o.last_hidden_state for o in outputs])
        if last.hidden_states is not None:
            last.hidden_states = tuple(
                self._restore(layer) for layer in zip(*(o.hidden_states for o in outputs), strict=True)
            )
        last.attentions = None  # attention maps of different waves have different widths; there is no honest whole
        last.past_key_values = self._restore_cache() if self.keep_cache else None
        return last

    def _order(self) -> Tensor:
        """(B, L): for each column of the batch, its place in the concatenated waves; -1 for padding."""
        rows, length = self.job.inputs_embeds.shape[:2]
        columns = torch.cat([w.columns for w in self.waves], dim=1)
        real = torch.cat([w.real for w in self.waves], dim=1)
        order = torch.full((rows, length), -1, device=columns.device)
        row, place = real.nonzero(as_tuple=True)
        order[row, columns[row, place]] = place
        return order

    def _restore(self, parts: Sequence[Tensor]) -> Tensor:
        order = self._order()
        return take(torch.cat(list(parts), dim=1), order.clamp(min=0)) * (order >= 0).unsqueeze(-1)

    def _restore_cache(self) -> DynamicCache:
        order = self._order().clamp(min=0) + self.past
        before = torch.arange(self.past, device=order.device).expand(len(order), -1)
        index = torch.cat([before, order], dim=1)[:, None, :, None]
        layers: Any = self.cache.layers
        for layer in layers:
            shape = (-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys = layer.keys.gather(2, index.expand(shape))
            layer.values = layer.values.gather(2, index.expand(shape))
        return self.cache
