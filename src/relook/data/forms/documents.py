"""Documents with their fields: DocVQA, FUNSD, CORD.

DocVQA (and InfographicVQA): one object {"data": [{"questionId", "question", "image", "answers"}]}.
https://rrc.cvc.uab.es/?ch=17&com=tasks

FUNSD: a file a page {"form": [{"id", "box": [x1, y1, x2, y2], "text", "label": "question", "linking": [[1, 2]]}]}: a
question of the page asks for the answer that is linked to it. https://guillaumejaume.github.io/FUNSD/work/

CORD: a file a receipt {"valid_line": [{"category": "total.total_price", "group_id", "words": [{"quad": {x1, ...},
"text", "is_key"}]}], "meta": {"image_size"}}: the words of a category that are no key. https://github.com/clovaai/cord
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from relook.data.forms.annotated import (
    Found,
    Reading,
    Region,
    around,
    json_pages,
    numbers,
    object_list,
    page_questions,
)
from relook.data.items import LeftOut, Question
from relook.data.reader import Record, read_members

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")


def read_docvqa(path: Path, reading: Reading) -> Iterator[Found]:
    """The questions of a file of DocVQA; those of its test set have no answers and are left out."""
    for record in read_members(path, "data"):
        data, where = record.value, record.where
        name = str(data.get(reading.columns.get("image", "image")) or data.get("image_local_name") or "")
        if not data.get("answers") and "answers" not in reading.columns.values():
            yield LeftOut(where, "form", "has no 'answers'; the test set's are not published")
            continue
        columns = {ours: theirs for ours, theirs in reading.columns.items() if ours != "image"}
        image = reading.image(path, name, name.rpartition("/")[2])
        yield Question.from_dict({**data, "image": image}, where, columns)


def _funsd_page(record: Record, file: Path, reading: Reading) -> Iterator[Found]:
    """The questions of a page with the answers that are linked to them."""
    where = record.where
    entities = {each.get("id"): each for each in object_list(record.value["form"], "form", where)}
    regions = []
    for key, entity in entities.items():
        links = [pair[1] for pair in entity.get("linking") or () if pair[0] == key and pair[1] in entities]
        answers = [entities[to] for to in links if entities[to].get("label") == "answer"]
        text = " ".join(str(answer.get("text", "")) for answer in answers).strip()
        if entity.get("label") == "question" and text:
            label = str(entity.get("text", "")).strip().rstrip(":").strip()
            box = around([numbers(a["box"], where)[at : at + 2] for a in answers for at in (0, 2)])
            regions.append(Region(label, box, text))
    yield from page_questions(_image(reading, file), None, regions, where, reading)


def _cord_page(record: Record, file: Path, reading: Reading) -> Iterator[Found]:
    """The fields of a receipt."""
    where = record.where
    regions = [_line(line, where) for line in object_list(record.value["valid_line"], "valid_line", where)]
    size = (record.value.get("meta") or {}).get("image_size") or {}
    asked = [region for region in regions if region.text]
    sides = (size.get("width"), size.get("height"))
    yield from page_questions(_image(reading, file), sides, asked, where, reading)


read_funsd = json_pages("form", "FUNSD", _funsd_page)
read_cord = json_pages("valid_line", "CORD", _cord_page)


def _line(line: Mapping[str, Any], where: str) -> Region:
    said = [word for word in object_list(line.get("words"), "words", where) if not word.get("is_key")]
    corners = []
    for word in said:
        quad = word.get("quad") or {}
        corners += [numbers([quad.get(f"x{n}"), quad.get(f"y{n}")], where) for n in range(1, 5)]
    text = " ".join(str(word.get("text", "")) for word in said).strip()
    return Region(str(line.get("category") or ""), around(corners) if corners else None, text)


def _image(reading: Reading, file: Path) -> str:
    """The image of a file of annotations: the one of its name."""
    return reading.image(file, *(f"{file.stem}{suffix}" for suffix in PICTURES))
