"""The loop: ask a model about an image, let it look again, get a typed record of what happened.

vlm.py           load, VLM, Chat: checks what is asked, opens images
loop.py       the loop that moves a group of rows
row.py           the state context of one question
conversation.py  tokens, positions and images of one conversation; the block to push next
features.py        each distinct view through its vision encoder once
sampling.py      which tokens may be written, and how one is drawn
text.py         tokens to text, piece by piece
kv_cache.py         keys and values of rows that join and part
"""

from .vlm import VLM, Chat, load

__all__ = ["VLM", "Chat", "load"]
