"""Conversations about printed pages, with a finger on the line: for worlds that know where each letter stands.

Three things beside the language model's own loss. Pages also come from real scans (`scans`), cut and shaded at random.
Two kinds of conversation more: `snip` reads a tight window around an answer, `line` reads any line out. And attention
is guided: while an answer is written, one head of an inner layer is asked to look at the letter just written
(`guide[0]`), one of the next layer at the letter to come (`guide[1]`): reading a line becomes copying it.

Knows pages, scans and the language model's attention; not optimisers, not files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

from relook.data.collator import IGNORED
from relook.data.scans import Scan, read_scans
from relook.data.worlds import QA, Area, Box, Page
from relook.data.worlds.receipts import Line
from relook.train.conversation import KINDS, Conversation, Conversations, Teller, union
from relook.train.lines import PAGES_AT_HAND, Lines, clamp, shade
from relook.train.stages import coverage, merge_order

READ_OUT = "Read the text."  # the question of the kind `line`
NEAR = 6  # most tokens that a letter may be seen in


class Documents(Conversations):
    """Conversations with scans, snips, lines and guided attention; see the module."""

    class Options(Conversations.Options):
        real: str | None = None  # folder of scans; absent: synthetic pages only
        share: float = 0.0  # of examples that come from scans, where there are any
        uses: int = 1  # examples per drawn page
        fields: dict[str, float] = {}  # how often a field is asked for, beside 1: long answers cost more and teach less
        guide: tuple[int, int] = (1, 2)  # layers whose first head is guided: to the letter written, to the one to come
        guidance: float = 0.5  # weight
        dense: float = (
            0.0  # share of batches that teach the vision tower letters instead (`lines`), lest it forgets them
        )
        dense_options: dict[str, Any] = {}  # of `lines.Lines`
        condition_std: float | None = None  # start of the clip projector's Linear_c (training-notes: .005)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scans: list[Scan] = read_scans(self.options.real)
        self.drawn = lru_cache(maxsize=2 * PAGES_AT_HAND)(self.draw)
        if self.options.dense > 0:
            inner = self.stage.model_copy(
                update={"name": self.stage.name + "-dense", "options": self.options.dense_options}
            )
            self.reader = Lines(self.model, self.processor, self.world, inner, self.seed)
        if self.options.condition_std is not None:
            torch.nn.init.normal_(self.model.projectors["clip"].linear_condition.weight, std=self.options.condition_std)

    # -- pages

    def page(self, index: int) -> Page:
        """The page of an example: one of PAGES_AT_HAND that take turns, each for `uses` examples."""
        if self.options.uses == 1:
            return self.drawn(index)
        lap = PAGES_AT_HAND * self.options.uses
        return self.drawn(index // lap * PAGES_AT_HAND + index % PAGES_AT_HAND)

    def draw(self, number: int) -> Page:
        """A synthetic page, or a scan cut and shaded at random."""
        from relook.data.worlds import rng

        random = rng(self.seed, self.stage.name, "page", number)
        if self.scans and random.random() < self.options.share:
            page = scan_page(self.scans[int(random.integers(len(self.scans)))], random)
            if page.qas:
                return page
        return super().page(number)

    def kind(self, index: int) -> str:
        from relook.data.worlds import rng

        if rng(self.seed, self.stage.name, "dense", index // self.stage.batch).random() < self.options.dense:
            return "dense"
        return super().kind(index)

    def example(self, index: int) -> dict[str, Any]:
        if self.kind(index) == "dense":
            return {"kind": "dense", "windows": self.reader.example(index)}
        page, random, kind = self.page(index), self.random(index), self.kind(index)
        weights = np.array([self.options.fields.get(qa.field, 1.0) for qa in page.qas])
        qa = page.qas[int(random.choice(len(page.qas), p=weights / weights.sum()))]
        spans = answer_spans(page, qa)
        if kind == "line":
            qa, spans = some_line(page, random)
        item, windows = KINDS[kind](self.teller, page, qa, random)
        row = dict(self.processor.encode_item(item))
        row["kind"], row["answer_from"] = kind, len(row["prompt_ids"])
        if kind in ("read", "snip", "line", "clip") or (kind == "region" and random.random() < 0.25):
            row["labels"] = [IGNORED] * row["answer_from"] + row["labels"][row["answer_from"] :]
        if self.options.place > 0:
            row |= self._truth(row, page, windows, qa)
        if kind in ("read", "snip", "line", "region") and spans:
            row["aim"] = self.aim(row, windows[-1], qa.answer, spans)
        return row

    def aim(self, row: dict[str, Any], window: Box, answer: str, spans: Sequence[Box | None]) -> Tensor:
        """(letters, 1 + NEAR): place of each letter of the answer, and the crop's tokens it is printed in, or -1."""
        ids = np.array(row["input_ids"])
        thw = row["image_grid_thw"][-1].tolist()
        rows, columns = thw[1] // 2, thw[2] // 2
        first = np.flatnonzero(ids == self.model.config.image_token_id)[-rows * columns]
        across, down = columns / (window[2] - window[0]), rows / (window[3] - window[1])
        aims, place, at = [], row["answer_from"], 0
        while place < len(ids) and at < len(answer):
            piece = self.processor.tokenizer.decode([int(ids[place])])
            span = next((s for s in spans[at : at + len(piece)] if s), None)
            if span is not None:
                xs = _cells((span[0] - window[0]) * across, (span[2] - window[0]) * across, columns)
                ys = _cells((span[1] - window[1]) * down, (span[3] - window[1]) * down, rows)
                near = [first + y * columns + x for y in ys for x in xs][:NEAR]
                if near:
                    aims.append([place, *near, *[-1] * (NEAR - len(near))])
            place, at = place + 1, at + len(piece)
        return torch.tensor(aims, dtype=torch.long).view(-1, 1 + NEAR)

    def _truth(self, row: dict[str, Any], page: Page, windows: Sequence[Box], qa: QA) -> dict[str, Tensor]:
        """For every image token: share of its patches that is asked for (n, 4); cell row and column (n, 2).

        The cells are those of the region grid, in which the answer of a locating model is written.
        """
        grid = self.processor.grid_size
        asked, cells = [], []
        for (_, rows, columns), window in zip(row["image_grid_thw"].tolist(), windows, strict=True):
            asked.append(merge_order(coverage(qa.boxes, window, (rows, columns))))
            down = ((np.arange(rows // 2) + 0.5) * grid / (rows // 2)).astype(int)
            right = ((np.arange(columns // 2) + 0.5) * grid / (columns // 2)).astype(int)
            cells.append(np.stack(np.meshgrid(down, right, indexing="ij"), -1).reshape(-1, 2))
        return {
            "asked": torch.tensor(np.concatenate(asked), dtype=torch.float32),
            "places": torch.tensor(np.concatenate(cells)),
        }

    def _place_loss(self, tokens: Tensor, asked: Tensor, places: Tensor, *_: Any) -> Tensor:
        """tokens (n, d), asked (n, 4), places (n, 2); see `_truth`."""
        guess = self.asked_head(tokens)
        weight = torch.tensor(4.0, device=guess.device)
        inside = F.binary_cross_entropy_with_logits(guess, asked, pos_weight=weight)
        rows = F.cross_entropy(self.row_head(tokens), places[:, 0])
        columns = F.cross_entropy(self.column_head(tokens), places[:, 1])
        with torch.no_grad():
            self.note(asked=(guess > 0)[asked > 0.3].float().mean().item(), place=(rows + columns).item() / 2)
        return 4 * inside + 0.5 * (rows + columns)

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if examples[0]["kind"] == "dense":
            return {"dense": self.reader.collate([row["windows"] for row in examples])}
        aims = [row.get("aim", torch.zeros((0, 1 + NEAR), dtype=torch.long)) for row in examples]
        batch = super().collate([{k: v for k, v in row.items() if k != "aim"} for row in examples])
        return {**batch, "aims": aims}

    # -- loss

    def forward(self, aims=(), dense=None, **batch) -> dict[str, Tensor]:  # type: ignore[override]
        if self.options.dense > 0:  # letters teach the tower, conversations do not: their noise would undo it
            self.model.model.visual.requires_grad_(dense is not None)
        if dense is not None:
            return self.reader(**dense)
        if not any(len(aim) for aim in aims):
            return super().forward(**batch)
        caught: dict[int, tuple[Tensor, Any]] = {}
        layers = self.model.model.language_model.layers
        handles = []
        for number in self.options.guide:

            def catch(_module: Any, args: Any, kwargs: Any, number: int = number) -> None:
                caught[number] = (kwargs.get("hidden_states", args[0] if args else None), kwargs["position_embeddings"])

            handles.append(layers[number].self_attn.register_forward_pre_hook(catch, with_kwargs=True))
        try:
            result = super().forward(**batch)
        finally:
            for handle in handles:
                handle.remove()
        written, coming = self.options.guide
        losses = [
            self.guided(layers[written].self_attn, *caught[written], aims, 0, "written"),
            self.guided(layers[coming].self_attn, *caught[coming], aims, -1, "coming"),
        ]
        return {"loss": result["loss"] + self.options.guidance * torch.stack(losses).sum()}

    def figures(self) -> dict[str, float]:
        return super().figures() | (self.reader.figures() if self.options.dense > 0 else {})

    def guided(
        self, attention: Any, states: Tensor, rope: Any, aims: Sequence[Tensor], shift: int, name: str
    ) -> Tensor:
        """Mean of -log(attention of the layer's first head on the tokens aimed at); queries at the places + shift."""
        size = attention.head_dim
        query = attention.q_proj(states)[..., :size].unsqueeze(1)
        key = attention.k_proj(states)[..., :size].unsqueeze(1)
        query, key = (t[:, 0] for t in apply_rotary_pos_emb(query, key, *rope))
        losses = []
        for row, aim in enumerate(aims):
            if len(aim):
                places = aim[:, 0] + shift
                scores = query[row, places] @ key[row].T * size**-0.5
                later = torch.arange(scores.shape[1]) > places[:, None]
                logs = scores.masked_fill(later, -torch.inf).log_softmax(-1)
                at = logs.gather(1, aim[:, 1:].clamp(min=0)).masked_fill(aim[:, 1:] < 0, -torch.inf)
                losses.append(-at.logsumexp(-1))
        loss = torch.cat(losses)
        self.note(**{name: (-loss.detach()).exp().mean().item()})
        return loss.mean()


def _cells(low: float, high: float, count: int) -> range:
    """Cells that an interval touches, at most three, inside 0..count-1."""
    start = max(0, min(count - 1, int(low)))
    return range(start, max(start, min(count - 1, int(high), start + 2)) + 1)


def letter_spans(line: Line) -> list[Box | None]:
    """For each letter of a line the narrow box that says where it is: its width, the middle of the line's height."""
    high = max((b[3] - b[1] for b in line.boxes if b), default=0) / 5
    return [
        None if box is None or centre is None else (box[0], int(centre[1] - high), box[2], int(centre[1] + high))
        for box, centre in zip(line.boxes, line.centres, strict=True)
    ]


def answer_spans(page: Page, qa: QA) -> list[Box | None]:
    """Where each letter of the answer is printed; an empty list where the lines under the box do not spell it."""
    printed: Any = page.meta["lines"]
    lines: list[Line] = [line for line in printed if _lies_in(line.box, qa.boxes)]
    lines.sort(key=lambda line: ((line.box[1] + line.box[3]) // 2, line.box[0]))
    text = ""
    spans: list[Box | None] = []
    for line in lines:
        text += line.text + " "
        spans += [*letter_spans(line), None]
    start = text.find(qa.answer.upper())
    return spans[start : start + len(qa.answer)] if start >= 0 else []


def _lies_in(box: Box, boxes: Sequence[Box]) -> bool:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return any(b[0] <= x <= b[2] and b[1] <= y <= b[3] for b in boxes)


def some_line(page: Page, random: np.random.Generator) -> tuple[QA, list[Box | None]]:
    """A line to read out, not a rule or a lone sign, at most 40 letters."""
    lines: list[Line] = page.meta["lines"]  # type: ignore[assignment]
    for _ in range(30):
        line = lines[int(random.integers(len(lines)))]
        if len(line.text) > 2 and len(set(line.text)) > 2:
            break
    first = int(random.integers(0, max(1, len(line.text) - 39)))
    first = line.text.find(" ", first) + 1 if first else 0
    spans = letter_spans(line)[first : first + 40]
    kept = [s for s in spans if s]
    text = line.text[first : first + 40]
    return QA(READ_OUT, text.strip() or line.text, (union(kept) if kept else line.box,), "line"), spans


def snip(teller: Teller, page: Page, qa: QA, random: np.random.Generator) -> Conversation:
    """As `read`, in a tight window: 4 to 60 pixels around the answer."""
    box = union(qa.boxes)
    left, above, right, below = random.integers(4, 60, 4) if qa.field != "line" else random.integers(1, 16, 4)
    item, _ = teller.region(page, qa, random)
    item["messages"][0]["content"] = teller.ask(qa, "region")
    window = clamp((box[0] - left, box[1] - above, box[2] + right, box[3] + below), page.image.size)
    return {**item, "images": [(page.image, window)]}, [window]


KINDS.update(snip=snip, line=snip)


def scan_page(scan: Scan, random: np.random.Generator) -> Page:
    """A scan as a page: up to 6 % cut from each side, another exposure, letters spaced evenly in their lines."""
    w, h = scan.image.size
    cut = [int(v) for v in random.uniform(0, 0.06, 4) * (w, h, w, h) * (random.random() < 0.7)]
    frame = clamp((cut[0], cut[1], w - cut[2], h - cut[3]), (w, h))
    image = shade(scan.image.crop(frame), random).convert("RGB")
    lines = tuple(_evenly(text, _shifted(box, frame)) for box, text in scan.lines if text.strip())
    qas = tuple(
        replace(qa, boxes=tuple(_shifted(b, frame) for b in qa.boxes))
        for qa in scan.qas
        if qa.boxes and all(_inside(b, frame) for b in qa.boxes)
    )
    areas = tuple(Area(qa.field, qa.boxes[0]) for qa in qas)
    return Page(
        image, qas, (), areas, {"lines": tuple(line for line in lines if _inside(line.box, (0, 0, *image.size)))}
    )


def _evenly(text: str, box: Box) -> Line:
    step = (box[2] - box[0]) / len(text)
    spans = [(int(box[0] + i * step), box[1], int(box[0] + (i + 1) * step + 1), box[3]) for i in range(len(text))]
    boxes = tuple(None if c == " " else s for c, s in zip(text, spans, strict=True))
    middle = (box[1] + box[3]) / 2
    return Line(text, box, boxes, None, tuple(None if b is None else ((b[0] + b[2]) / 2, middle) for b in boxes))


def _shifted(box: Box, frame: Box) -> Box:
    return box[0] - frame[0], box[1] - frame[1], box[2] - frame[0], box[3] - frame[1]


def _inside(box: Box, frame: Box) -> bool:
    return frame[0] <= box[0] < box[2] <= frame[2] and frame[1] <= box[1] < box[3] <= frame[3]
