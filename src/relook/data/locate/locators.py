"""What finds the place of an answer in an image: an OCR engine for documents, a detector for photos.

ocr      the words of a page, by rapidocr-onnxruntime, whose wheel holds its models; `match` says which are the answer
FOLDER   an open-vocabulary detector of transformers (OWLv2, OWL-ViT, Grounding DINO), which looks for what the
         answer names: not for "yes", nor for a number
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from relook.data.items import Question
from relook.data.locate.match import Line, Page, Place, places
from relook.errors import UserError
from relook.regions import clamp_box, iou
from relook.views import open_image

OCR, DETECTOR = "ocr", "detector"
PAGES = 256  # pages whose text is kept
CLEAR = 1.5  # factor by which the best of several detections must exceed the next to be taken for the one meant
UNSEEN = frozenset(["yes", "no", "true", "false", "none", "nothing", "left", "right"])  # answers that name no object


class Locator(Protocol):
    """Finds places of answers. `source`: by what and with which engine, as items store it."""

    source: dict[str, str]

    def places(self, question: Question) -> list[Place]:
        """Where the answer stands: one place, several that are equally good, or none."""


def find_locator(by: str, threshold: float = 0.3) -> Locator:
    """The locator of that name: "ocr", or the folder of a detector.

    Raises:
        UserError: neither; a package that is missing, a folder with another model.
    """
    if by == OCR:
        return Ocr()
    if not Path(by).is_dir():
        raise UserError(
            f"{by!r} is neither {OCR!r} nor a folder; give the folder of a detector (OWLv2, Grounding DINO)"
        )
    return Detector(by, threshold)


class Ocr:
    """Words of a page by rapidocr. The text of a page is kept for its other questions."""

    def __init__(self) -> None:
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise UserError(
                f"OCR needs rapidocr-onnxruntime, which cannot be loaded ({error}); "
                "pip install 'relook[ocr]' (Python below 3.13)"
            ) from None
        self.source = {"by": OCR, "with": f"rapidocr-onnxruntime {version('rapidocr-onnxruntime')}"}
        self._engine = RapidOCR()
        self._kept = lru_cache(PAGES)(self._read)

    def places(self, question: Question) -> list[Place]:
        page = self._kept(question.image) if isinstance(question.image, str) else self._read(question.image)
        return places(page, question.answers, f"{question.text} {question.field or ''}")

    def _read(self, image: Any) -> Page:
        import numpy as np

        pixels = np.asarray(open_image(image))[:, :, ::-1]  # the engine takes BGR
        found, _ = self._engine(np.ascontiguousarray(pixels), return_word_box=True)
        return Page([read_line(*each[:4]) for each in found or ()])


def read_line(quad: Sequence[Sequence[float]], text: str, score: float, boxes: Sequence[Any]) -> Line:
    """A line as the engine reads it: its corners, text, score, and the corners of each character."""
    xs, ys = zip(*quad, strict=True)
    left, top, right, bottom = math.floor(min(xs)), math.floor(min(ys)), math.ceil(max(xs)), math.ceil(max(ys))
    if bottom - top > 1.5 * (right - left):  # runs down: no part of it has a box of its own
        edges = [left] * len(text)
    elif len(boxes) == len(text):
        edges = sorted(min(x for x, _ in box) for box in boxes)
    else:
        edges = [left + (right - left) * i // len(text) for i in range(len(text))]
    return Line(text, (left, top, right, bottom), float(score), (*edges, right))


class Detector:
    """Boxes of what an answer names, by a zero-shot detector of transformers."""

    def __init__(self, folder: str, threshold: float) -> None:
        import torch
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        try:
            self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
            self._model = AutoModelForZeroShotObjectDetection.from_pretrained(folder, local_files_only=True).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(
                f"{folder}: no open-vocabulary detector ({' '.join(str(error).split())[:99]}); "
                "expected OWLv2, OWL-ViT or Grounding DINO"
            ) from error
        self.source = {"by": DETECTOR, "with": self._model.config.model_type}
        self._threshold, self._torch = threshold, torch

    def places(self, question: Question) -> list[Place]:
        phrase = question.answer.strip().strip(".").lower()
        if phrase in UNSEEN or not any(map(str.isalpha, phrase)):
            return []
        image = open_image(question.image)
        inputs = self._processor(images=image, text=[[phrase]], truncation=True, return_tensors="pt")
        with self._torch.inference_mode():
            outputs = self._model(**inputs)
        (found,) = self._processor.post_process_grounded_object_detection(
            outputs, threshold=self._threshold, target_sizes=[(image.height, image.width)]
        )
        every = sorted(zip(found["scores"].tolist(), found["boxes"].tolist(), strict=True), reverse=True)
        kept: list[Place] = []
        for score, box in every:
            place = Place(clamp_box(box, image.size), round(score, 3), phrase)
            if score * CLEAR > every[0][0] and all(iou(place.box, other.box) < 0.5 for other in kept):
                kept.append(place)
        return kept
