"""PageConversations about printed pages, with a finger on the line: for worlds that know where each letter stands.

Four things beside the language model's own loss. Pages also come from real scans (`scans`), cut and shaded at random.
The region that is taught takes in what stands beside the answer in its rows ("TOTAL" goes with its amount). Two kinds
of conversation more: `snip` reads a tight window around an answer, `line` reads any line out. And attention is guided:
while an answer is written, one head of an inner layer is asked to look at the letter just written (`guide[0]`), one of
the next layer at the letter to come (`guide[1]`), and a third, while a region is named, at what is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

from relook.data.collate import IGNORED
from relook.io import rng
from relook.looks import look_turn, parse_calls, write_call
from relook.regions import Cells, box_to_cells, cells_in, closer, union
from relook.train.objective import Setup
from zoo.objectives.conversation import (
    KINDS,
    Conversation,
    ConversationHeads,
    PageConversations,
    Teller,
    shaken,
    turns,
    whole,
)
from zoo.objectives.lines import PAGES_AT_HAND
from zoo.objectives.pages import coverage, merge_order
from zoo.objectives.pieces import beside, clamp, cut, shade
from zoo.scans import Scan, read_scans
from zoo.worlds import QA, Area, Box, Page
from zoo.worlds.receipts import Line
from zoo.worlds.sheets import on_sheet

READ_OUT = "Read the text."  # the question of the kind `line`
NEAR = 8  # most tokens that a letter, or what is asked for, may be seen in
NARROW = 0.25  # share of crops that show the annotated boxes alone, as somebody's own region might


class RowTeller(Teller):
    """Teaches regions with what stands beside the answer; sometimes shows the answer's own region all the same.

    Without `rows` it teaches and shows the answer's own region alone. With probability `drift` a region with its rows
    is shown higher or lower than it is taught, as far as the answer stays in sight: as a model that misses by a little
    will see it, so that what is read is found by what stands beside it and not by its place in the crop.
    """

    def __init__(self, processor: Any, jitter: float, rows: bool = True, drift: float = 0.0) -> None:
        super().__init__(processor, jitter)
        self.rows, self.drift = rows, drift

    def cells(self, page: Page, qa: QA) -> Cells:
        lines: Any = page.meta.get("lines", ()) if self.rows else ()
        box = beside(qa.boxes, [line.box for line in lines])
        return box_to_cells(box, page.image.size, self.processor.grid_size)

    def shown(self, page: Page, qa: QA, taught: Cells, random: np.random.Generator) -> Cells:
        own = super().cells(page, qa)
        if random.random() < NARROW:
            return own
        if not self.drift or random.random() >= self.drift:  # no draw without drift: older recipes see what they saw
            return taught
        (x0, top, x1, bottom), margin, last = taught, self.processor.region_margin, self.processor.grid_size - 1
        highest, lowest = max(own[3] - bottom - margin, -top), min(own[1] - top + margin, last - bottom)
        by = int(random.integers(highest, lowest + 1)) if highest <= lowest else 0
        return x0, top + by, x1, bottom + by

    def first_region(self, page: Page, qa: QA, random: np.random.Generator) -> tuple[Cells, Box]:
        """The first call that is taught, and the box of the page that is shown for it."""
        taught = self.cells(page, qa)
        return taught, self.crop(page, self.shown(page, qa, taught, random), random)

    def closer(self, qa: QA, seen: Box) -> Cells | None:
        """The call for the answer inside a view of the page; None where it would show more than half of the view.

        Only what of the answer the view shows can be named.
        """
        grid, margin = self.processor.grid_size, self.processor.region_margin
        box = union(qa.boxes)
        box = max(box[0], seen[0]), max(box[1], seen[1]), min(box[2], seen[2]), min(box[3], seen[3])
        if box[0] >= box[2] or box[1] >= box[3]:
            return None
        return closer(box, seen, grid, margin)

    def chain(self, page: Page, qa: QA, random: np.random.Generator) -> Conversation:
        """The region with the answer's rows, then the answer inside it, where that is small beside the view."""
        grid, margin = self.processor.grid_size, self.processor.region_margin
        first, seen = self.first_region(page, qa, random)
        calls, windows = [write_call("region", first, grid)], [whole(page), seen]
        if (cells := self.closer(qa, seen)) is not None:
            calls.append(write_call("region", cells, grid))
            windows.append(cells_in(shaken(cells, random, self.jitter, grid), seen, grid, margin))
        replies = [(call, look_turn(parse_calls(call, grid))) for call in calls]
        images = [page.image, *((page.image, box) for box in windows[1:])]
        return turns(self.processor, self.ask(qa, "region"), [*replies, (qa.answer, "")], images), windows

    def near(self, page: Page, qa: QA, random: np.random.Generator) -> Conversation:
        """A chain without its first look: what the first region shows is the only image, and the call for less of it.

        Where no closer look is taken, the answer is read.
        """
        grid = self.processor.grid_size
        _, seen = self.first_region(page, qa, random)
        cells = self.closer(qa, seen)
        said = qa.answer if cells is None else write_call("region", cells, grid)
        return turns(self.processor, self.ask(qa, "region"), [(said, "")], [(page.image, seen)]), [seen]


