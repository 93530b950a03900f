"""A file of questions to a file of answers, one line each, which an interrupted command goes on with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from relook.data.forms import Source
from relook.data.items import Item, column, item_question
from relook.data.reader import folder_of, readable
from relook.errors import RelookError, UserError
from relook.io import append_lines, read_lines
from relook.options import AskOptions

AT_ONCE = 8
_SAME = ("image", "question", "model", "options")  # of a line that was answered before


def ask_file(
    vlm: Any,
    questions: str | Path,
    out: str | Path,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    **options: Any,
) -> tuple[int, int]:
    """Ask every question of a file and append each answer to `out` (JSON lines); what is there already is not asked.

    A line of `out` has `number` (from 1), `image`, `question`, `model`, `options` (what is not left to the model), and
    `answer` with its `looks` and `finish`, or `error` where the question could not be asked.

    Args:
        questions: records with an image and a question (by their usual names), or items. Images of a Parquet file
            may be in it ({"bytes", "path"}).
        options: of `ask`, for all.

    Returns:
        How many lines there are, and how many of them are errors.

    Raises:
        UserError: a record without image or question; lines in `out` that answer something else.
        RelookError: not one question could be asked.
    """
    out = Path(out)
    if out.resolve() == Path(questions).resolve():
        raise UserError(f"{out} is the file of questions; give another place for the answers")
    asked, said = list(_questions(questions)), _said(options)
    out.parent.mkdir(parents=True, exist_ok=True)
    before = {line.get("number"): line for line in read_lines(out)}
    for number, line in before.items():
        now = _line(asked[number - 1], vlm.name) | said if number in range(1, len(asked) + 1) else {}
        if differs := [key for key in _SAME if line.get(key) != now.get(key)]:
            raise UserError(
                f"{out}: answer {number} has the {differs[0]} {line.get(differs[0])!r}, but it would be "
                f"{now.get(differs[0])!r}; give another place for the answers"
            )
    waiting = iter([(number, each) for number, each in enumerate(asked, 1) if number not in before])
    failed, done = sum("error" in line for line in before.values()), len(before)
    while several := list(islice(waiting, AT_ONCE)):
        progress(Path(questions).name, done, len(asked))
        lines = [line | said for line in _answered(vlm, several, folder_of(questions), options)]
        append_lines(out, lines)
        failed, done = failed + sum("error" in line for line in lines), done + len(lines)
    progress(Path(questions).name, done, len(asked))
    if failed == done:
        raise RelookError(f"not one of {done} questions was answered; the errors are in {out}")
    return done, failed


def _questions(path: str | Path) -> Iterator[dict[str, Any]]:
    source = Source(Path(path))
    rows = source.streams and source.form.name in ("questions", "hub")  # which may have no answers
    for record in map(readable, source.records() if rows and source.form.name == "hub" else source.scan()):
        if rows and "messages" not in record.value:
            image, text = (column(record.value, name, {}) for name in ("image", "question"))
            image = image[0] if isinstance(image, list) and len(image) == 1 else image
        else:
            thing = source.thing(record)
            found = item_question(thing) if isinstance(thing, Item) else thing
            image, text = (None, None) if found is None else (found.image, found.text)
        if not isinstance(image, str | dict) or not isinstance(text, str) or not text.strip():
            several = f"{len(image)} images, and" if isinstance(image, list) else ""
            raise UserError(
                f"{record.where}: has {several} the keys {', '.join(record.value)}; expected an image and a question"
            )
        yield {"image": image, "question": text}


def _said(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a line says of the options that differ from those of every question; nothing where none does."""
    given = AskOptions.of(options).model_dump(exclude_defaults=True, exclude={"fetch"}, mode="json")
    return {"options": given} if given else {}


def _line(asked: dict[str, Any], model: str) -> dict[str, str]:
    """What a line says of its question; an image that is in the file itself has the path it came with, or a digest."""
    image = asked["image"]
    if isinstance(image, dict):
        image = image.get("path") or hashlib.sha256(image.get("bytes") or b"").hexdigest()
    return {"image": image, "question": asked["question"], "model": model}


def _answered(
    vlm: Any, several: list[tuple[int, dict[str, Any]]], folder: Path, options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The lines of several questions; where one of them cannot be asked, each is asked alone."""
    pairs = [each | {"image": _placed(each["image"], folder)} for _, each in several]
    try:
        answers: list[Any] = vlm.ask_many(pairs, batch_size=len(pairs), **options)
    except RelookError as error:
        if len(several) > 1:
            for one in several:
                yield from _answered(vlm, [one], folder, options)
            return
        answers = [error]
    for (number, each), answer in zip(several, answers, strict=True):
        line: dict[str, Any] = {"number": number, **_line(each, vlm.name)}
        if isinstance(answer, RelookError):
            yield line | {"error": str(answer).removeprefix("question 0: ")}  # of one that was asked alone
        else:
            looks = [look.to_dict(False) for look in answer.looks]
            yield line | {"answer": answer.text, "looks": looks, "finish": answer.finish}


def _placed(image: Any, folder: Path) -> Any:
    if isinstance(image, dict):  # an image column
        return image["bytes"] if image.get("bytes") is not None else _placed(str(image.get("path")), folder)
    return image if image.startswith(("data:", "http://", "https://")) else str(folder / image)
