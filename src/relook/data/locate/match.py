"""Where on a page an answer stands: its text among the lines that were read, as words, numbers or dates.

Numbers and dates match by value, however they are written: "1,234.50" is "1 234,50", "25/12/2018" is "25 Dec 18". Where
a text stands more than once, words of the question in the same row decide ("What is the total?": the amount beside
TOTAL), then the way it is written. What is left is equally good, and all of it is returned.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

from relook.errors import UserError
from relook.regions import Box, iou, union

ALIKE, LONG = 85.0, 6  # least similarity in percent, and least length, of a text that was read with errors
ADDRESS = 24  # letters and digits of a text in which the reader may have left a digit out
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}"
_ALONE, _ENDS = r"(?<!\d)(?<!\d[/:.,-])", r"(?!\d|[/:-]\d|[.,]\d)"
_NUMBERS = tuple(
    re.compile(_ALONE + body + _ENDS)
    for body in (
        r"\d+(?:[.,]\d+)*",
        r"\d{1,3}(?:[ '’\u00a0\u202f]\d{3})+(?:[.,]\d+)?",
        r"\d+[.,] \d{2}",
        r"\d+ [.,]\d{2}",
    )
)
_SIGNS = re.compile(
    r"[-+~]?\s*(?:rm|rs|[a-z]{3}|[^\w\s])?\.?\s*[-+]?\s*(\d.*?\d|\d)\s*(%|[a-z]{1,3}|[^\w\s])?", re.IGNORECASE
)
_DATES = tuple(
    re.compile(rf"(?<!\d)(?:{body})(?:(?!\d)|(?=\d{{1,2}}[:.]\d\d))", re.IGNORECASE)  # a time may touch it
    for body in (
        r"(\d{4}|\d{1,2})\s?([-/.])\s?(\d{1,2})\s?\2\s?(\d{4})",
        r"(\d{4}|\d{1,2})\s?([-/.])\s?(\d{1,2})\s?\2\s?(\d{2})",
        r"(\d{4})年(\d{1,2})月(\d{1,2})日",
        rf"(\d{{1,2}})(?:st|nd|rd|th)?[-/., ]*({_MONTH})[-/.,' ]*(\d{{4}}|\d{{2}})",
        rf"({_MONTH})[-/. ]*(\d{{1,2}})(?:st|nd|rd|th)?[-/.,' ]+(\d{{4}}|\d{{2}})",
        r"((?:19|20)\d\d)([01]\d)([0-3]\d)",
    )
)
_GROUPS = re.compile(r"(?!0)\d{1,3}(?:[.,]\d{2,3})*[.,]\d{3}")  # of thousands, or lakhs
_NO_TEXT = {"yes", "no", "true", "false"}  # which say of a page what does not stand on it: "Invoice No"
_CURRENCIES = {"rm", "rs", "kr", "zł"}
_PLAIN = {*("the", "and", "for", "what", "which", "when", "this", "that", "are", "was", "does", "how", "much", "many")}


@dataclass(frozen=True)
class Line:
    """A line of text that was read. `edges`: the left edge of each character and the end of the last, in pixels."""

    text: str
    box: Box
    score: float
    edges: tuple[float, ...]


class Place(NamedTuple):
    """Where an answer may stand: its box in pixels of the upright image, a score in 0..1, and what was seen there."""

    box: Box
    score: float
    text: str


class _Match(NamedTuple):
    """Characters [start, end) of the page's text that are the answer; `alike` in 0..1, 1 where written the same."""

    start: int
    end: int
    alike: float


