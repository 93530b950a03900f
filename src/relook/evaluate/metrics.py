"""Scores of one answer: each entry of `SCORERS` takes an answer and all accepted ones and returns 0 to 1; and how
regions overlap.

Two answers are compared after a normalization: `normalize` (case and space), `vqa_normalize` (that of the VQA
challenge), numbers, letters, yes and no. Scores that are defined for a whole split only (F1) are in `split_metrics`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation

import numpy as np

from relook.errors import UserError
from relook.regions import Box

Scorer = Callable[[str, Sequence[str]], float]

# ---- the same text


def normalize(text: str) -> str:
    """Lower case, white space runs as one space, none at the ends: the only differences that exact match forgives.

    >>> normalize(" Sin  Thye\\n& Co ")
    'sin thye & co'
    """
    return re.sub(r"\s+", " ", text).strip().casefold()


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1.0 where the normalized answer is one of the normalized accepted ones, else 0.0."""
    return float(normalize(answer) in {normalize(each) for each in accepted})


def anls(answer: str, accepted: Sequence[str], threshold: float = 0.5) -> float:
    """Average Normalised Levenshtein Similarity of one item: best over the accepted answers.

    With NL = edit distance / length of the longer, after `normalize`: 1 - NL where NL < threshold, else 0
    (Biten et al., "Scene Text Visual Question Answering", arXiv 1905.13648, section 4).

    >>> anls("9,30", ["9.30"])    # one edit in four characters
    0.75
    """
    distance = _rapidfuzz("ANLS").Levenshtein.normalized_distance
    best = min(distance(normalize(answer), normalize(each)) for each in accepted)
    return 1.0 - best if best < threshold else 0.0


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
    spaced = re.sub(r"[\n\t]", " ", text).strip()
    thousands = re.search(r"\d,\d", spaced) is not None
    out = spaced
    for mark in _MARKS:
        gone = thousands or f"{mark} " in spaced or f" {mark}" in spaced
        out = out.replace(mark, "" if gone else " ")
    words = (_NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", out).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_exact(answer: str, accepted: Sequence[str]) -> float:
    """Exact match after the VQA challenge's normalization of both sides."""
    return float(vqa_normalize(answer) in {vqa_normalize(each) for each in accepted})


def vqa_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """VQA accuracy of one item with the answers of (usually ten) people: min(1, people who agree / 3).

    Averaged over leaving out each person in turn, as the challenge does: with ten answers, one that 1, 2, 3 or 4 of
    them gave is worth 0.3, 0.6, 0.9 or 1 (Antol et al., arXiv 1505.00468, and the script at `VQA`). Fewer than four
    answers could never agree enough; they are scored as `vqa_exact`.
    """
    if len(accepted) < 4:
        return vqa_exact(answer, accepted)
    agrees = [vqa_normalize(each) == vqa_normalize(answer) for each in accepted]
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
    text = text.strip()
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


_CURRENCIES = frozenset(
    ("rm", "myr", "usd", "us", "sgd", "s", "eur", "gbp", "jpy", "cny", "rmb", "inr", "rs", "aud", "a", "cad", "chf")
    + ("idr", "rp", "thb", "php", "hkd", "hk", "nzd", "krw", "vnd", "twd", "nt")
)
_NUMBER = re.compile(r"-?\d[\d.,' ]*\d|-?\d")


def amount(answer: str, accepted: Sequence[str]) -> float:
    """1.0 where the answer is an accepted amount of money, however it is written; else exact match.

    "RM 9.00", "9.00", "$9" and "9,00" are the same amount as "9.00"; "1,234.50" and "1.234,50" are one too. Two
    amounts in two named currencies differ, and so do texts with more than a number and a currency in them.

    >>> amount("RM 9.00", ["9.00"]), amount("$9.00", ["RM 9.00"]), amount("9.10", ["9.00"])
    (1.0, 0.0, 0.0)
    """
    said = read_amount(answer)
    wanted = [known for each in accepted if (known := read_amount(each)) is not None]
    if said is None or not wanted:
        return exact_match(answer, accepted)
    return float(any(said[0] == value and (not said[1] or not unit or said[1] == unit) for value, unit in wanted))


def read_amount(text: str) -> tuple[Decimal, str] | None:
    """(number, currency as written or "") of a text that is nothing but these; None for any other."""
    numbers = _NUMBER.findall(text)
    if len(numbers) != 1:
        return None
    rest = text.replace(numbers[0], " ", 1).lower().replace(".", " ")
    letters = re.findall(r"[^\W\d_]+", rest)
    signs = [c for c in rest if unicodedata.category(c) == "Sc"]
    others = [c for c in rest if not c.isalpha() and not c.isspace() and unicodedata.category(c) != "Sc"]
    if others or not set(letters) <= _CURRENCIES:
        return None
    try:
        return Decimal(_decimal(numbers[0])), "".join([*letters, *signs])
    except InvalidOperation:
        return None


def _decimal(number: str) -> str:
    """A written number with a point before its decimals and no other mark.

    The last point or comma stands before decimals if it is the only one of its kind and two digits or one follow, or if
    both kinds occur; else it separates thousands.
    """
    number = re.sub(r"[' ]", "", number)
    last = max(number.rfind("."), number.rfind(","))
    if last < 0:
        return number
    mark, decimals = number[last], len(number) - last - 1
    both = "." in number and "," in number
    is_point = number.count(mark) == 1 and (both or decimals <= 2 or mark == ".")
    whole = re.sub(r"[.,]", "", number[:last])
    return f"{whole}.{number[last + 1 :]}" if is_point else whole + number[last + 1 :]


# ---- one of a few


def read_yes_no(answer: str) -> str | None:
    """ "yes" or "no" as POPE reads an answer: the first sentence, "no" where it holds no or not. None: neither.

    POPE's own script (https://github.com/RUCAIBox/POPE, evaluate.py) takes whatever is not a no for a yes; here an
    answer that says neither is neither, and wrong.

    >>> read_yes_no("Yes, there is."), read_yes_no("There is not."), read_yes_no("A dog.")
    ('yes', 'no', None)
    """
    words = re.findall(r"[a-z']+", answer.lower().split(".")[0])
    if "no" in words or "not" in words or any(word.endswith("n't") for word in words):
        return "no"
    return "yes" if "yes" in words else None


def yes_no(answer: str, accepted: Sequence[str]) -> float:
    """1.0 where the answer says yes or no as the accepted one does."""
    said = read_yes_no(answer)
    return float(said is not None and said in {read_yes_no(each) for each in accepted})


_LETTER = (
    re.compile(r"^\W*([A-Z])\W*$"),  # "B", "(B)", "B."
    re.compile(r"^\(?([A-Z])[).:]"),  # "B) rubber", "B. rubber"
    re.compile(r"\b(?:answer|option|choice)(?: is)?:? *\(?([A-Z])\b(?! [a-z])", re.IGNORECASE),  # "The answer is B."
    re.compile(r"\(([A-Z])\)"),  # "... (B)"
)


def read_letter(answer: str) -> str | None:
    """The option's letter that an answer names; None where it names none, or several.

    A letter that may be a word is none: "A red one" is not option A.

    >>> read_letter("(B) rubber"), read_letter("The answer is C."), read_letter("A red one"), read_letter("(A) or (B)")
    ('B', 'C', None, None)
    """
    text = answer.strip()
    for number, pattern in enumerate(_LETTER):
        found = set(pattern.findall(text.upper() if number == 0 else text))
        named = {letter.upper() for letter in found}
        if named:
            several = named | set(_LETTER[-1].findall(text))
            return named.pop() if len(several) == 1 else None
    return None


def choice(answer: str, accepted: Sequence[str]) -> float:
    """Multiple choice: 1.0 where the answer names the accepted letter, or else says the accepted option's words.

    `accepted` is the letter, then (where known) the option's text: ("B", "rubber").
    """
    letter, *texts = accepted
    named = read_letter(answer)
    if named is not None:
        return float(named == letter.strip(" ().").upper())
    return float(vqa_normalize(answer) in {vqa_normalize(each) for each in texts})


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