class Documents(PageConversations):
    """PageConversations with scans, snips, lines and guided attention; see the module."""

    class Options(PageConversations.Options):
        rows: bool = True  # regions take in what stands beside the answer
        drift: float = (
            0.0  # chance that such a region is shown higher or lower than it is taught, the answer still in it
        )
        resize: float = 0.0  # scans are made larger or smaller by up to this share
        real: str | None = None  # folder of scans; absent: synthetic pages only
        part: tuple[int, int] | None = None  # of these, see `read_scans`; absent: all
        share: float = 0.0  # of examples that come from scans, where there are any
        sheets: float = 0.0  # of pages and scans that are shown small on a larger sheet, see worlds.sheets
        uses: int = 1  # examples per drawn page
        fields: dict[str, float] = {}  # how often a field is asked for, beside 1: long answers cost more and teach less
        guide: tuple[int, int] = (1, 2)  # layers whose first head is guided: to the letter written, to the one to come
        guidance: float = 0.5  # weight
        condition_std: float | None = None  # start of the clip projector's Linear_c (training-notes: .005)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.teller = RowTeller(self.processor, self.options.jitter, self.options.rows, self.options.drift)
        self.scans: list[Scan] = read_scans(self.options.real, part=self.options.part)
        self.drawn = lru_cache(maxsize=2 * PAGES_AT_HAND)(self.draw)

    def wrap(self, model: Any) -> nn.Module:
        wrapped = DocumentHeads(model, self.setup.heads, self.options)
        if self.options.condition_std is not None:
            torch.nn.init.normal_(model.projectors["clip"].linear_condition.weight, std=self.options.condition_std)
        return wrapped

    # -- pages

    def page(self, index: int) -> Page:
        """The page of an example: one of PAGES_AT_HAND that take turns, each for `uses` examples."""
        if self.options.uses == 1:
            return self.drawn(index)
        lap = PAGES_AT_HAND * self.options.uses
        return self.drawn(index // lap * PAGES_AT_HAND + index % PAGES_AT_HAND)

    def draw(self, number: int) -> Page:
        """A synthetic page, or a scan cut and shaded at random; sometimes on a larger sheet."""
        random = rng(self.seed, self.stage.name, "page", number)
        page = self._single(number, random)
        return on_sheet(page, random) if self.options.sheets and random.random() < self.options.sheets else page

    def _single(self, number: int, random: np.random.Generator) -> Page:
        if self.scans and random.random() < self.options.share:
            page = scan_page(self.scans[int(random.integers(len(self.scans)))], random, self.options.resize)
            if page.qas:
                return page
        return super().page(number)

    def example(self, index: int) -> dict[str, Any]:
        page, random, kind = self.page(index), self.random(index), self.kind(index)
        weights = np.array([self.options.fields.get(qa.field, 1.0) for qa in page.qas])
        qa = page.qas[int(random.choice(len(page.qas), p=weights / weights.sum()))]
        spans = answer_spans(page, qa)
        if kind == "line":
            qa, spans = some_line(page, random)
        item, windows = KINDS[kind](self.teller, page, qa, random)
        row = dict(self.processor.encode_item(item))
        row["kind"], row["answer_from"] = kind, len(row["prompt_ids"])
        if kind in ("read", "snip", "line", "clip") or (kind in ("region", "chain") and random.random() < 0.25):
            row["labels"] = [IGNORED] * row["answer_from"] + row["labels"][row["answer_from"] :]
        if self.options.place > 0:
            row |= self._truth(row, page, windows, qa)
        if kind in ("read", "snip", "line", "region", "chain", "clip") and spans:
            row["aim"] = self.aim(row, windows[-1], qa.answer, spans)
        if kind in ("locate", "region", "near", "chain"):
            row["ask"] = self.ask(row, windows, qa)
        return row

    def aim(self, row: dict[str, Any], window: Box, answer: str, spans: Sequence[Box | None]) -> Tensor:
        """(letters, 1 + NEAR): place of each letter of the answer, and the last look's tokens it is printed in, or -1.

        Rows with a clip look are run in two stretches (`modeling`): their positions count from the second.
        """
        ids, config = np.array(row["input_ids"]), self.config
        start, token, grids = 0, config.image_token_id, row["image_grid_thw"]
        if row["kind"] == "clip":
            start = int(np.flatnonzero(ids == config.clip_action_start_id)[0]) + 1
            token, grids = config.clip_image_token_id, row["clip_images_grid_thw"]
        rows, columns = (int(v) // 2 for v in grids[-1][1:])
        first = int(np.flatnonzero(ids == token)[-rows * columns]) - start
        aims, place, at = [], row["answer_from"], 0
        while place < len(ids) and at < len(answer):
            piece = self.processor.tokenizer.decode([int(ids[place])])
            span = next((s for s in spans[at : at + len(piece)] if s), None)
            if span is not None and (near := tokens_of(span, window, (rows, columns))):
                aims.append(_padded([place - start, *(first + t for t in near)]))
            place, at = place + 1, at + len(piece)
        return torch.tensor(aims, dtype=torch.long).view(-1, 1 + NEAR)

    def ask(self, row: dict[str, Any], windows: Sequence[Box], qa: QA) -> Tensor:
        """(cells named, 1 + NEAR): place of each cell token, and the tokens that are asked for in the view, or -1.

        The cells of the n-th call are sought in the n-th image, which is the one they count in.
        """
        ids, aims = np.array(row["input_ids"]), []
        cells = np.flatnonzero(np.isin(ids, self.cell_ids))
        pads = np.flatnonzero(ids == self.config.image_token_id)
        for number, places in enumerate(np.split(cells, len(cells) // 4) if len(cells) else ()):
            rows, columns = (int(v) // 2 for v in row["image_grid_thw"][number][1:])
            here, pads = np.split(pads, [rows * columns])
            share = coverage(qa.boxes, windows[number], (rows, columns)).flatten()
            best = [int(here[t]) for t in np.argsort(-share, kind="stable")[:NEAR] if share[t] > 0.05]
            aims += [_padded([int(place), *best]) for place in places if best]
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

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        none = torch.zeros((0, 1 + NEAR), dtype=torch.long)
        guides = {key: [row.get(key, none) for row in examples] for key in ("aim", "ask")}
        return super().collate([{k: v for k, v in row.items() if k not in guides} for row in examples]) | guides


class DocumentHeads(ConversationHeads):
    """The heads and loss of `PageConversations`, with three supervised attention heads."""

    def place_loss(self, metrics: dict[str, float], tokens: Tensor, asked: Tensor, places: Tensor, *_: Any) -> Tensor:
        """tokens (n, d), asked (n, 4), places (n, 2); see `Documents._truth`."""
        guess = self.heads["asked"](tokens)
        weight = torch.tensor(4.0, device=guess.device)
        inside = F.binary_cross_entropy_with_logits(guess, asked, pos_weight=weight)
        rows = F.cross_entropy(self.heads["row"](tokens), places[:, 0])
        columns = F.cross_entropy(self.heads["column"](tokens), places[:, 1])
        with torch.no_grad():
            metrics["asked"] = (guess > 0)[asked > 0.3].float().mean().item()
            metrics["place"] = (rows + columns).item() / 2
        return 4 * inside + 0.5 * (rows + columns)

    def forward(self, aim=(), ask=(), **batch) -> dict[str, Any]:  # type: ignore[override]
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
        losses = []
        for name, layer, head, places, shift in (
            ("written", written, 0, aim, 0),
            ("coming", coming, 0, aim, -1),
            ("asking", coming, -1, ask, -1),
        ):
            if any(len(place) for place in places):
                loss = guided_loss(layers[layer].self_attn, *caught[layer], places, head, shift)
                result["metrics"][name] = (-loss.detach()).exp().mean().item()
                losses.append(loss.mean())
        guidance = self.options.guidance * torch.stack(losses).sum() if losses else 0.0
        return {**result, "loss": result["loss"] + guidance}


def guided_loss(attention: Any, states: Tensor, rope: Any, aims: Sequence[Tensor], head: int, shift: int) -> Tensor:
    """-log(attention of one head of the layer on the tokens aimed at), one per aim; queries at the places + shift."""
    size, groups = attention.head_dim, attention.num_key_value_groups
    head %= attention.num_heads
    query = attention.q_proj(states)[..., head * size : (head + 1) * size].unsqueeze(1)
    group = head // groups
    key = attention.k_proj(states)[..., group * size : (group + 1) * size].unsqueeze(1)
    query, key = (t[:, 0] for t in apply_rotary_pos_emb(query, key, *rope))
    losses = []
    for row, aim in enumerate(aims):
        if len(aim):
            aim = aim.to(states.device)
            places = aim[:, 0] + shift
            scores = query[row, places] @ key[row].T * size**-0.5
            later = torch.arange(scores.shape[1], device=scores.device) > places[:, None]
            logs = scores.masked_fill(later, -torch.inf).log_softmax(-1)
            at = logs.gather(1, aim[:, 1:].clamp(min=0)).masked_fill(aim[:, 1:] < 0, -torch.inf)
            losses.append(-at.logsumexp(-1))
    return torch.cat(losses)


def _padded(values: Sequence[int]) -> list[int]:
    """A place and its tokens, cut or filled with -1 to 1 + NEAR."""
    return [*values[: 1 + NEAR], *[-1] * (1 + NEAR - len(values))]


def tokens_of(span: Box, window: Box, grid: tuple[int, int]) -> list[int]:
    """Tokens (numbers in a grid of rows, columns over the window) that a narrow span lies in."""
    rows, columns = grid
    across, down = columns / (window[2] - window[0]), rows / (window[3] - window[1])
    if span[2] <= window[0] or span[0] >= window[2] or span[3] <= window[1] or span[1] >= window[3]:
        return []
    xs = _cells((span[0] - window[0]) * across, (span[2] - window[0]) * across, columns)
    ys = _cells((span[1] - window[1]) * down, (span[3] - window[1]) * down, rows)
    return [y * columns + x for y in ys for x in xs]


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
    """Where each letter of the answer is printed (None for its spaces); empty where the lines do not spell it.

    The lines under the boxes are read in order, spaces apart: an address is printed over several lines. A number that
    counts rows (how many items) is found in none of them.
    """
    printed: Any = page.meta["lines"]
    lines: list[Line] = [line for line in printed if _lies_in(line.box, qa.boxes)]
    if qa.answer.isdigit() and len(lines) > 1:
        return []
    lines.sort(key=lambda line: ((line.box[1] + line.box[3]) // 2, line.box[0]))
    letters = [
        (char, span)
        for line in lines
        for char, span in zip(line.text, letter_spans(line), strict=True)
        if not char.isspace()
    ]
    start = "".join(char for char, _ in letters).find("".join(qa.answer.upper().split()))
    if start < 0:
        return []
    found = iter(span for _, span in letters[start:])
    return [None if char.isspace() else next(found) for char in qa.answer]


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


KINDS.update(snip=snip, line=snip, chain=RowTeller.chain, near=RowTeller.near)


def scan_page(scan: Scan, random: np.random.Generator | None, resize: float = 0.0) -> Page:
    """A scan as a page: up to 6 % cut from each side, another exposure, letters spaced evenly in their lines.

    `resize` draws another size, width and height apart (letters then lie on other pixels, wider or narrower); none is
    drawn at 0. Without `random` it is the scan as it is.
    """
    frame = (0, 0, *scan.image.size) if random is None else cut(scan.image.size, random)
    image = (scan.image if random is None else shade(scan.image.crop(frame), random)).convert("RGB")
    across, down = random.uniform(1 - resize, 1 + resize, 2) if random is not None and resize else (1.0, 1.0)
    if resize:
        image = image.resize((round(image.width * across), round(image.height * down)), Image.Resampling.BICUBIC)

    def placed(box: Box) -> Box:
        x1, y1, x2, y2 = _shifted(box, frame)
        return int(x1 * across), int(y1 * down), round(x2 * across), round(y2 * down)

    lines = tuple(_evenly(text, placed(box)) for box, text in scan.lines if text.strip())
    qas = tuple(
        replace(qa, boxes=tuple(placed(b) for b in qa.boxes))
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
