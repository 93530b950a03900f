"""The image paths, sizes and boxes in pixels that questions and items get in a file that is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from relook.data.images import ImageFinder, file_size, place_image, relative, with_file
from relook.data.items import Item, Question, image_size
from relook.errors import UserError, naming

if TYPE_CHECKING:
    from relook.data.build import BuildReport

ViewOf = Callable[[tuple[int, int]], tuple[int, int]]


class Placer:
    """Gives questions and items the image paths and sizes that they have in the built file.

    Args:
        home: folder of the source's relative paths.
        target: the built file; paths are rewritten to hold from its folder, unless there is an `image_root`.
        images: folders by dataset, in which images are looked up by name first.
        view: the size of a model's view of an image of some size, of which "resized" boxes are.
    """

    def __init__(
        self,
        home: Path,
        target: Path,
        image_root: str | Path | None,
        images: dict[str, Path] | None,
        to: BuildReport,
        view: ViewOf | None = None,
    ) -> None:
        self.view = view
        self.root, self.target, self.strict, self.report = Path(image_root or home), target, image_root is not None, to
        self.finder = ImageFinder(images or {})
        self.sizes: dict[str, tuple[int, int] | None] = {}
        self.absent: set[str] = set()

    def __call__(self, thing: Question | Item) -> Question | Item | None:
        """The same with paths for the target; None for a question whose image is not the one its boxes are of."""
        with naming(thing.where):
            if isinstance(thing, Item):
                return thing.map_images(lambda ref: with_file(ref, lambda file: self.paths(file)[1]))
            if not isinstance(thing.image, str):
                return self.boxed(thing)
            here, written = self.paths(thing.image)
        try:
            if here not in self.sizes:
                self.sizes[here] = file_size(here)
        except UserError as error:
            self.report.left_out.append(f"{thing.where}: {error}")
            return None
        sized = self.sized(thing, here)
        return None if sized is None else replace(self.boxed(replace(sized, image=here)), image=written)

    def boxed(self, question: Question) -> Question:
        """The question with its boxes in pixels, counted."""
        if self.view is not None and question.written and question.view is None:
            question = replace(question, view=self.view(image_size(question)))
        return question.in_pixels(self.report.fit)

    def paths(self, file: str) -> tuple[str, str]:
        """Where an image file is from here, and its path in the target."""
        if file.startswith("data:"):
            return file, file
        if found := self.finder.find(file):
            return found, relative(found, self.target.parent)
        here = str(place_image(file, self.root, strict=self.strict))
        return here, file if self.strict or os.path.isabs(file) else relative(here, self.target.parent)

    def sized(self, question: Question, here: str) -> Question | None:
        """The question with the size of its image file, where that is at hand."""
        real, stated, note = self.sizes[here], question.size, self.report.note
        if real is None:
            if here not in self.absent:
                note("images not at hand, sizes not held against them", f"{question.where}: {here}")
                self.absent.add(here)
            if stated is None and (question.boxes or question.written):
                raise UserError(
                    f"{question.where}: no image at {here} and no width and height; give the images, or state the size"
                )
            return question
        if not same_size(question, here, real):
            note("images of another size than their boxes were drawn on, left out", f"{question.where}: {here}")
            return None
        return replace(question, size=real, slack=(0, 0))


def same_size(question: Question, here: str, real: tuple[int, int]) -> bool:
    """Whether the image at `here` has the size that a question states.

    Raises:
        UserError: it has another one, and the question does not say that it may.
    """
    stated = question.size or real
    if all(abs(r - s) <= off for r, s, off in zip(real, stated, question.slack, strict=True)):
        return True
    if question.slack == (0, 0):
        raise UserError(
            f"{question.where}: {here} is {real[0]} x {real[1]}, but width and height say {stated[0]} x {stated[1]}; "
            "boxes of another size would name the wrong cells"
        )
    return False
