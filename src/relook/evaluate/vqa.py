"""The VQA challenge's scores: exact match after its normalisation, and accuracy against ten people's answers.

Text in, numbers out. Rules and tables are those of the script at `VQA`, written again; a test holds them against it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def _words(text: str) -> list[str]:
    return text.split()


VQA = "https://github.com/GT-Vision-Lab/VQA (PythonEvaluationTools/vqaEvaluation/vqaEval.py)"
_ARTICLES = ("a", "an", "the")
_NUMBERS = {word: str(n) for n, word in enumerate(_words("zero one two three four five six seven eight nine ten"))}
_NUMBERS["none"] = "0"
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTED = _words("""
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""")


def _without_an_apostrophe(word: str) -> list[str]:
    return [word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"]


# "dont" -> "don't"; of words with two apostrophes, either may be missing
_CONTRACTIONS = {key: word for word in _CONTRACTED for key in _without_an_apostrophe(word)}


def vqa_normalise(text: str) -> str:
    """The VQA challenge's normalisation: punctuation, case, number words, articles, contractions (the script at `VQA`).

    A mark of punctuation becomes a space, but goes without one where it stands beside a space, or where the text has a
    number such as 1,000. Periods stay before digits only.

    >>> vqa_normalise("The two dogs, dont they?"), vqa_normalise("1,000.50"), vqa_normalise("red/blue")
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
    """Exact match after the VQA challenge's normalisation of both sides."""
    return float(vqa_normalise(answer) in {vqa_normalise(each) for each in accepted})


def vqa_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """VQA accuracy of one item with the answers of (usually ten) people: min(1, people who agree / 3).

    Averaged over leaving out each person in turn, as the challenge does: with ten answers, one that 1, 2, 3 or 4 of
    them gave is worth 0.3, 0.6, 0.9 or 1 (Antol et al., arXiv 1505.00468, and the script at `VQA`). Fewer than four
    answers could never agree enough; they are scored as `vqa_exact`.
    """
    if len(accepted) < 4:
        return vqa_exact(answer, accepted)
    agrees = [vqa_normalise(each) == vqa_normalise(answer) for each in accepted]
    return sum(min(1.0, (sum(agrees) - one) / 3) for one in agrees) / len(agrees)
