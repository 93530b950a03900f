"""Inference: ask a model about an image, with second looks, and get a typed record (`relook.trace`).

opening.py       `load`: a model in this process, or behind an endpoint
vlm.py           `VLM`, `Chat`: the public interface; checks requests and opens images
engine.py        the seam of engines: `Request` in, events out
local.py         the engine with a model in this process, for servers: a thread and its queue
endpoint/        the engine with a model behind an OpenAI-compatible endpoint, and `VLM`'s interface to it
loop.py          the generation loop: rows join and leave a running batch
row.py           the state machine of one request
conversation.py  tokens, positions and images of one conversation; forwards over pending tokens
memory.py        keys, values and features of earlier conversations
features.py      view features: each distinct view goes through its vision encoder once
sampling.py      constrained vocabulary and sampling
text.py          text streamer: token ids to text, piece by piece
generate.py      looks in transformers' `generate` and pipeline
kv_cache.py      keys and values of rows that are merged and extracted
"""

from .opening import load
from .vlm import VLM, Chat

__all__ = ["VLM", "Chat", "load"]
