"""The loop: ask a model about an image, let it look again, get a typed record of what happened.

vlm.py           load, VLM, Chat: checks what is asked, opens images
session.py       the loop that moves a group of rows
row.py           the state machine of one question
conversation.py  tokens, positions and images of one conversation; the block to push next
sights.py        each distinct view through its vision tower once
sampling.py      which tokens may be written, and how one is drawn
prose.py         tokens to text, piece by piece
cache.py         keys and values of rows that join and part
"""

from .vlm import VLM, Chat, load

__all__ = ["VLM", "Chat", "load"]