class Page:
    """The lines of a page in reading order, and its text: the lines, each closed by a newline."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = lines
        self.text = "".join(line.text + "\n" for line in lines)
        self.where = [(n, i) for n, line in enumerate(lines) for i in range(len(line.text) + 1)]  # of each character

    def place(self, match: _Match) -> Place:
        """The box around the characters of a match, over as many lines as it has."""
        spans: dict[int, tuple[int, int]] = {}
        for line, at in self.where[match.start : match.end]:
            if at < len(self.lines[line].text):
                spans[line] = spans.get(line, (at, at))[0], at + 1
        boxes, scores = [], []
        for line, (start, end) in spans.items():
            left, top, right, bottom = self.lines[line].box
            edges = self.lines[line].edges
            boxes.append((max(left, int(edges[start])), top, min(right, math.ceil(edges[end])), bottom))
            scores.append(self.lines[line].score)
        text = " ".join(self.text[match.start : match.end].split())
        return Place(union(boxes), round(min(scores) * match.alike, 3), text)

    def row(self, match: _Match) -> str:
        """What stands in the rows of a match, without the match itself, in lower case."""
        _, top, _, bottom = self.place(match).box
        first, last = self.where[match.start][0], self.where[match.end - 1][0]
        lines = [
            line.text
            for number, line in enumerate(self.lines)
            if not first <= number <= last and top <= (line.box[1] + line.box[3]) / 2 <= bottom
        ]
        start = match.start - self.where[match.start][1]
        end = match.end - 1 - self.where[match.end - 1][1] + len(self.lines[last].text)
        return " ".join([*lines, self.text[start : match.start], self.text[match.end : end]]).casefold()


def places(page: Page, answers: Sequence[str], question: str) -> list[Place]:
    """The places of a page where one of the accepted answers stands, equally good ones; none where it does not."""
    matches = next(filter(None, (_matches(page, answer) for answer in answers)), [])
    asked = {word for word in re.findall(r"[^\W\d_]{3,}", question.casefold()) if word not in _PLAIN}
    ranks = []
    for match in matches:
        row = page.row(match)
        beside = sum(word in row if len(word) > 3 else word in re.findall(r"[^\W\d_]+", row) for word in asked)
        ranks.append((beside, round(match.alike, 1)))
    best = [page.place(match) for match, rank in zip(matches, ranks, strict=True) if rank == max(ranks)]
    return [place for n, place in enumerate(best) if all(iou(place.box, other.box) < 0.5 for other in best[:n])]


def _matches(page: Page, answer: str) -> list[_Match]:
    answer = unicodedata.normalize("NFKC", answer).strip()
    if _key(answer) in _NO_TEXT:
        return []
    if dates := _dates(answer, whole=True):
        return _equal(page, answer, dates, _dates)
    number = _SIGNS.fullmatch(answer)
    if number and not re.match(r"0\d", number[1]) and (values := _numbers(number[1], whole=True)):
        found = _equal(page, number[1], values, _numbers)
        return [match for match in found if _followed(page.text[match.end : match.end + 6], number[2] or "")]
    return _texts(page, answer)


def _followed(text: str, unit: str) -> bool:
    """Whether a text opens with what an answer's number has after it ("2nd", "10 am", "5%"), and ends there.

    A currency need not stand there: a sign, or three capitals.
    """
    if (unit.isupper() and len(unit) == 3) or unit.casefold() in _CURRENCIES or not (unit == "%" or unit.isalpha()):
        return True
    rest = text.lstrip(" ").casefold()
    return rest.startswith(unit.casefold()) and not rest[len(unit) : len(unit) + 1].isalnum()


_Found = list[tuple[int, int, set[Any]]]  # characters [start, end), and what they may mean


def _equal(page: Page, answer: str, wanted: _Found, read: Callable[[str], _Found]) -> list[_Match]:
    """The matches that may mean the same; no two of them share a character, and the longer one counts."""
    values = set.union(*(meanings for _, _, meanings in wanted))
    found: list[_Match] = []
    for start, end, meanings in sorted(read(page.text), key=lambda each: each[0] - each[1]):
        if values & meanings and all(end <= other.start or start >= other.end for other in found):
            found.append(_Match(start, end, 1.0 if _key(page.text[start:end]) == _key(answer) else 0.9))
    key = _key(answer)
    if any(match.alike == 1 for match in found):  # 01/02/2018 stands there, so 02/01/2018 is another date
        found = [m for m in found if m.alike == 1 or len(_key(page.text[m.start : m.end])) != len(key)]
    return sorted(found)


def _numbers(text: str, whole: bool = False) -> _Found:
    """The numbers in a text, each with the values that its separators may mean: "1,234" is 1234 or 1.234."""
    taken = [] if whole else [range(start, end) for start, end, _ in _dates(text)]
    found: _Found = []
    for pattern in _NUMBERS:
        for match in pattern.finditer(text):
            fits = match.span() == (0, len(text)) or not whole
            if fits and not any(match.start() in span for span in taken) and (meanings := set(_values(match[0]))):
                found.append((*match.span(), meanings))
    return found


def _values(written: str) -> Iterator[Decimal]:
    written = re.sub(r"[^\d.,]", "", written)
    marks = [mark for mark in written if mark in ".,"]
    head, _, tail = written.rpartition(marks[-1]) if marks else (written, "", "")
    digits = re.sub(r"\D", "", written)
    if len(set(marks)) == 2 or (len(marks) == 1 and tail):
        yield Decimal(f"{re.sub(r'[.,]', '', head) or 0}.{tail}")
    if not marks or (len(set(marks)) == 1 and _GROUPS.fullmatch(written)):
        yield Decimal(digits)


def _dates(text: str, whole: bool = False) -> _Found:
    """The dates in a text, each with what it may be: (year of the century, month, day)."""
    found: _Found = []
    for pattern in _DATES:
        for match in pattern.finditer(text):
            parts = [part for part in match.groups() if part.isalnum()]
            meanings = {each for each in _orders(parts) if 1 <= each[1] <= 12 and 1 <= each[2] <= 31}
            if meanings and (match.span() == (0, len(text)) or not whole):
                found.append((*match.span(), meanings))
    return found


def _orders(parts: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    named = [n for n, part in enumerate(parts) if part[0].isalpha()]
    a, b, c = (_MONTHS.index(p[:3].casefold()) + 1 if p[0].isalpha() else int(p) for p in parts)
    if named:
        yield (c % 100, b, a) if named == [1] else (c % 100, a, b)
    elif len(parts[0]) == 4:
        yield a % 100, b, c
    else:
        yield c % 100, b, a
        yield c % 100, a, b
        if len(parts[2]) == 2:
            yield a, b, c


def _key(text: str) -> str:
    """The letters and digits of a text, in one case."""
    return "".join(each for each in unicodedata.normalize("NFKC", text).casefold() if each.isalnum())


def _texts(page: Page, answer: str) -> list[_Match]:
    """Where a text stands, whatever its spaces, marks and case; or once, where it was read with a few errors."""
    key = _key(answer)
    pairs = [(one, at) for at, each in enumerate(page.text) for one in _key(each)]
    flat, at = "".join(one for one, _ in pairs), [at for _, at in pairs]
    if not key:
        return []
    found = [
        _Match(at[m.start()], at[m.start() + len(key) - 1] + 1, 1.0) for m in re.finditer(f"(?={re.escape(key)})", flat)
    ]
    text = page.text
    bounded = [
        m
        for m in found
        if len(key) > 7 or not any(map(str.isalnum, text[m.start - 1 : m.start] + text[m.end : m.end + 1]))
    ]
    if key.isdigit():  # 1.2.3 is not 123
        bounded = [m for m in bounded if _points(text[m.start : m.end]) == _points(answer)]
    letters = sum(each.isalpha() for each in key)
    if bounded or len(key) < LONG or 2 * letters < len(key):
        return bounded
    return [_Match(*_words(page.text, each.start, each.end), each.alike) for each in _alike(key, flat, at)]


def _points(text: str) -> str:
    return re.sub(r"[^\w.,:]", "", text.strip(".,:"))


def _words(text: str, start: int, end: int) -> tuple[int, int]:
    """The whole words of which characters [start, end) are half or more."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    kept = [(a, b) for a, b in spans if 2 * (min(b, end) - max(a, start)) >= b - a]
    return (kept[0][0], kept[-1][1]) if kept else (start, end)


