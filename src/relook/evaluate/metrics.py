"""Scores of one answer: each entry of `SCORERS` takes an answer and all accepted ones and returns 0 to 1; and how
regions overlap.

Two answers are compared after a normalization: `normalize` (case and space), `vqa_normalize` (that of the VQA
challenge), numbers, letters, yes and no. Scores that are defined for a whole split only (F1) are in `split_metrics`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal

import numpy as np

from relook.errors import UserError
from relook.regions import Box

Scorer = Callable[[str, Sequence[str]], float]

_STRAIGHT = str.maketrans("\u2019\u2018\u02bc\u2212\u2010\u2011", "'''---")  # apostrophes, minus signs and hyphens

# ---- the same text


def normalize(text: str) -> str:
    """Lower case, white space runs as one space, none at the ends; characters composed (NFC), invisible ones left out,
    apostrophes, hyphens and minus signs as ASCII has them.

    These are the only differences that exact match forgives.

    >>> normalize(" Sin  Thye\\n& Co ")
    'sin thye & co'
    """
    text = "".join(c for c in unicodedata.normalize("NFC", text) if unicodedata.category(c) != "Cf")
    text = text.translate(_STRAIGHT).casefold()
    return " ".join(text.replace("i\u0307", "i").split())  # casefold leaves the dot of a Turkish I beside it


def _same(answer: str, accepted: Sequence[str], normal: Callable[[str], str]) -> list[bool]:
    """Which accepted answers it equals once both are normalized. What normalizes to nothing equals only its own words:
    an empty answer is never right, and "a" is no "the"."""
    said, plain = normal(answer), normalize(answer)
    return [said == normal(each) if said else bool(plain) and plain == normalize(each) for each in accepted]


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1.0 where the normalized answer is one of the normalized accepted ones, else 0.0."""
    return float(any(_same(answer, accepted, normalize)))


def anls(answer: str, accepted: Sequence[str], threshold: float = 0.5) -> float:
    """Average Normalised Levenshtein Similarity of one item: best over the accepted answers.

    With NL = edit distance / length of the longer, after `normalize`: 1 - NL where NL < threshold, else 0
    (Biten et al., "Scene Text Visual Question Answering", arXiv 1905.13648, section 4).

    >>> anls("9,30", ["9.30"])    # one edit in four characters
    0.75
    """
    distance, said = _rapidfuzz("ANLS").Levenshtein.normalized_distance, normalize(answer)
    best = min(distance(said, normalize(each)) for each in accepted)
    return 1.0 - best if said and best < threshold else 0.0


def rouge_l(answer: str, accepted: Sequence[str]) -> float:
    """ROUGE-L of a caption: the F-measure of the longest common subsequence of words, best over the references.

    Precision and recall weigh the same (Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3
    with beta 1); words are `caption_words`.

    >>> rouge_l("police killed the gunman", ["police kill the gunman"])
    0.75
    """
    common = _rapidfuzz("ROUGE-L").LCSseq.similarity
    said = caption_words(answer)
    lengths = ((common(said, words), len(said) + len(words)) for words in map(caption_words, accepted))
    return max(2 * shared / both if both else 0.0 for shared, both in lengths)


def caption_words(text: str) -> list[str]:
    """Lower-case words without punctuation, for scores of captions."""
    return re.findall(r"[\w']+", text.lower())


def _rapidfuzz(score: str):
    try:
        from rapidfuzz import distance
    except ImportError:
        raise UserError(f"{score} needs rapidfuzz, which is not installed; pip install 'relook[eval]'") from None
    return distance


# ---- the VQA challenge

VQA = "https://github.com/GT-Vision-Lab/VQA (PythonEvaluationTools/vqaEvaluation/vqaEval.py)"
_ARTICLES = ("a", "an", "the")
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_COUNTED)}}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# "dont" -> "don't"; of words with two apostrophes, either may be missing
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at, mark in enumerate(word) if mark == "'"
}


