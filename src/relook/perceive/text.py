"""Token ids to readable text, piece by piece, as a turn is being written.

What has been given out never changes: half a UTF-8 character, white space that may turn out to be trailing, and the
start of what may become the answer prefix ("Now answer the question.") are held back until it is clear what they are.
So the pieces put together are exactly the final text.
It refuses to know looks and models.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from relook.looks import ANSWER_PREFIX

UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character (yet)


class TextStreamer:
    """The text of one assistant turn.

    Args:
        tokenizer: decodes ids.
        hidden_ids: ids that are no text (control tokens, end of turn).
    """

    def __init__(self, tokenizer: Any, hidden_ids: Collection[int]):
        self.tokenizer, self.hidden_ids = tokenizer, hidden_ids
        self.text = ""  # given out so far
        self._ids: list[int] = []
        self._from, self._read = (
            0,
            0,
        )  # ids before `_read` are in `_raw`; from `_from` on they give the decoder its context
        self._raw = ""

    def add(self, token: int) -> str:
        """Take one more token; the text that is now certain ("" while there is none)."""
        if token not in self.hidden_ids:
            self._ids.append(token)
        before, after = self._decode(self._from, self._read), self._decode(self._from, len(self._ids))
        if len(after) > len(before) and not after.endswith(UNFINISHED):
            self._raw += after[len(before) :]
            self._from, self._read = self._read, len(self._ids)
        return self._give(self._tidy(self._raw, last=False))

    def finish(self) -> str:
        """What was still held back, when the turn is over."""
        before, after = self._decode(self._from, self._read), self._decode(self._from, len(self._ids))
        self._raw += after[len(before) :]
        self._from = self._read = len(self._ids)
        return self._give(self._tidy(self._raw, last=True))

    def _decode(self, begin: int, end: int) -> str:
        if begin == end:
            return ""
        return self.tokenizer.decode(
            self._ids[begin:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _tidy(self, raw: str, last: bool) -> str:
        """The answer in `raw`: without the prefix that many published answers open with, without outer white space."""
        if not last and ANSWER_PREFIX.startswith(raw):
            return ""
        return raw.removeprefix(ANSWER_PREFIX.rstrip()).strip()

    def _give(self, text: str) -> str:
        new, self.text = text[len(self.text) :], text
        return new