def _alike(key: str, flat: str, at: Sequence[int]) -> list[_Match]:
    try:
        from rapidfuzz import fuzz
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise UserError("matching texts needs rapidfuzz, which is not installed; pip install 'relook[ocr]'") from None
    best = fuzz.partial_ratio_alignment(key, flat, score_cutoff=ALIKE) if len(flat) >= len(key) else None
    if best is None:
        return []
    rest = flat[: best.dest_start] + "\n" * (best.dest_end - best.dest_start) + flat[best.dest_end :]
    other = fuzz.partial_ratio_alignment(key, rest, score_cutoff=best.score - 1)
    found = [each for each in (best, other) if each is not None and each.dest_end > each.dest_start]
    return [
        _Match(at[each.dest_start], at[each.dest_end - 1] + 1, round(best.score / 100, 3))
        for each in found
        if not _other_digits(key, flat[each.dest_start : each.dest_end], Levenshtein.editops)
    ]


def _other_digits(key: str, seen: str, edits: Callable[[str, str], Any]) -> bool:
    """Whether a digit is another one (Street 12 is not Street 13) or, in a short text, is missing or too many."""
    sides = [(key[at : at + (tag != "insert")], seen[to : to + (tag != "delete")]) for tag, at, to in edits(key, seen)]
    return any((a + b).isdigit() and (len(key) < ADDRESS or len(a + b) == 2) for a, b in sides)