def vqa_normalize(text: str) -> str:
    """The VQA challenge's normalization: punctuation, case, number words, articles, contractions (the script at `VQA`).

    A mark of punctuation becomes a space, but goes without one where it stands beside a space, or where the text has a
    number such as 1,000. Periods stay before digits only.

    >>> vqa_normalize("The two dogs, dont they?"), vqa_normalize("1,000.50"), vqa_normalize("red/blue")
    ("2 dogs don't they", '1000.50', 'red blue')
    """
    spaced = re.sub(r"[\n\t]", " ", unicodedata.normalize("NFC", text).translate(_STRAIGHT)).strip()
    thousands = re.search(r"\d,\d", spaced) is not None
    out = spaced
    for mark in _MARKS:
        gone = thousands or f"{mark} " in spaced or f" {mark}" in spaced
        out = out.replace(mark, "" if gone else " ")
    words = (_NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", out).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_exact(answer: str, accepted: Sequence[str]) -> float:
    """Exact match after the VQA challenge's normalization of both sides."""
    return float(any(_same(answer, accepted, vqa_normalize)))


def vqa_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """VQA accuracy of one item with the answers of (usually ten) people: min(1, people who agree / 3).

    Averaged over leaving out each person in turn, as the challenge does: with ten answers, one that 1, 2, 3 or 4 of
    them gave is worth 0.3, 0.6, 0.9 or 1 (Antol et al., arXiv 1505.00468, and the script at `VQA`). Fewer than four
    answers could never agree enough; they are scored as `vqa_exact`.
    """
    if len(accepted) < 4:
        return vqa_exact(answer, accepted)
    agrees = _same(answer, accepted, vqa_normalize)
    return sum(min(1.0, (sum(agrees) - one) / 3) for one in agrees) / len(agrees)


# ---- numbers


def relaxed(answer: str, accepted: Sequence[str], tolerance: float = 0.05) -> float:
    """ChartQA's relaxed accuracy: a number within 5 % of an accepted one, of which "12%" is 0.12; else exact match.

    (Masry et al., arXiv 2203.10244, section 5.1. An accepted 0 must be met exactly.)
    """
    return float(any(_near(answer, each, tolerance) for each in accepted) or exact_match(answer, accepted))


def _near(answer: str, accepted: str, tolerance: float) -> bool:
    said, wanted = _plain_number(answer), _plain_number(accepted)
    return said is not None and wanted is not None and abs(said - wanted) <= tolerance * abs(wanted)


def _plain_number(text: str) -> float | None:
    found = re.fullmatch(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)(%?)", text.strip(), re.IGNORECASE)
    return None if found is None else float(found[1]) / (100 if found[2] else 1)


_CURRENCIES = {  # what may stand beside a number, besides the code; "¥" is two
    **{"MYR": "rm", "USD": "$ us$", "EUR": "€", "GBP": "£", "JPY": "¥", "CNY": "¥ rmb", "INR": "₹ rs rs.", "CHF": ""},
    **{"IDR": "rp rp.", "THB": "฿", "PHP": "₱", "KRW": "₩", "VND": "₫", "SGD": "s$", "AUD": "a$", "CAD": "c$"},
    **{"HKD": "hk$", "NZD": "nz$", "TWD": "nt$"},
}
_SIGNS: dict[str, frozenset[str]] = {
    sign: frozenset(code for code, signs in _CURRENCIES.items() if sign in (code.lower(), *signs.split()))
    for code, signs in _CURRENCIES.items()
    for sign in (code.lower(), *signs.split())
}
_SIGN = "|".join(re.escape(sign) for sign in sorted(_SIGNS, key=len, reverse=True))
_AMOUNT = re.compile(
    rf"(?P<open>\()? *(?P<minus>-)? *(?P<first>{_SIGN})? *(?P<after>-)? *(?P<number>\d[\d.,' ]*?)"
    rf"(?P<dash>[.,]-+)? *(?P<behind>-)? *(?P<last>{_SIGN})?(?(open)\))\.?"
)
_WHOLE = frozenset(("IDR", "VND"))  # of which people write no decimals, and a point before thousands
# "9.5"; "9,50" and "0,500"; "1,234.50", "1.234,50", "1 234", "1'234"; India's "1,23,456"
_POINT = re.compile(r"\d+(?:\.\d+)?")
_COMMA = re.compile(r"\d+,\d{1,2}|0,\d+")
_GROUPS = re.compile(r"\d{1,3}([.,' ])\d{3}(?:\1\d{3})*(?:(?!\1)[.,]\d+)?|\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?")


def amount(answer: str, accepted: Sequence[str]) -> float:
    """1.0 where the answer is an accepted amount of money, however it is written; else exact match.

    "RM 9.00", "MYR 9", "9,00" and "9.-" are the same amount as "9.00"; "1,234.50" and "1.234,50" are one too. Amounts
    in two named currencies differ. A date, two numbers, or other words are no amount.

    >>> amount("RM 9.00", ["9.00"]), amount("$9.00", ["RM 9.00"]), amount("9.10", ["9.00"])
    (1.0, 0.0, 0.0)
    """
    said = read_amount(answer)
    wanted = [known for each in accepted if (known := read_amount(each)) is not None]
    if said is None or not wanted:
        return exact_match(answer, accepted)
    return float(any(said[0] == value and (not said[1] or not unit or bool(said[1] & unit)) for value, unit in wanted))


def read_amount(text: str) -> tuple[Decimal, frozenset[str]] | None:
    """(number, the currencies that its sign may mean) of a text that is nothing but these; None for any other.

    >>> read_amount("(RM 1,234.50)"), read_amount("12.05.2018")
    ((Decimal('-1234.50'), frozenset({'MYR'})), None)
    """
    found = _AMOUNT.fullmatch(unicodedata.normalize("NFKC", text).translate(_STRAIGHT).strip().lower())
    if found is None:
        return None
    units = [_SIGNS[sign] for sign in (found["first"], found["last"]) if sign]
    unit = frozenset.intersection(*units) if units else frozenset()
    number = _decimal(found["number"].strip(), bool(unit & _WHOLE))
    if number is None or (units and not unit):
        return None
    negative = any(found[name] for name in ("open", "minus", "after", "behind"))
    return (-number if negative else number), unit


def _decimal(number: str, whole: bool) -> Decimal | None:
    """A written number; None where its marks are not those of one. `whole`: in a currency without decimals."""
    if re.match(r"0\d", number):  # a code, not a number
        return None
    if _POINT.fullmatch(number) and not (whole and _GROUPS.fullmatch(number)):
        return Decimal(number)
    if _COMMA.fullmatch(number):
        return Decimal(number.replace(",", "."))
    if not _GROUPS.fullmatch(number):
        return None
    *groups, last = re.split(r"[.,' ]", number)
    marks = re.findall(r"[.,' ]", number)
    point = "." if marks[-1] != marks[0] else ""
    return Decimal("".join(groups) + point + last)


# ---- one of a few


_NO = ("no", "not", "none", "nope", "cannot")


def read_yes_no(answer: str) -> str | None:
    """ "yes" or "no"; None where the answer says neither.

    The first word of the first sentence that says yes or no decides ("not" and "isn't" say no), else the first plain
    yes or no behind it. POPE's own script (https://github.com/RUCAIBox/POPE, evaluate.py) reads the first sentence
    only, a "not" anywhere in it as a no, and takes whatever is not a no for a yes.

    >>> read_yes_no("Yes, there is."), read_yes_no("There is not."), read_yes_no("A dog.")
    ('yes', 'no', None)
    """
    first, *others = re.split(r"[.!?]", normalize(answer), maxsplit=1)
    for word in re.findall(r"[a-z']+", first):
        if word == "yes" or word in _NO or word.endswith("n't"):
            return "yes" if word == "yes" else "no"
    return next((word for word in re.findall(r"[a-z']+", "".join(others)) if word in ("yes", "no")), None)


def yes_no(answer: str, accepted: Sequence[str]) -> float:
    """1.0 where the answer says yes or no as the accepted one does."""
    said = read_yes_no(answer)
    return float(said is not None and said in {read_yes_no(each) for each in accepted})


_REASON = r" (?:because|is|as|since|which)\b"  # words behind a letter that may be a word itself (A, I)
_BARE = re.compile(r"\W*([A-Za-z])\W*")  # "B", "(b)", "B."
_DENIED = re.compile(r"\bnot (?:option )?(?:\([A-Z]\)|[A-Z]\b)|\(?\b[A-Z]\b\)? is (?:not|wrong|incorrect|false)\b")
_SAYS = r"\b(?:answer|option|choice)(?: is)?:? *|答案[是为]?:? *"
_LETTERS = (
    re.compile(r"^\(?([A-Za-z])(?:[)、]|[.:](?= |$))"),  # "B) rubber", "b. rubber"
    re.compile(rf"(?i:{_SAYS})\(?([B-HJ-Z]\b|[AI]\b(?! [a-z])|[AI](?={_REASON}))"),  # "The answer is B."
    re.compile(rf"(?i:{_SAYS})\(?([a-z])\)?\W*$"),  # "the answer is b"
    re.compile(r"\b(?:is|be|choose|pick|select) ([A-Z])\W*$"),  # "I think it is C"
    re.compile(r"(?:^| )\(?([A-Z])\)"),  # "... (B)", "... or C) wood"
)
_OPENING = re.compile(rf"([B-HJ-Z])(?= (?!or\b|and\b)[a-z])|([AI])(?={_REASON})")  # "B because it is red."
_LEAD = re.compile(r"^(?:the )?(?:correct |right )?(?:answer|option|choice)(?: is)?:? *", re.IGNORECASE)


def read_letter(answer: str) -> str | None:
    """The option's letter that an answer names; None where it names none, or several.

    A letter that may be a word is none: "A red one" is not option A. A letter that is denied is none either.

    >>> read_letter("(B) rubber"), read_letter("The answer is C."), read_letter("A red one"), read_letter("(A) or (B)")
    ('B', 'C', None, None)
    """
    text = _DENIED.sub(" ", unicodedata.normalize("NFKC", answer).replace("*", "")).strip(" \n\t\"'`")
    if bare := _BARE.fullmatch(text):
        return bare[1].upper()
    named = {letter.upper() for pattern in _LETTERS for letter in pattern.findall(text)}
    if not named and (opening := _OPENING.match(text)):
        named = {opening[1] or opening[2]}
    return named.pop() if len(named) == 1 else None


def choice(answer: str, accepted: Sequence[str]) -> float:
    """Multiple choice: 1.0 where the answer names the accepted letter, or else says the accepted option's words.

    `accepted` is the letter, then (where known) the option's text: ("B", "rubber").
    """
    letter, *texts = accepted
    named = read_letter(answer)
    if named is not None:
        return float(named == letter.strip(" ().").upper())
    return max(vqa_exact(answer, texts), vqa_exact(_LEAD.sub("", answer.strip()), texts))


SCORERS: dict[str, Scorer] = {
    "exact": exact_match,
    "anls": anls,
    "vqa_exact": vqa_exact,
    "vqa": vqa_accuracy,
    "relaxed": relaxed,
    "amount": amount,
    "yes_no": yes_no,
    "choice": choice,
    "rouge_l": rouge_l,
}


# ---- regions


def region_overlap(looked: Sequence[Box], annotated: Sequence[Box]) -> tuple[float, float] | None:
    """(recall, IoU) of the area of `looked` against the area of `annotated`, overlaps counted once.

    Recall is the share of the annotated area that was looked at. None where either side has no area.

    >>> region_overlap([(0, 0, 10, 10)], [(5, 0, 15, 10)])    # 50 of 100 covered; 50 shared of 150
    (0.5, 0.3333333333333333)
    """
    corners = [*looked, *annotated]
    if not corners:
        return None
    xs = np.unique([edge for box in corners for edge in (box[0], box[2])])
    ys = np.unique([edge for box in corners for edge in (box[1], box[3])])
    areas = np.outer(np.diff(ys), np.diff(xs))  # the pieces into which all edges cut the plane
    seen, wanted = _pieces(looked, xs, ys), _pieces(annotated, xs, ys)
    shared, target = float(areas[seen & wanted].sum()), float(areas[wanted].sum())
    if not target or not seen.any():
        return None
    return shared / target, shared / float(areas[seen | wanted].sum())


def _pieces(boxes: Sequence[Box], xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Which pieces between the edges xs and ys lie in one of the boxes: bool (len(ys) - 1, len(xs) - 1)."""
    inside = np.zeros((len(ys) - 1, len(xs) - 1), dtype=bool)
    for x1, y1, x2, y2 in boxes:
        inside |= np.outer((ys[:-1] >= y1) & (ys[1:] <= y2), (xs[:-1] >= x1) & (xs[1:] <= x2))
    return inside
