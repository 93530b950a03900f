"""Validation of a stage's model while it learns: its loss on held-out examples, and its own looks at real questions.

Examples come from the objective (`Objective.eval`) and are run as in training, without learning. An objective of
conversations also has questions, which the model answers: logged are the share of its answers that looked, and how well
the regions it named cover what is annotated (IoU of the named cells with the box around all annotated boxes; none where
no region was named). Some of the answers are drawn. All of it leaves weights and random states as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch

from relook.data.collate import SkippedSample
from relook.data.forms import read_questions
from relook.data.items import Question
from relook.data.settings import nested
from relook.errors import RelookError, UserError
from relook.model.segments import ranks_synchronised
from relook.regions import Box, cells_in, iou, union, upright
from relook.trace import Answer, region_turns
from relook.train import distributed
from relook.train.checkpoints import Checkpoints, StageModel
from relook.train.metrics import means
from relook.train.objective import Objective, learnt_tokens, run_batch
from relook.train.recipe import Validation

ANNOTATED = (0, 190, 70)  # colour of the annotated box
LONGEST_ANSWER = 64  # tokens of a turn


class Validator:
    """Figures of a model while it learns.

    Args:
        objective, trained, checkpoints: of the stage; batches and questions are drawn once.
        plan: how many of what.
    """

    def __init__(self, objective: Objective, trained: StageModel, plan: Validation, checkpoints: Checkpoints) -> None:
        self.objective, self.trained, self.plan, self.checkpoints = objective, trained, plan, checkpoints

    def __call__(self, step: int, prepare: Callable[[Any], Any]) -> dict[str, float]:
        """`eval_loss`, the objective's own figures, and those of the questions; `prepare` moves a batch to the model.

        Figures that are not defined (no region was named) are left out.
        """
        self.trained.module.eval()
        figures = self._losses(prepare)
        # where weights are sharded, processes would have to answer in step: they do not
        if self.objective.converses and self.plan.questions and not ranks_synchronised():
            figures |= self._answers(step)
        self.trained.module.train()
        return {f"eval_{name}": value for name, value in figures.items()}

    # -- loss

    def _losses(self, prepare: Callable[[Any], Any]) -> dict[str, float]:
        reported, total = list[Any](), 0.0
        with torch.no_grad():
            for weight, batch in self.batches:
                loss, figures = run_batch(self.objective, self.trained.module, prepare(batch))
                reported.append(figures)
                total += weight * float(loss)
        return {"loss": total / sum(weight for weight, _ in self.batches), **means(reported)}

    @cached_property
    def batches(self) -> list[tuple[int, Any]]:
        """The batches in which something is learnt, with their weights: learnt tokens, or examples, as the stage says.

        Raises:
            UserError: there are none; those left out are named.
        """
        stage, held = self.objective.stage, self.objective.eval
        name, found, left_out = f"stage {stage.name!r}: {stage.objective}", [], list[SkippedSample]()
        if not len(held):
            raise UserError(f"{name} holds no examples out for validation")
        for start in range(0, len(held), stage.batch):
            examples = [held[i] for i in range(start, min(start + stage.batch, len(held)))]
            skipped = [one for one in examples if isinstance(one, SkippedSample)]
            left_out += skipped
            batch = self.objective.collate(examples)
            if tokens := learnt_tokens(batch):
                by_tokens = stage.average == "tokens" and "labels" in batch
                found.append((tokens if by_tokens else len(examples) - len(skipped), batch))
        if left_out:
            said = f"{len(left_out)} of {len(held)} validation items are left out of eval_loss (the first: "
            said += f"{left_out[0].where}: {left_out[0].what})"
            if not found:
                raise UserError(f"{name}: {said}; none is left: mend them, raise max_length or choose other items")
            distributed.say(f"{stage.name}: {said}")
        return found

    # -- questions

    @cached_property
    def asked(self) -> list[Question]:
        """The questions of a file, or of the objective."""
        path = self.plan.path
        return list(islice(self.objective.questions() if path is None else read_questions(path), self.plan.questions))

    def _answers(self, step: int) -> dict[str, float]:
        from relook.perceive import VLM

        model, processor = self.trained.model, self.trained.processor
        with _without_autocast(model):
            answers = ask(VLM(model, processor, f"{self.objective.stage.name} at step {step}"), self.asked)
        pairs = [(answer, question) for answer, question in zip(answers, self.asked, strict=True) if answer is not None]
        figures = [
            {
                "look_rate": float(any(look.problem is None for look in answer.looks)),
                "region_iou": region_iou(answer, question.boxes, processor.grid_size, nested(processor) > 1),
            }
            for answer, question in pairs
        ]
        folder = self.checkpoints.place / "pictures"
        drawn = [picture(*pair) for pair in pairs[: self.plan.pictures]] if distributed.main() else []
        with self.checkpoints.writing(folder):
            for number, image in enumerate(drawn, 1):
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"step-{step}-{number}.png")
        return {"failed": float(sum(answer is None for answer in answers)), **means(figures)}


@contextmanager
def _without_autocast(model: Any) -> Iterator[None]:
    """The model's own forward, where accelerate has replaced it by one with autocast: answers are as after training."""
    wrapped = model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped


def ask(vlm: Any, questions: list[Question]) -> list[Answer | None]:
    """The model's answers with its own looks; None for a question that could not be asked (alone, if need be)."""
    requests = [{"image": q.image, "question": q.text} for q in questions]
    try:
        return list(vlm.ask_many(requests, max_new_tokens=LONGEST_ANSWER))
    except RelookError:
        if len(questions) == 1:
            return [None]
        return [answer for question in questions for answer in ask(vlm, [question])]


def region_iou(answer: Answer, boxes: tuple[Box, ...], grid: int, nested: bool = False) -> float:
    """IoU of the box around all regions named (in the last turn, where they nest) with the box around all annotated
    ones; nan without either."""
    turns = region_turns(answer.looks, nested)
    if not boxes or answer.image is None or not turns:
        return math.nan
    whole = (0, 0, *upright(answer.image).size)
    named = [cells_in(look.cells, look.frame or whole, grid) for look in turns[-1] if look.cells is not None]
    return iou(union(named), union(boxes))


def picture(answer: Answer, question: Question) -> Any:
    """The answer as `render` draws it (what it looked at in colour), with the annotated boxes in green."""
    from PIL import ImageDraw

    from relook.render import render

    assert answer.image is not None
    image = upright(answer.image).convert("RGB").copy()
    draw, width = ImageDraw.Draw(image), max(1, round(max(image.size) / 300))
    for x1, y1, x2, y2 in question.boxes:
        draw.rectangle((x1 - width, y1 - width, x2 + width - 1, y2 + width - 1), outline=ANNOTATED, width=width)
    return render(replace(answer, image=image, question=f"{answer.question}  [annotated: {question.answer}]"))
