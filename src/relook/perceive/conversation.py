"""One conversation: its tokens with their keys and values, its images, its turns; and forwards over its tokens.

A `Conversation` only grows. A question works on a copy (which shares all tensors), so a question that is abandoned
leaves the conversation as it was. `PendingTokens` are its last tokens: part of the text, not yet run through the
language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from relook.model.decoder import widen
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

    @property
    def identity(self) -> tuple:
        """What is seen, and how: tokens before it being equal, the same identity gives the same embeddings."""
        return self.kind, self.view.key, self.condition is None


@dataclass(eq=False)
class PendingTokens:
    """Tokens that are not yet run through the language model.

    Attributes:
        ids: token ids, in order.
        shown: (offset of the first pad in `ids`, image) of every image among them.
        states: (offset, (d,)) input embeddings in place of the token's own: control tokens' hidden states.
        cached: how many of `ids` need not run, their keys and values being known.
    """

    ids: list[int] = field(default_factory=list)
    shown: list[tuple[int, ShownImage]] = field(default_factory=list)
    states: list[tuple[int, Tensor]] = field(default_factory=list)
    cached: int = 0

    @property
    def to_see(self) -> list[ShownImage]:
        """The images among the tokens that will run."""
        return [shown for offset, shown in self.shown if offset >= self.cached]

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
        views: (index in `ids` of the first pad, what is seen there) of every image.
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
    views: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def begin(cls, processor: Any, device: torch.device | str, shared: Any = None) -> Conversation:
        """An empty conversation; `shared` holds features of other conversations."""
        return cls(FeatureCache(processor, shared), KVRows.empty(device=device))

    def copy(self) -> Conversation:
        """The same conversation, all of it run, to continue independently."""
        lists: dict[str, Any] = {n: list(getattr(self, n)) for n in ("ids", "sampled", "images", "turns", "views")}
        features, kv = self.features.copy(), self.kv.copy()
        return replace(self, features=features, kv=kv, pending=PendingTokens(), **lists)

    def add(self, ids: Sequence[int], sampled: bool = False, shown: Sequence[tuple[int, ShownImage]] = ()) -> None:
        """Append tokens, among them images: (offset in `ids` of the first pad, image)."""
        self.views += [(len(self.ids) + offset, hash(image.identity)) for offset, image in shown]
        self.pending.shown += [(len(self.pending) + offset, image) for offset, image in shown]
        self.ids += ids
        self.sampled += [sampled] * len(ids)
        self.pending.ids += ids

    @property
    def run(self) -> int:
        """Tokens that went through the language model."""
        return len(self.ids) - len(self.pending)

    def cut(self, length: int) -> int:
        """Forget the tokens from `length` on, which are text; the loop shortens keys and values to `run`.

        Returns:
            How many of them had been run.
        """
        left = max(length - self.run, 0)
        gone = max(self.run - length, 0)
        self.position -= gone  # a token of text is one position
        shown, states = self.pending.shown, self.pending.states
        self.pending = PendingTokens(
            self.pending.ids[:left],
            [each for each in shown if each[0] < left],
            [each for each in states if each[0] < left],
        )
        self.ids, self.sampled = self.ids[:length], self.sampled[:length]
        return gone

    @property
    def signature(self) -> np.ndarray:
        """(L,) int64: the ids, with what is seen in place of every first pad. Equal up to a place: so are its keys."""
        signature = np.array(self.ids, dtype=np.int64)
        for index, seen in self.views:
            signature[index] = seen
        return signature

    def take_pending(self, model: Any) -> tuple[PendingTokens, Tensor]:
        """Take out the pending tokens; returns those that will run, and their positions (3, L)."""
        pending, self.pending = self.pending, PendingTokens()
        device = self.kv.mask.device
        ids = torch.tensor(pending.ids, device=device)
        if len(pending) == 1 and not pending.shown:  # one text token
            start, self.position = self.position, self.position + 1
            return pending, torch.full((3, 1), start, device=device)
        grids = [shown.view.grid for _, shown in pending.shown if shown.kind == "image"]  # first looks and crops
        patches = torch.tensor(grids, device=device) if grids else None
        positions, self.position = model.rope_positions(ids, patches, start=self.position)
        at = pending.cached
        rest = PendingTokens(
            pending.ids[at:],
            [(offset - at, shown) for offset, shown in pending.shown if offset >= at],
            [(offset - at, state) for offset, state in pending.states if offset >= at],
        )
        return rest, positions[:, at:]


Inputs = tuple[Tensor, Tensor]  # (L, d) embeddings (`run_decoder`), (3, L) positions of tokens that one row runs next


def embed_pending(model: Any, conversations: Sequence[Conversation]) -> list[Inputs]:
    """The pending tokens of several conversations as inputs of a forward.

    Image features must have been encoded. Attention maps are written to the looks that asked for the images.
    """
    device = conversations[0].kv.mask.device
    taken = [conversation.take_pending(model) for conversation in conversations]
    ids = torch.tensor([[token for pending, _ in taken for token in pending.ids]], device=device)
    parts = model.get_input_embeddings()(ids)[0].split([len(pending) for pending, _ in taken])  # of a fresh tensor
    inputs: list[Inputs] = []
    for embeds, (pending, positions), conversation in zip(parts, taken, conversations, strict=True):
        for offset, state in pending.states:
            embeds[offset] = state.to(embeds.dtype)
        for offset, shown in pending.shown:
            tokens, attention = model.project(shown.kind, shown.view.features, shown.condition)
            embeds = widen(embeds, max(embeds.shape[1], tokens.shape[1]))
            embeds[offset : offset + len(tokens)] = widen(tokens, embeds.shape[1]).to(embeds.dtype)
            if shown.look is not None and attention is not None:
                merge = conversation.features.processor.image_processor.merge_size
                grid = shown.view.token_grid(len(attention), merge)
                shown.look.attention = attention.float().reshape(grid).cpu().numpy()
        inputs.append((embeds, positions))
    return inputs


def forward_inputs(model: Any, kv: KVRows, inputs: Sequence[Inputs]) -> Tensor:
    """One forward over tokens of several conversations, whose caches are the rows of `kv`.

    Returns:
        (B, d): the final hidden state of each row's last token.
    """
    lengths = torch.tensor([len(embeds) for embeds, _ in inputs], device=kv.mask.device)
    width = int(lengths.max())
    channels = max(embeds.shape[1] for embeds, _ in inputs)
    embeds = torch.nn.utils.rnn.pad_sequence([widen(embeds, channels) for embeds, _ in inputs], batch_first=True)
    positions = torch.stack([torch.nn.functional.pad(p, (0, width - p.shape[1])) for _, p in inputs], dim=1)
    real = torch.arange(width, device=kv.mask.device) < lengths[:, None]
    hidden = kv.forward(model, embeds, positions, real)
    return hidden[torch.arange(len(inputs), device=kv.mask.device), lengths - 1]
