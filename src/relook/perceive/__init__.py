"""Inference: ask a model about an image, with second looks, and get a typed record (`relook.trace`).

vlm.py           `load`, `VLM`, `Chat`: the public interface; checks requests and opens images
loop.py          the generation loop over a group of rows
row.py           the state machine of one question
conversation.py  tokens, positions and images of one conversation; a forward over pending tokens
features.py      view features: each distinct view goes through its vision encoder once
sampling.py      constrained vocabulary and sampling
text.py          text streamer: token ids to text, piece by piece
generate.py      looks in transformers' `generate` and pipeline
kv_cache.py      keys and values of rows that are merged and extracted
"""

from .vlm import VLM, Chat, load

__all__ = ["VLM", "Chat", "load"]
