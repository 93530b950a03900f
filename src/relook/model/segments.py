"""The one-pass forward over a batch with re-encoding calls: segment by segment over one growing cache.

By causality the hidden state of a control token depends only on what stands before it. So every row is cut right before
each of its action tokens; segment by segment the rows run through the language model, the state at the end of a segment
conditions the look it asks for (`inject_condition`), and the rest continues from the same keys and values: no position
runs twice.

Legend for shapes: B rows, L columns of the batch, S columns of one segment, N tokens of one image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import DynamicCache

from relook.errors import UserError

from .configuration import ReencodeIds
from .decoder import gather_columns, put_columns, run_decoder
from .packed import Packed


@dataclass(frozen=True)
class CallSite:
    """A written re-encoding call: `*_action_start` at (row, start), `*_action` at (row, start + 1).

    `order` counts the calls of its conversation from the left, over all looks; `conversation` is its number in the row
    (0 unless the row is packed, see `packed`).
    """

    look: str
    row: int
    start: int
    order: int
    conversation: int = 0


@dataclass(frozen=True)
class ImageSpan:
    """The image tokens of one re-encoded image: columns (N,) of `row`, conditioned by `call` (None: by nothing)."""

    look: str
    image: int
    row: int
    columns: Tensor
    call: CallSite | None


@dataclass(frozen=True)
class Segment:
    """One segment of every row that can run through the language model at once.

    columns (B, S): column of the batch that each place takes (padding repeats column 0); real (B, S): which are tokens.
    """

    columns: Tensor
    real: Tensor

    @classmethod
    def of(cls, chosen: Tensor) -> Segment:
        """The columns where `chosen` (B, L) holds, from the left, padded on the right."""
        lengths = chosen.sum(1)
        width = max(1, int(lengths.max()))
        real = torch.arange(width, device=chosen.device) < lengths[:, None]
        return cls((~chosen).int().argsort(dim=1, stable=True)[:, :width] * real, real)


def find_calls(
    input_ids: Tensor, ids: Mapping[str, ReencodeIds], conversations: Tensor | None = None
) -> list[CallSite]:
    """All complete calls (start followed by its action token), left to right in each row.

    `conversations` (B, L) numbers the conversations of packed rows; None where each row holds one.

    Example: a row `... <|clip_action_start|> <|clip_action|> <|clip_action_end|> ...` with start at column 28 gives
    CallSite("clip", row, 28, 0).
    """
    found: list[tuple[int, int, str]] = []
    for look, token in ids.items():
        at = (input_ids[:, :-1] == token.start) & (input_ids[:, 1:] == token.action)
        found += [(row, column, look) for row, column in at.nonzero().tolist()]
    calls: list[CallSite] = []
    seen: Counter[tuple[int, int]] = Counter()
    for row, column, look in sorted(found):
        number = 0 if conversations is None else int(conversations[row, column])
        calls.append(CallSite(look, row, column, seen[row, number], number))
        seen[row, number] += 1
    return calls


def find_image_spans(
    input_ids: Tensor,
    look: str,
    pad: int,
    lengths: Sequence[int],
    calls: Sequence[CallSite],
    conversations: Tensor | None = None,
) -> list[ImageSpan]:
    """Cut the pads of one look into images, row-major, and give each the call it answers.

    A span is conditioned by the latest call of its kind to its left in its conversation, if there is one.

    Raises:
        UserError: tokens and features disagree in number, or an image would straddle two rows.
    """
    places = (input_ids == pad).nonzero()  # (total, 2) row-major
    if len(places) != sum(lengths):
        raise UserError(
            f"{look}: the text holds {len(places)} image tokens but the images make {sum(lengths)} features "
            f"({len(lengths)} images); give each placeholder exactly one image"
        )
    spans = []
    for image, part in enumerate(places.split(list(lengths))):
        row, column = part[0].tolist()
        if int(part[-1, 0]) != row:
            raise UserError(f"{look}: image {image} would straddle rows {row} and {int(part[-1, 0])} of the batch")
        number = 0 if conversations is None else int(conversations[row, column])
        before = [c for c in calls if (c.look, c.row, c.conversation) == (look, row, number) and c.start < column]
        spans.append(ImageSpan(look, image, row, part[:, 1], before[-1] if before else None))
    return spans


# -- mask modelling ---------------------------------------------------------------------------------------------------


def paragraph_mask(input_ids: Tensor, start_id: int, end_id: int, number: int) -> Tensor:
    """(B, L) bool: columns strictly between the `<|im_start|>` and `<|im_end|>` of the numbered turn (system = 0)."""
    starts, ends = input_ids == start_id, input_ids == end_id
    opened = starts.cumsum(1)
    inside = (opened > number) & ~(starts & (opened == number + 1)) & (ends.cumsum(1) <= number)
    return inside & (ends.sum(1, keepdim=True) > number)


def masked_columns(config: Any, input_ids: Tensor, batch: SegmentedBatch, modes: Tensor | None) -> Tensor | None:
    """Mask modelling: the input embeddings (B, L) that are zeroed once the conditions are known; None for none.

    Args:
        config: with `para_mask_id`, `para_mask_ratio`, `para_mask_draw`, `para_start_id`, `para_end_id`.
        modes: (n,) mask mode 0, 1 or 2 of each conversation, row-major. Where it is None, the config's mode is drawn,
            once for the batch (as published) or for each conversation. Conversations without a call are never masked.
    """
    packed = batch.packed
    if modes is None and config.para_mask_id == 0:
        return None
    ids = input_ids if packed is None else packed.unpack(input_ids, -1)
    if modes is None:
        draws = torch.rand(len(ids) if config.para_mask_draw == "sample" else 1)
        modes = torch.where(draws < config.para_mask_ratio, config.para_mask_id, 0).expand(len(ids))
    called = torch.zeros(len(ids), dtype=torch.bool)
    called[[c.row if packed is None else packed.index(c.row, c.conversation) for c in batch.calls]] = True
    modes = torch.where(called, modes.cpu(), 0).to(ids.device)[:, None]
    if not modes.any():
        return None
    hidden = [paragraph_mask(ids, config.para_start_id, config.para_end_id, turn) for turn in (1, 3)]
    mask = ((modes >= 1) & hidden[0]) | ((modes == 2) & hidden[1])
    return mask if packed is None else packed.repack(mask)


# -- equally many forwards on every rank, where ranks hold a part of each weight (FSDP, ZeRO) --------------------------

_SYNCHRONISED: ContextVar[bool] = ContextVar("ranks_synchronised", default=False)


@contextmanager
def synchronised_ranks(enabled: bool = True) -> Iterator[None]:
    """Within, every forward runs an equal number of segments on all ranks.

    A layer's weights are gathered when it runs, by all ranks at once. Looks break that: a batch with two looks a row
    runs the layers three times, one without runs them once, and a projector that one rank needs another does not. So
    ranks agree on the most calls of a conversation and run the missing segments on a column of padding, and every
    conditionally used weight is added, times zero, on all of them. Losses and gradients stay as they are; only that of
    a weight that no rank uses is zero instead of None (an optimizer's momentum then moves it).
    """
    token = _SYNCHRONISED.set(enabled)
    try:
        yield
    finally:
        _SYNCHRONISED.reset(token)


def ranks_synchronised() -> bool:
    """Whether `synchronised_ranks` is in force."""
    return _SYNCHRONISED.get()


def max_over_ranks(depth: int, device: torch.device) -> int:
    """The largest `depth` of all ranks."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return depth
    found = torch.tensor(depth, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return int(found)


def zero_of(parameters: Iterable[nn.Parameter]) -> Tensor:
    """A scalar zero with every trainable parameter in its graph.

    Computed first and added to the embeddings, it comes last in the backward pass: gradients are then ready in the same
    order on all ranks, in which ZeRO lays them out.
    """
    return sum((0 * parameter.sum() for parameter in parameters if parameter.requires_grad), torch.zeros(()))


# -- the forward ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SegmentedBatch:
    """One batch between embedding and language model.

    Attributes:
        inputs_embeds: (B, L, d), images without a condition merged in; wider with inner features (`run_decoder`).
        attention_mask: (B, past + L) or None; position_ids: (3, B, L).
        calls, spans: the calls in the batch, and the image spans of its looks.
        features: look -> the encoder's output for each of its images.
        states: (B, 2k, d) `look_states` before the batch; None where nothing is continued.
        packed: where rows hold several conversations, which columns belong together.
        depth: number of segments before the last: the most calls in one conversation, on any rank.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    packed: Packed | None
    calls: Sequence[CallSite]
    spans: Sequence[ImageSpan]
    features: dict[str, list[Tensor]]
    states: Tensor | None
    depth: int

    def full_inputs(self) -> dict[str, Any]:
        """attention_mask and position_ids for all columns in one pass."""
        if self.packed is not None:
            return self.packed.full_inputs(self.position_ids, self.inputs_embeds.dtype)
        return {"attention_mask": self.attention_mask, "position_ids": self.position_ids}

    def conversation_of(self, call: CallSite) -> Any:
        """(L,) whether each column of the call's row is of its conversation; True where the row holds only one."""
        return True if self.packed is None else self.packed.numbers[call.row] == call.conversation

    def segments(self, mask: Tensor) -> list[Segment]:
        """Cut every row right before the action token of each call; segment k holds part k of all conversations.

        The hidden state that conditions call k is then in segment k, and everything that depends on it (the action
        token's embedding, the second look) lies in later segments. The last part of every conversation is in the last
        segment, so those without a call only run there. Padding (`mask` (B, L) of 0) is in no segment.

        Example: a call starting at column 3 of row 0 of two rows of 10 gives
        [row 0: 0..3, row 1: nothing], [row 0: 4..9, row 1: 0..9].
        """
        columns = torch.arange(mask.shape[1], device=mask.device)
        part, last = torch.zeros_like(mask), torch.zeros_like(mask)
        for call in self.calls:
            own = self.conversation_of(call)
            part[call.row] += (columns > call.start) & own
            last[call.row] += torch.ones_like(columns) * own
        part = part.where(part != last, self.depth)
        return [Segment.of(mask.bool() & (part == number)) for number in range(self.depth + 1)]

    def prefixes(self, mask: Tensor, order: int) -> Segment:
        """All before the conditions of the calls numbered `order`: their conversations, up to the call's start.

        Example: as above, `order` 0 gives [row 0: 0..3, row 1: nothing].
        """
        columns = torch.arange(mask.shape[1], device=mask.device)
        chosen = torch.zeros_like(mask, dtype=torch.bool)
        for call in self.calls:
            if call.order == order:
                chosen[call.row] |= (columns <= call.start) & self.conversation_of(call)
        return Segment.of(chosen & mask.bool())

    def inject_condition(self, model: Any, embeds: Tensor, call: CallSite, state: Tensor) -> Tensor:
        """Embeddings (B, L, d) with the hidden state (d,) of one call injected: a new tensor.

        The state becomes the control token's input embedding and conditions the spans that answer the call.
        """
        embeds = put_columns(embeds, call.row, torch.tensor([call.start + 1], device=embeds.device), state[None])
        for span in self.spans:
            if span.call == call:
                tokens, _ = model.project(span.look, self.features[span.look][span.image], state)
                embeds = put_columns(embeds, span.row, span.columns, tokens)
        return embeds


class SegmentedForward:
    """Runs a batch segment by segment over one growing cache (`SegmentedBatch.segments`).

    Args:
        model: a `LookAgainMixin`: its language model runs, its `project` turns features into tokens.
        batch: what to run.
        run: keyword arguments of the language model, `past_key_values` and `use_cache` among them.
    """

    def __init__(self, model: Any, batch: SegmentedBatch, run: dict[str, Any]):
        self.model, self.batch = model, batch
        self.extra = {k: v for k, v in run.items() if k not in ("past_key_values", "use_cache")}
        given = run.get("past_key_values")
        if given is not None and not isinstance(given, DynamicCache):
            raise UserError(f"a look in the input needs a cache that grows (DynamicCache), got {type(given).__name__}")
        use_cache = run.get("use_cache")
        keep = model.config.get_text_config().use_cache if use_cache is None else use_cache  # as the base model does
        self.keep_cache = given is not None or keep
        self.cache = given if given is not None else DynamicCache()
        self.past = self.cache.get_seq_length()
        rows, length = batch.inputs_embeds.shape[:2]
        mask = batch.attention_mask
        if mask is None:
            mask = torch.ones(rows, self.past + length, dtype=torch.long, device=batch.inputs_embeds.device)
        if not isinstance(mask, Tensor) or mask.shape != (rows, self.past + length):
            seen = f"has shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
            raise UserError(
                f"attention_mask {seen}; where the input holds a look, a tensor of shape ({rows}, "
                f"{self.past + length}) is expected: rows, columns of cache and input"
            )
        self.mask = mask[:, self.past :].long()
        self.segments = batch.segments(self.mask)
        columns = torch.zeros(rows, self.past, dtype=torch.long, device=mask.device)
        self.cached = [Segment(columns, mask[:, : self.past].bool())]  # what the keys of the cache are

    def _run(self, segment: Segment, embeds: Tensor) -> Any:
        output = run_decoder(
            self.model,
            gather_columns(embeds, segment.columns),
            past_key_values=self.cache,
            use_cache=True,
            **self._inputs(segment, self.cached),
            **self.extra,
        )
        self.cached.append(segment)
        return output

    def _inputs(self, segment: Segment, before: Sequence[Segment]) -> dict[str, Any]:
        """attention_mask and position_ids of a segment that attends to those before, and to itself."""
        positions = self.batch.position_ids.gather(2, segment.columns.expand(3, -1, -1))
        real = [each.real for each in before]
        if self.batch.packed is not None:
            columns = torch.cat([*(each.columns for each in before), segment.columns], dim=1)
            real_keys, dtype = torch.cat([*real, segment.real], dim=1), self.batch.inputs_embeds.dtype
            return self.batch.packed.inputs(positions, dtype, segment.columns, segment.real, columns, real_keys)
        # A row without tokens in this segment would have nothing to attend to: here its padding attends to itself.
        here = segment.real | ~segment.real.any(dim=1, keepdim=True)
        return {"attention_mask": torch.cat([*real, here], dim=1).long(), "position_ids": positions}

    def _inject_all(self, order: int, segment: Segment, states: Tensor, embeds: Tensor) -> Tensor:
        """The conditions of the calls numbered `order`, whose states (B, S, d) are the segment's, injected."""
        calls = [call for call in self.batch.calls if call.order == order]
        for call in calls:
            at = (segment.real[call.row] & (segment.columns[call.row] == call.start)).nonzero()
            embeds = self.batch.inject_condition(self.model, embeds, call, states[call.row, int(at)])
        if not calls and order < self.batch.depth:  # a segment that other ranks need: keep it in the graph here, too
            embeds = embeds + 0 * states.sum()
        return embeds

    def run_segments(self, segments: Sequence[Segment]) -> tuple[Tensor, list[Any]]:
        """The embeddings with the conditions that these segments give injected, and the language model's outputs."""
        embeds, outputs = self.batch.inputs_embeds, []
        for order, segment in enumerate(segments):
            outputs.append(self._run(segment, embeds))
            embeds = self._inject_all(order, segment, outputs[-1].last_hidden_state, embeds)
        return embeds, outputs

    def run_prefixes(self) -> Tensor:
        """All conditions injected without continuing a cache: before each call its whole prefix runs again."""
        embeds = self.batch.inputs_embeds
        for order in range(self.batch.depth):
            segment = self.batch.prefixes(self.mask, order)
            states = run_decoder(
                self.model,
                gather_columns(embeds, segment.columns),
                use_cache=False,
                **self._inputs(segment, []),
            ).last_hidden_state
            embeds = self._inject_all(order, segment, states, embeds)
        return embeds

    def run(self) -> Any:
        """All segments; hidden states (and the cache, where it is kept) come back in the batch's own column order."""
        _, outputs = self.run_segments(self.segments)
        order, last = self._order(), outputs[-1]
        last.last_hidden_state = _restore([o.last_hidden_state for o in outputs], order)
        if last.hidden_states is not None:
            layers = zip(*(o.hidden_states for o in outputs), strict=True)
            last.hidden_states = tuple(_restore(layer, order) for layer in layers)
        if last.attentions is not None:
            maps = zip(*(o.attentions for o in outputs), strict=True)
            last.attentions = tuple(self._restore_map(layer, order) for layer in maps)
        last.past_key_values = self._restore_cache(order) if self.keep_cache else None
        return last

    def _order(self) -> Tensor:
        """(B, L): for each column of the batch, its place in the concatenated segments; -1 for padding."""
        columns = torch.cat([w.columns for w in self.segments], dim=1)
        row, place = torch.cat([w.real for w in self.segments], dim=1).nonzero(as_tuple=True)
        order = torch.full_like(self.mask, -1)
        order[row, columns[row, place]] = place
        return order

    def _keys(self, order: Tensor) -> Tensor:
        """(B, past + L): the place in the cache of every column before and in the batch."""
        before = torch.arange(self.past, device=order.device).expand(len(order), -1)
        return torch.cat([before, order.clamp(min=0) + self.past], dim=1)

    def _restore_cache(self, order: Tensor) -> DynamicCache:
        index = self._keys(order)[:, None, :, None]
        layers: Any = self.cache.layers
        for layer in layers:
            at = index.to(layer.keys.device).expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys, layer.values = layer.keys.gather(2, at), layer.values.gather(2, at)
        return self.cache

    def _restore_map(self, parts: Sequence[Tensor], order: Tensor) -> Tensor:
        """Attention maps of all segments (B, heads, S, keys so far) -> (B, heads, L, past + L), zero for padding."""
        width, heads = parts[-1].shape[-1], parts[-1].shape[1]
        whole = torch.cat([nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts], dim=2)
        whole = whole.gather(2, order.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, width))
        whole = whole.gather(3, self._keys(order)[:, None, None].expand(-1, heads, order.shape[1], -1))
        real = torch.cat([self.cached[0].real, order >= 0], dim=1)
        return whole * (order >= 0)[:, None, :, None] * real[:, None, None]


def _restore(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    """Hidden states of all segments (B, S, d) -> (B, L, d), zero in padding."""
    return gather_columns(torch.cat(list(parts), dim=1), order.clamp(min=0)) * (order >= 0).unsqueeze(-1)
