"""Reading, taught densely: the vision tower learns which letters lie in each of its tokens, and which field.

An auxiliary head reads from every merged token the letters whose centres lie in it, in `SLOTS` columns from the left.
In the synthetic world the place of every letter is known (cross entropy, slot by slot). On real scans only boxes and
texts of lines are known: the slots of a line, read along it, must spell its text (CTC, with the rows inside the box
pooled). A second head asks each patch for the letter it lies on: blunter, and learnt first; it carries the sharp one
off the ground. A third asks for the field (company, date, total, ...) that a token lies in, where a piece shows enough
to tell. What is shown, and how much of each, is the table `pieces.PIECES`.

`align` draws tokens to the language model's own words for their letters, and `meet` brings the two together before it.

Letters are upper case and without spaces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from relook.train.objective import AuxiliaryHeads, Setup
from relook.views import View
from zoo.objectives.pages import PageObjective, coverage, merge_order
from zoo.objectives.pieces import (
    PIECES,
    SLOTS,
    WITH_FIELDS,
    Sheet,
    cut,
    letters_in_slots,
    letters_under,
    lines_in,
    shade,
)
from zoo.scans import read_scans
from zoo.worlds import Box

ALIGNED = 400  # examples from which `meet` takes its means
PAGES_AT_HAND = 16  # pages that take turns; each serves `uses` examples
RARE = 10.0  # weight of a token inside a field against one outside: a total takes one token in a hundred


class Lines(PageObjective):
    """Dense reading of pieces of synthetic pages and of real scans; see the module."""

    class Options(PageObjective.Options):
        real: str | None = None  # folder of scans; absent: synthetic pages only
        share: tuple[float, float] = (0.0, 0.0)  # of pieces from scans, where there are any: at the start, at the end
        pieces: dict[str, float] = {"strip": 0.5, "window": 0.5}  # rows of PIECES, or "first" -> share
        digits: float = 0.0  # share of lines chosen among those that are mostly digits
        uses: int = 60  # pieces per drawn page
        size: tuple[int, int] = (168, 60)  # of a window as seen, pixels
        scale: tuple[float, float] = (0.85, 1.25)  # of the page's pixels
        first: int | None = None  # longest side of a "first" piece, pixels; absent: the processor's own first look
        inside: float = 0.1  # share of a token that a field must cover for the token to lie in it
        blank: float = 0.12  # weight of empty slots
        under: float = 1.0  # weight of the blunt head
        field: float = 1.0  # weight of the field head
        align: float = 0.0  # weight of drawing tokens to the language model's own embeddings of their letters
        meet: bool = False  # first bring tower and language model together, see `meet`

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.classes = {c: i + 1 for i, c in enumerate(self.source.charset)}
        self.fields = {name: i for i, name in enumerate(self.source.labels)}
        self.scans = [Sheet.of_scan(scan) for scan in read_scans(self.options.real)]
        self.sheets = lru_cache(maxsize=2 * PAGES_AT_HAND)(lambda i: Sheet.of_page(self.page(i), tuple(self.fields)))
        self.unit = self.processor.image_processor.patch_size * self.processor.image_processor.merge_size

    def wrap(self, model: Any) -> nn.Module:
        letters = [self.processor.tokenizer.encode(c, add_special_tokens=False)[0] for c in self.source.charset]
        wrapped = LineHeads(model, self.setup.heads, self.options, letters, len(self.fields))
        if self.options.meet and model.device.type != "meta":
            drawn = (self.example(i) for i in range(ALIGNED))
            wrapped.meet(self.collate([e for e in drawn if "target" in e and e["kind"] != "small"]))
        return wrapped

    # -- examples

    def example(self, index: int) -> dict[str, Any]:
        """One piece: its pixels and what is known of it (`target` and `under`, or `spelled`; `fields`)."""
        random = self.random(index)
        kinds, shares = list(self.options.pieces), np.array(list(self.options.pieces.values()))
        kind = kinds[int(random.choice(len(kinds), p=shares / shares.sum()))]
        first, last = self.options.share
        if self.scans and random.random() < first + (last - first) * min(1.0, index / self.stage.samples):
            sheet = self.scans[int(random.integers(len(self.scans)))]
        else:
            lap = PAGES_AT_HAND * self.options.uses
            sheet = self.sheets(index // lap * PAGES_AT_HAND + index % PAGES_AT_HAND)
        if kind == "first":
            return {"kind": kind, **self.first(sheet, random)}
        box, size = PIECES[kind](sheet, self.options, random)
        pixels, grid = self.encode(shade(sheet.image.crop(box), random), size)
        piece = {"kind": kind, **pixels}
        if sheet.letters is not None:
            piece["target"] = torch.tensor(letters_in_slots(sheet.letters, box, grid, self.classes))
            under = letters_under(sheet.letters, box, (2 * grid[0], 2 * grid[1]), self.classes)
            piece["under"] = torch.tensor(merge_order(under))
        else:
            piece["spelled"] = lines_in(sheet.lines, box, grid, self.classes)
        if kind in WITH_FIELDS:
            piece["fields"] = self.field_truth(sheet, box, grid)
        return piece

    def first(self, sheet: Sheet, random: np.random.Generator) -> dict[str, Any]:
        """A first look, cut a little at random: only the fields can be learnt from it."""
        frame = cut(sheet.image.size, random)
        shown = shade(sheet.image.crop(frame), random)
        if self.options.first is not None:
            shown = View(self.options.first).apply(shown)
        seen = self.processor.view(shown, "first")
        pixels = self.processor.encode_images([seen], "image")
        rows, columns = (int(v) // 2 for v in pixels["image_grid_thw"][0, 1:])
        return {**pixels, "fields": self.field_truth(sheet, frame, (rows, columns))}

    def field_truth(self, sheet: Sheet, box: Box, grid: tuple[int, int]) -> Tensor:
        """(tokens, fields): 1 where a token lies in the field, 0 where not, -1 where the sheet does not say."""
        target = np.full((*grid, len(self.fields)), -1.0, np.float32)
        for name in sheet.known:
            target[..., self.fields[name]] = coverage(sheet.fields.get(name, ()), box, grid) > self.options.inside
        return torch.tensor(target).flatten(0, 1)

    def encode(self, seen: Image.Image, size: tuple[float, float]) -> tuple[dict[str, Any], tuple[int, int]]:
        """Pixels of a piece seen at about `size`, and its grid of merged tokens (rows, columns)."""
        width, height = (max(1, round(side / self.unit)) * self.unit for side in size)
        ready = seen.resize((width, height), Image.Resampling.BICUBIC).convert("RGB")
        pixels = self.processor.encode_images([ready], "image")
        rows, columns = (int(v) // 2 for v in pixels["image_grid_thw"][0, 1:])
        return pixels, (rows, columns)

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = {key: torch.cat([p[key] for p in examples]) for key in ("pixel_values", "image_grid_thw")}
        return {**batch, "parts": [{k: v for k, v in p.items() if k not in batch} for p in examples]}


class LineHeads(AuxiliaryHeads):
    """Heads that read every merged token of the vision encoder, and their losses; see the module.

    Args:
        letters: token ids of the letters' own words, by class.
        fields: number of fields.
    """

    def __init__(
        self, model: nn.Module, saved: Mapping[str, Tensor], options: Any, letters: list[int], fields: int
    ) -> None:
        super().__init__(model, saved)
        self.options, self.letter_ids = options, torch.tensor(letters, dtype=torch.long)
        width, classes = self.model.config.text_config.hidden_size, len(letters) + 1
        self.add_head("slots", near_zero(nn.Linear(width, SLOTS * classes)))
        self.add_head("under", nn.Linear(width, 4 * classes))
        self.add_head("field", nn.Linear(width, fields))

    @torch.no_grad()
    def meet(self, batch: dict[str, Any]) -> None:
        """Bring the tower and a fresh language model together without teaching either.

        By the tower's last layer, tokens get mean zero and mean length 1 (the heads make up for it, so that nothing is
        forgotten), and the word of each letter becomes the mean of the tokens that hold it alone. (A penalty on the
        tokens' length instead destroyed a trained tower within a hundred steps.)
        """
        seen = self.model.encode("image", pixel_values=batch["pixel_values"], image_grid_thw=batch["image_grid_thw"])
        tokens = torch.cat(list(seen))
        letters = torch.cat([part["target"].flatten() for part in batch["parts"]]).view(-1, SLOTS)
        held = tokens[(letters > 0).any(-1)]
        middle, length = held.mean(0), (held - held.mean(0)).norm(dim=-1).mean()
        last: Any = self.model.model.visual.merger.mlp[-1]
        last.bias -= middle
        last.weight /= length
        last.bias /= length
        heads: Any = self.heads.values()
        for head in heads:
            head.bias.add_(head.weight @ middle)
            head.weight.mul_(length)
        table = self.model.get_input_embeddings().weight
        size = table.norm(dim=-1).mean()
        alone = (letters > 0).sum(-1) == 1
        for number, word in enumerate(self.letter_ids.tolist(), 1):
            mine = alone & (letters == number).any(-1)
            if mine.sum() >= 5:
                table[word] = size * F.normalize((tokens[mine] - middle).mean(0), dim=-1)

    def forward(self, pixel_values, image_grid_thw, parts) -> dict[str, Any]:
        metrics: dict[str, float] = {}
        features = self.model.encode("image", pixel_values=pixel_values, image_grid_thw=image_grid_thw)
        counts = [len(f) for f in features]
        together = torch.cat(list(features))
        logits = self.heads["slots"](together).split(counts)
        placed, spelled, fields = [], [], []
        for part, (_, rows, columns), flat, tokens in zip(
            parts, image_grid_thw.tolist(), logits, together.split(counts), strict=True
        ):
            grid = flat.view(rows // 2, columns // 2 * SLOTS, -1)
            if "target" in part:
                placed.append((grid.flatten(0, 1), part["target"].flatten(), tokens, part["under"]))
            spelled += [(pool_rows(grid[lines, slots]), text) for lines, slots, text in part.get("spelled", ())]
            if "fields" in part:
                fields.append((tokens, part["fields"]))
        loss = together.new_zeros(())
        if placed:
            share = len(placed) / len(parts)
            loss = loss + share * (
                self.dense_loss(placed, metrics) + self.options.under * self.under_loss(placed, metrics)
            )
            if self.options.align > 0:
                loss = loss + share * self.options.align * self.align_loss(placed, metrics)
        if spelled:
            real = sum("spelled" in part for part in parts)
            loss = loss + real / len(parts) * spelling_loss(spelled, metrics)
        if fields:
            loss = loss + self.options.field * len(fields) / len(parts) * self.field_loss(fields, metrics)
        return {"loss": loss, "metrics": metrics}

    def field_loss(self, fields: list[tuple[Tensor, Tensor]], metrics: dict[str, float]) -> Tensor:
        logits, target = self.heads["field"](torch.cat([f[0] for f in fields])), torch.cat([f[1] for f in fields])
        known, there = target >= 0, target > 0.5
        with torch.no_grad():
            metrics["in_field"] = (logits[there] > 0).float().mean().item()
            metrics["outside"] = (logits[known & ~there] <= 0).float().mean().item()
        weight = logits.new_tensor(RARE)
        each = F.binary_cross_entropy_with_logits(logits, target.clamp(min=0), pos_weight=weight, reduction="none")
        return (each * known).sum(-1).mean() * 2

    def dense_loss(self, placed: Sequence[tuple[Tensor, ...]], metrics: dict[str, float]) -> Tensor:
        logits, target = torch.cat([p[0] for p in placed]), torch.cat([p[1] for p in placed])
        weight = torch.ones(logits.shape[-1], device=logits.device)
        weight[0] = self.options.blank
        there = target > 0
        with torch.no_grad():
            guess = logits.argmax(-1)
            metrics["letters"] = (guess[there] == target[there]).float().mean().item()
            metrics["empty"] = (guess[~there] == 0).float().mean().item()
        return F.cross_entropy(logits, target, weight=weight, label_smoothing=0.02)

    def under_loss(self, placed: Sequence[tuple[Tensor, ...]], metrics: dict[str, float]) -> Tensor:
        target = torch.cat([p[3] for p in placed]).flatten()
        logits = self.heads["under"](torch.cat([p[2] for p in placed])).view(len(target), -1)
        there = target > 0
        metrics["under"] = (logits.argmax(-1)[there] == target[there]).float().mean().item()
        weight = torch.ones(logits.shape[-1], device=logits.device)
        weight[0] = 2 * self.options.blank
        return F.cross_entropy(logits, target, weight=weight)

    def align_loss(self, placed: Sequence[tuple[Tensor, ...]], metrics: dict[str, float]) -> Tensor:
        """1 - cosine between tokens and the sum of their letters' embeddings, each rolled by its number in the token.

        A token with one letter comes to look like that letter's word; the roll keeps two letters in order. The
        embeddings are not moved.
        """
        tokens = torch.cat([p[2] for p in placed])
        letters = torch.cat([p[1] for p in placed]).view(-1, SLOTS)  # slots of a token are neighbours in its row
        with torch.no_grad():
            table = F.normalize(self.model.get_input_embeddings().weight.detach(), dim=-1)
            words = torch.cat([torch.zeros_like(table[:1]), table[self.letter_ids.to(table.device)]])
            number = (letters > 0).cumsum(-1) - 1
            step = table.shape[1] // SLOTS
            each = [words[letters] * ((number == i) & (letters > 0))[..., None] for i in range(SLOTS)]
            goal = torch.stack([w.sum(1).roll(i * step, -1) for i, w in enumerate(each)]).sum(0)
        held = (letters > 0).any(-1)
        cosine = F.cosine_similarity(tokens[held], goal[held], dim=-1).mean()
        metrics["cosine"] = cosine.item()
        return 1 - cosine


def spelling_loss(spelled: Sequence[tuple[Tensor, Tensor]], metrics: dict[str, float]) -> Tensor:
    """CTC over lines, each divided by its letters; lines with too few slots for their letters teach nothing."""
    fitting = [(steps, text) for steps, text in spelled if len(steps) >= len(text)]
    if not fitting:
        return spelled[0][0].sum() * 0
    longest = max(len(steps) for steps, _ in fitting)
    batch = torch.stack([F.pad(steps, (0, 0, 0, longest - len(steps))) for steps, _ in fitting], 1)
    lengths, letters = (torch.tensor([len(pair[i]) for pair in fitting]) for i in (0, 1))
    with torch.no_grad():
        steps, text = fitting[0]
        metrics["cer"] = error_rate(spell(steps), text.tolist())
    return F.ctc_loss(batch, torch.cat([text for _, text in fitting]), lengths, letters, zero_infinity=True)


def near_zero(head: nn.Linear) -> nn.Linear:
    nn.init.normal_(head.weight, std=0.04)
    return head


def pool_rows(grid: Tensor) -> Tensor:
    """Logits (rows, steps, classes), class 0 empty -> log-probabilities (steps, classes) of "some row holds it"."""
    rows = grid.log_softmax(-1)
    empty = rows[:, :, :1].sum(0)
    held = rows[:, :, 1:].logsumexp(0)
    return torch.cat([empty, held], -1).log_softmax(-1)


def spell(steps: Tensor) -> list[int]:
    """Greedy CTC: the best class of each step, repeats joined, blanks dropped."""
    best = steps.argmax(-1).tolist()
    return [c for i, c in enumerate(best) if c and (i == 0 or best[i - 1] != c)]


def error_rate(seen: Sequence[int], truth: Sequence[int]) -> float:
    """Edit distance over the length of the truth, at most 1.

    >>> error_rate([1, 2, 4], [1, 2, 3, 4])
    0.25
    """
    row = list(range(len(seen) + 1))
    for i, t in enumerate(truth, 1):
        corner, row[0] = row[0], i
        for j, s in enumerate(seen, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (s != t))
    return min(1.0, row[-1] / max(1, len(truth)))
