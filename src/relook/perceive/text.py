"""Text streamer: token ids to text, piece by piece, while a turn is generated.

Emitted text never changes: incomplete UTF-8 characters, white space that may be trailing, and the beginning of what may
become the answer prefix ("Now answer the question.") or a stop text are held back until they are decided. So the pieces
add up to exactly the final text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from relook.looks import ANSWER_PREFIX
from relook.trace import TextDelta, Token

UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character (yet)


class TextStreamer:
    """The text of one assistant turn.

    Args:
        tokenizer: decodes ids.
        hidden_ids: ids that are not part of the text (control tokens, end of turn).
        stop: texts before the first of which the text ends.

    Attributes:
        text: emitted so far.
        stopped: whether one of `stop` came.
    """

    def __init__(self, tokenizer: Any, hidden_ids: Collection[int], stop: Sequence[str] = ()):
        self.tokenizer, self.hidden_ids, self.stop = tokenizer, hidden_ids, stop
        self.stopped = False
        self.text = ""
        self._chosen: list[tuple[int, Token]] = []  # each with the length of `_raw` before it
        self._told = 0  # of `tokens`, in deltas
        self._ids: list[int] = []
        self._from, self._read = (
            0,
            0,
        )  # ids before `_read` are in `_raw`; those from `_from` on are the decoder's context
        self._raw = ""

    def add(self, token: int, chosen: Token | None = None) -> TextDelta | None:
        """Add a token (with its probability); returns the text that is now decided."""
        if token not in self.hidden_ids:
            self._ids.append(token)
            self._chosen += [] if chosen is None else [(len(self._raw), chosen)]
        before, after = self._decode(self._from, self._read), self._decode(self._from, len(self._ids))
        if len(after) > len(before) and not after.endswith(UNFINISHED):
            self._raw += after[len(before) :]
            self._from, self._read = self._read, len(self._ids)
        return self._delta(self._emit(self._strip(self._raw, last=False)), self._covering(len(self.text)))

    def finish(self) -> TextDelta | None:
        """The text that was still held back, at the end of the turn."""
        before, after = self._decode(self._from, self._read), self._decode(self._from, len(self._ids))
        self._raw += after[len(before) :]
        self._from = self._read = len(self._ids)
        return self._delta(self._emit(self._strip(self._raw, last=True)), self.tokens)

    @property
    def tokens(self) -> list[Token]:
        """Of the text, where they were given."""
        return self._covering(len(self.text) if self.stopped else len(self._raw) + 1)

    def _delta(self, piece: str, tokens: list[Token]) -> TextDelta | None:
        """A piece, with those of the text's tokens that no piece had."""
        new, self._told = tuple(tokens[self._told :]), max(self._told, len(tokens))
        return TextDelta(piece, new) if piece or new else None

    def _covering(self, length: int) -> list[Token]:
        """The tokens of the first `length` characters of the text."""
        prefix = ANSWER_PREFIX.rstrip()
        begin = len(prefix) if self._raw.startswith(prefix) else 0
        end = len(self._raw) - len(self._raw[begin:].lstrip()) + length
        return [token for at, token in self._chosen if begin <= at < end] if length else []

    def _decode(self, begin: int, end: int) -> str:
        if begin == end:
            return ""
        return self.tokenizer.decode(
            self._ids[begin:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _strip(self, raw: str, last: bool) -> str:
        """`raw` up to a stop text, without outer white space and the prefix that many published answers open with."""
        if not last and ANSWER_PREFIX.startswith(raw):
            return ""
        text = raw.removeprefix(ANSWER_PREFIX.rstrip()).lstrip()
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            text = text[: min(found)]
        elif not last:  # a beginning of a stop text at the end
            begun = (
                n for stop in self.stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])
            )
            text = text[: len(text) - max(begun, default=0)]
        return text.strip()

    def _emit(self, text: str) -> str:
        new, self.text = text[len(self.text) :], text
        return new


class PieceStreamer(TextStreamer):
    """As `TextStreamer`, over the pieces of text that a server sends, cut anywhere.

    Args:
        hidden: what is no part of the text.
        stop: see there.
    """

    def __init__(self, hidden: re.Pattern[str], stop: Sequence[str] = ()):
        super().__init__(None, (), stop)
        self.hidden = hidden

    def add_text(self, piece: str) -> str:
        """Add a piece; returns the text that is now decided ("" while there is none)."""
        self._raw += piece
        return self._emit(self._strip(_BEGUN.sub("", self.hidden.sub("", self._raw)), last=False))

    def finish_text(self) -> str:
        """The text that was still held back."""
        return self._emit(self._strip(self.hidden.sub("", self._raw), last=True))


_BEGUN = re.compile(r"<(\|[^<>|\s]*\|?|[a-z_/]*)$")  # what may become a token, or a tag
