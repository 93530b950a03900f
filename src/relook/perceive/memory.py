"""What a server remembers of conversations that have ended: keys and values, and view features.

A request says its whole conversation, so memory changes the cost of an answer and nothing else. Bounded in bytes; what
was not used for longest goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any

import numpy as np
import torch

from .conversation import Conversation
from .features import ViewFeatures
from .kv_cache import KVRows


@dataclass(eq=False)
class _Kept:
    """Keys and values `kv` of a conversation with this signature, which begins with the image `first`; or a view."""

    size: int
    view: ViewFeatures | None = None
    signature: np.ndarray | None = None
    kv: KVRows | None = None
    first: int | None = None


class Memory:
    """Keys, values and features of earlier conversations, for those that begin alike. For several threads.

    Args:
        limit: bytes of tensors that are kept.
    """

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._lock = RLock()

    def view(self, key: Hashable) -> ViewFeatures | None:
        """The features of a view, if they are kept."""
        with self._lock:
            kept = self._kept.get(("view", key))
            if kept is not None:
                self._kept.move_to_end(("view", key))
            return None if kept is None else kept.view

    def keep_view(self, view: ViewFeatures) -> None:
        """Keep a view that has been encoded."""
        if view.features is not None:
            own = view.features.clone()  # not a part of a batch's
            self._put(("view", view.key), _Kept(_bytes([own]), replace(view, tensors={}, features=own)))

    def reuse(self, conversation: Conversation) -> int:
        """Give a conversation the keys and values of its pending tokens, as far as an earlier one began alike.

        Never those of a look that is being taken (its attention map is wanted), nor of the last token (its hidden state
        is).

        Returns:
            How many of the pending tokens need not run.
        """
        pending, whole = conversation.pending, conversation.signature
        have = len(whole) - len(pending)
        looks = [offset for offset, shown in pending.shown if shown.look is not None]
        limit = have + min([len(pending) - 1, *looks])
        with self._lock:
            best, length = max(
                ((key, _common(kept.signature, whole[:limit])) for key, kept in self._alike(conversation)),
                key=lambda pair: pair[1],
                default=(None, 0),
            )
            if best is None or length <= have:
                return 0
            self._kept.move_to_end(best)
            kv: Any = self._kept[best].kv
        layers = [(keys[:, :, :length], values[:, :, :length]) for keys, values in kv.layers]
        conversation.kv = KVRows(layers, kv.mask[:, :length])
        pending.cached = length - have
        return length - have

    def keep(self, conversation: Conversation) -> None:
        """Keep a conversation, all of it run, in place of those that it goes on from."""
        signature, kv = conversation.signature, conversation.kv
        size = _bytes(x for pair in kv.layers for x in pair)
        if size > self.limit:
            return
        with self._lock:
            for key, other in self._alike(conversation):
                common = _common(other.signature, signature)
                if common == len(signature):
                    self._kept.move_to_end(key)
                    return
                if common == len(other.signature):  # type: ignore[arg-type]
                    self._drop(key)
            self._put(signature.tobytes(), _Kept(size, None, signature, kv, _first(conversation)))

    def _alike(self, conversation: Conversation) -> list[tuple[Hashable, _Kept]]:
        """The conversations that begin with the same image, or have none."""
        firsts = (_first(conversation), None)
        return [(key, kept) for key, kept in self._kept.items() if kept.kv is not None and kept.first in firsts]

    def _put(self, key: Hashable, kept: _Kept) -> None:
        with self._lock:
            self._drop(key)
            if kept.size > self.limit:
                return
            self._kept[key] = kept
            self.bytes += kept.size
            while self.bytes > self.limit:
                self._drop(next(iter(self._kept)))

    def _drop(self, key: Hashable) -> None:
        kept = self._kept.pop(key, None)
        self.bytes -= 0 if kept is None else kept.size


def _first(conversation: Conversation) -> int | None:
    """What is seen in its first image; None where it has none."""
    return conversation.views[0][1] if conversation.views else None


def _common(a: Any, b: np.ndarray) -> int:
    """How many values two signatures have in common from their beginning."""
    length = min(len(a), len(b))
    differing = np.flatnonzero(a[:length] != b[:length])
    return int(differing[0]) if len(differing) else length


def _bytes(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))
