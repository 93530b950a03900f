"""One conversation: its tokens with their keys and values, its images, its turns.

A `Conversation` only grows. A question works on a copy (which shares all tensors), so a question that is abandoned
leaves the conversation as it was. `PendingTokens` are its last tokens: part of the text, not yet run through the
language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from relook.trace import Look, Turn

from .features import FeatureCache, ViewFeatures
from .kv_cache import KVRows


@dataclass(eq=False)
class ShownImage:
    """One image in a user turn: its view, the kind of encoding, and the look that it answers (None for a first look).

    `condition` (d,) is the hidden state of the control token, for re-encoding looks.
    """

    kind: str
    view: ViewFeatures
    look: Look | None = None
    condition: Tensor | None = None


@dataclass(eq=False)
class PendingTokens:
    """Tokens that are not yet run through the language model.

    Attributes:
        ids: token ids, in order.
        shown: (offset of the first pad in `ids`, image) of every image among them.
        states: (offset, (d,)) input embeddings in place of the token's own: control tokens' hidden states.
    """

    ids: list[int] = field(default_factory=list)
    shown: list[tuple[int, ShownImage]] = field(default_factory=list)
    states: list[tuple[int, Tensor]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(eq=False)
class Conversation:
    """Everything that a follow-up question needs.

    Attributes:
        ids, sampled: every token, and whether the model sampled it.
        pending: the last of `ids`, not yet run.
        kv: keys and values of the others, one row.
        position: the next token's position (M-RoPE: larger than the largest so far).
        images: the user's images, upright, original pixels.
        turns: the transcript.
        target: number of the image that looks go to.
    """

    features: FeatureCache
    kv: KVRows
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    pending: PendingTokens = field(default_factory=PendingTokens)
    position: int = 0
    images: list[Image.Image] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    target: int = 0

    @classmethod
    def begin(cls, processor: Any, device: torch.device | str) -> Conversation:
        """An empty conversation."""
        return cls(FeatureCache(processor), KVRows.empty(device=device))

    def copy(self) -> Conversation:
        """The same conversation, all of it run, to continue independently."""
        lists: dict[str, Any] = {n: list(getattr(self, n)) for n in ("ids", "sampled", "images", "turns")}
        features, kv = self.features.copy(), self.kv.copy()
        return replace(self, features=features, kv=kv, pending=PendingTokens(), **lists)

    def add(self, ids: Sequence[int], sampled: bool = False) -> None:
        """Append tokens."""
        self.ids += ids
        self.sampled += [sampled] * len(ids)
        self.pending.ids += ids

    def take_pending(self, model: Any) -> tuple[PendingTokens, Tensor]:
        """Take out the pending tokens; returns them and their positions (3, L)."""
        pending, self.pending = self.pending, PendingTokens()
        ids = torch.tensor(pending.ids, device=model.device)
        if len(pending) == 1 and not pending.shown:  # one text token
            start, self.position = self.position, self.position + 1
            return pending, torch.full((3, 1), start, device=model.device)
        grids = [shown.view.grid for _, shown in pending.shown if shown.kind == "image"]  # first looks and crops
        patches = torch.tensor(grids, device=model.device) if grids else None
        positions, self.position = model.rope_positions(ids, patches, start=self.position)
        return pending, positions


def forward_pending(model: Any, kv: KVRows, conversations: Sequence[Conversation]) -> Tensor:
    """One forward over the pending tokens of several conversations, whose caches are the rows of `kv`.

    Image features must have been encoded. Attention maps are written to the looks that asked for the images.

    Returns:
        (B, d): the final hidden state of each conversation's last token.
    """
    taken = [conversation.take_pending(model) for conversation in conversations]
    width = max(len(pending) for pending, _ in taken)
    ids = torch.tensor([pending.ids + [0] * (width - len(pending)) for pending, _ in taken], device=model.device)
    lengths = torch.tensor([len(pending) for pending, _ in taken], device=model.device)
    embeds = model.get_input_embeddings()(ids)  # (B, L, d), a fresh tensor
    positions = embeds.new_zeros(3, *ids.shape, dtype=torch.long)
    for row, (pending, places) in enumerate(taken):
        positions[:, row, : len(pending)] = places
        for offset, state in pending.states:
            embeds[row, offset] = state.to(embeds.dtype)
        for offset, shown in pending.shown:
            tokens, attention = model.project(shown.kind, shown.view.features, shown.condition)
            embeds[row, offset : offset + len(tokens)] = tokens.to(embeds.dtype)
            if shown.look is not None and attention is not None:
                merge = conversations[row].features.processor.image_processor.merge_size
                grid = shown.view.token_grid(len(attention), merge)
                shown.look.attention = attention.float().reshape(grid).cpu().numpy()
    real = torch.arange(width, device=model.device) < lengths[:, None]
    hidden = kv.forward(model, embeds, positions, real)
    return hidden[torch.arange(len(taken), device=model.device), lengths - 1]
