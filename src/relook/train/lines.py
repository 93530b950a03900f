"""Reading, taught densely: the vision tower learns which letters lie in each of its tokens.

A throwaway head asks every merged token for the letters whose centres lie in it, in `SLOTS` columns from left to right.
In the synthetic world the place of every letter is known (cross entropy, slot by slot). On real scans only boxes and
texts of lines are known: the slots of a line, read along it, must spell its text (CTC, with the rows inside the box
pooled). A second head asks each patch for the letter it lies on: blunter, and learnt first; it carries the sharp one
off the ground.

In the same stage the first look of whole receipts is taught which fields (company, date, total, ...) each token covers,
so that the vision tower sees layouts as well as letters and forgets neither. `align` draws tokens to the language
model's own words for their letters, and `meet` brings the two together before that.

Letters are upper case and without spaces. Knows pages, scans and the vision tower; not how the language model thinks.
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

from relook.data.scans import Scan, read_scans
from relook.data.worlds import Box, Page
from relook.data.worlds.receipts_text import MAIN
from relook.train.stages import Objective, coverage, merge_order

SLOTS = 3  # columns per token in which a letter can lie
PAGES_AT_HAND = 16  # pages that take turns; each serves `uses` examples


class Lines(Objective):
    """Dense reading of windows of synthetic pages and of lines of real scans; see the module."""

    class Options(Objective.Options):
        real: str | None = None  # folder of scans; absent: synthetic pages only
        share: float = 0.0  # of examples that come from scans, where there are any
        windows: int = 3  # per example
        uses: int = 4  # examples per drawn page
        size: tuple[int, int] = (168, 60)  # of a window as seen, pixels
        scale: tuple[float, float] = (0.8, 1.3)  # of the page's pixels
        blank: float = 0.12  # weight of empty slots
        under: float = 1.0  # weight of the blunt head
        align: float = 0.0  # weight of drawing tokens to the language model's own embeddings of their letters
        meet: bool = False  # first bring tower and language model together, see `meet`
        overview: float = 0.2  # share of examples that are first looks of whole pages

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        charset = self.world.charset if self.world is not None else ""
        self.classes = {c: i + 1 for i, c in enumerate(charset)}
        self.fields = {name: i for i, name in enumerate(self.world.labels if self.world is not None else ())}
        self.head, self.under_head, self.field_head = self.heads(len(charset) + 1)
        ids = [self.processor.tokenizer.encode(c, add_special_tokens=False)[0] for c in charset]
        self.letter_ids = torch.tensor(ids, dtype=torch.long)
        self.scans: list[Scan] = read_scans(self.options.real)
        self.pages = lru_cache(maxsize=2 * PAGES_AT_HAND)(self.page)
        self.unit = self.processor.image_processor.patch_size * self.processor.image_processor.merge_size
        if self.options.meet:
            self.meet()

    @torch.no_grad()
    def meet(self, examples: int = 120) -> None:
        """Bring the tower and a fresh language model together without teaching either.

        By the tower's last layer, tokens get mean zero and mean length 1 (the heads make up for it, so that nothing is
        forgotten), and the word of each letter becomes the mean of the tokens that hold it alone. (A penalty on the
        tokens' length instead destroyed a trained tower within a hundred steps.)
        """
        batch = self.collate([e for e in (self.example(i) for i in range(examples)) if "target" in e[0]])
        seen = self.model.encode("image", pixel_values=batch["pixel_values"], image_grid_thw=batch["image_grid_thw"])
        tokens = torch.cat(list(seen))
        letters = torch.cat([part["target"].flatten() for part in batch["parts"]]).view(-1, SLOTS)
        held = tokens[(letters > 0).any(-1)]
        middle, length = held.mean(0), (held - held.mean(0)).norm(dim=-1).mean()
        last: Any = self.model.model.visual.merger.mlp[-1]
        last.bias -= middle
        last.weight /= length
        last.bias /= length
        for head in (self.head, self.under_head, self.field_head):
            head.bias.add_(head.weight @ middle)
            head.weight.mul_(length)
        table = self.model.get_input_embeddings().weight
        size = table.norm(dim=-1).mean()
        alone = (letters > 0).sum(-1) == 1
        for number, word in enumerate(self.letter_ids.tolist(), 1):
            mine = alone & (letters == number).any(-1)
            if mine.sum() >= 5:
                table[word] = size * F.normalize((tokens[mine] - middle).mean(0), dim=-1)

    def heads(self, classes: int) -> list[nn.Linear]:
        """The throwaway heads. They are handed from stage to stage of one run beside the model, and never saved.

        Heads that start afresh send a trained tower noise for a while; a run that is taken up again does so with a
        short stage in which the tower rests.
        """
        width = self.model.config.text_config.hidden_size
        sizes = [SLOTS * classes, 4 * classes, len(self.fields)]
        kept = self.model.__dict__.get("_reading_heads", [])
        if [head.out_features for head in kept] != sizes:
            kept = [nn.Linear(width, size) for size in sizes]
            nn.init.normal_(kept[0].weight, std=0.04)
            self.model.__dict__["_reading_heads"] = kept
        return kept

    # -- examples

    def example(self, index: int) -> list[dict[str, Any]]:
        random = self.random(index)
        whole = random.random() < self.options.overview
        if self.scans and random.random() < self.options.share:
            scan = self.scans[int(random.integers(len(self.scans)))]
            if whole:
                return [self.overview(scan.image, {qa.field: qa.boxes for qa in scan.qas}, MAIN, random)]
            return [self.strip(scan, random) for _ in range(self.options.windows)]
        lap = PAGES_AT_HAND * self.options.uses
        page = self.pages(index // lap * PAGES_AT_HAND + index % PAGES_AT_HAND)
        if whole:
            boxes = {area.label: (area.box,) for area in page.areas}
            return [self.overview(page.image.convert("L"), boxes, tuple(self.fields), random)]
        return [self.window(page, random) for _ in range(self.options.windows)]

    def window(self, page: Page, random: np.random.Generator) -> dict[str, Any]:
        """A window around a letter of a synthetic page, with the class of each slot (rows, columns * SLOTS)."""
        scale = float(random.uniform(*self.options.scale))
        width, height = self.options.size
        lines = page.meta["lines"]
        line = lines[int(random.integers(len(lines)))]  # type: ignore[index,arg-type]
        cx, cy = (line.box[0] + line.box[2]) / 2, (line.box[1] + line.box[3]) / 2
        x1 = cx + random.uniform(-0.9, 0.5) * width / scale
        y1 = cy - random.uniform(0.2, 0.8) * height / scale
        box = (int(x1), int(y1), int(x1 + width / scale), int(y1 + height / scale))
        seen = shade(page.image.convert("L").crop(clamp(box, page.image.size)), random)
        box = clamp(box, page.image.size)
        pixels, grid = self.encode(seen, (width, height))
        target = np.zeros((grid[0], grid[1] * SLOTS), np.int64)
        for part in lines:  # type: ignore[attr-defined]
            for char, centre in zip(part.text, part.centres, strict=True):
                if centre is not None and box[0] <= centre[0] < box[2] and box[1] <= centre[1] < box[3]:
                    column = int((centre[0] - box[0]) / (box[2] - box[0]) * grid[1] * SLOTS)
                    row = int((centre[1] - box[1]) / (box[3] - box[1]) * grid[0])
                    target[row, column] = self.classes.get(char, 0)
        under = letters_under(lines, box, (2 * grid[0], 2 * grid[1]), self.classes)  # type: ignore[arg-type]
        return {**pixels, "target": torch.tensor(target), "under": torch.tensor(merge_order(under))}

    def strip(self, scan: Scan, random: np.random.Generator) -> dict[str, Any]:
        """A line of a scan with some surroundings: its text, and the rows of tokens that lie on it."""
        for _ in range(20):
            box, text = scan.lines[int(random.integers(len(scan.lines)))]
            letters = [self.classes[c] for c in text if c in self.classes]
            if len(letters) >= 2 and box[2] - box[0] > 12 and box[3] - box[1] > 6:
                break
        scale = float(random.uniform(*self.options.scale))
        scale = min(scale, 600 / (box[2] - box[0]))
        left, right = random.integers(0, 14, 2)
        above, below = random.integers(2, 16, 2)
        whole = clamp((box[0] - left, box[1] - above, box[2] + right, box[3] + below), scan.image.size)
        seen = shade(scan.image.crop(whole), random)
        size = (max(1, round(seen.width * scale)), max(1, round(seen.height * scale)))
        pixels, grid = self.encode(seen, size)
        per_row = (whole[3] - whole[1]) / grid[0]
        edge = 0.22 * (box[3] - box[1])
        rows = [r for r in range(grid[0]) if box[1] + edge <= whole[1] + (r + 0.5) * per_row <= box[3] - edge] or [
            min(grid[0] - 1, int(((box[1] + box[3]) / 2 - whole[1]) / per_row))
        ]
        return {**pixels, "text": torch.tensor(letters), "rows": (rows[0], rows[-1] + 1)}

    def overview(self, image: Image.Image, boxes: Mapping[str, Sequence[Box]], asked: tuple[str, ...], random: Any):
        """A first look (cut a little at random): which fields each token covers, for the fields the source knows."""
        w, h = image.size
        cut = [int(v) for v in random.uniform(0, 0.06, 4) * (w, h, w, h) * (random.random() < 0.7)]
        frame = clamp((cut[0], cut[1], w - cut[2], h - cut[3]), image.size)
        seen = self.processor.view(shade(image.crop(frame), random), "first")
        pixels = self.processor.encode_images([seen], "image")
        rows, columns = (int(v) // 2 for v in pixels["image_grid_thw"][0, 1:])
        grid = (rows, columns)
        target = np.full((*grid, len(self.fields)), -1.0, np.float32)
        for name in asked:
            target[..., self.fields[name]] = coverage(boxes.get(name, ()), frame, grid) > 0.25
        return {**pixels, "fields": torch.tensor(target)}

    def encode(self, seen: Image.Image, size: tuple[int, int]) -> tuple[dict[str, Any], tuple[int, int]]:
        """Pixels of a piece seen at about `size`, and its grid of merged tokens (rows, columns)."""
        width, height = (max(1, round(side / self.unit)) * self.unit for side in size)
        ready = seen.resize((width, height), Image.Resampling.BICUBIC).convert("RGB")
        return self.processor.encode_images([ready], "image"), (height // self.unit, width // self.unit)

    # -- loss

    def collate(self, examples: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
        parts = [part for example in examples for part in example]
        batch = {key: torch.cat([p[key] for p in parts]) for key in ("pixel_values", "image_grid_thw")}
        return {
            **batch,
            "parts": [{k: p[k] for k in ("target", "under", "text", "rows", "fields") if k in p} for p in parts],
        }

    def forward(self, pixel_values, image_grid_thw, parts) -> dict[str, Tensor]:  # type: ignore[override]
        features = self.model.encode("image", pixel_values=pixel_values, image_grid_thw=image_grid_thw)
        dense_logits, dense_targets, spelled, covered, lying = [], [], [], [], []
        logits = self.head(torch.cat(features)).split([len(f) for f in features])
        for part, thw, flat, tokens in zip(parts, image_grid_thw.tolist(), logits, features, strict=True):
            if "fields" in part:
                covered.append((self.field_head(tokens), part["fields"].flatten(0, 1)))
                continue
            grid = flat.view(thw[1] // 2, thw[2] // 2 * SLOTS, -1)
            if "target" in part:
                dense_logits.append(grid.flatten(0, 1))
                dense_targets.append(part["target"].flatten())
                lying.append((tokens, part["under"]))
            else:
                spelled.append((pool_rows(grid[slice(*part["rows"])]), part["text"]))
        loss = flat.new_zeros(())
        if dense_logits:
            loss = loss + self.dense_loss(torch.cat(dense_logits), torch.cat(dense_targets)) * len(dense_logits)
            if self.options.align > 0:
                loss = loss + self.options.align * self.align_loss(lying, dense_targets) * len(lying)
            loss = loss + self.options.under * self.under_loss(lying) * len(lying)
        if spelled:
            loss = loss + self.spelling_loss(spelled) * len(spelled)
        if covered:
            loss = loss + self.overview_loss(covered) * len(covered)
        return {"loss": loss / len(parts)}

    def overview_loss(self, covered: list[tuple[Tensor, Tensor]]) -> Tensor:
        logits, target = torch.cat([c[0] for c in covered]), torch.cat([c[1] for c in covered])
        known = target >= 0
        there = target > 0.5
        with torch.no_grad():
            self.note(covered=(logits[there] > 0).float().mean().item())
            self.note(uncovered=(logits[known & ~there] <= 0).float().mean().item())
        each = F.binary_cross_entropy_with_logits(logits, target.clamp(min=0), reduction="none")
        return (each * known).sum(-1).mean() * 2

    def dense_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        weight = torch.ones(logits.shape[-1])
        weight[0] = self.options.blank
        there = target > 0
        with torch.no_grad():
            guess = logits.argmax(-1)
            self.note(letters=(guess[there] == target[there]).float().mean().item())
            self.note(empty=(guess[~there] == 0).float().mean().item())
        return F.cross_entropy(logits, target, weight=weight, label_smoothing=0.02)

    def under_loss(self, lying: list[tuple[Tensor, Tensor]]) -> Tensor:
        target = torch.cat([under for _, under in lying]).flatten()
        logits = self.under_head(torch.cat([tokens for tokens, _ in lying])).view(len(target), -1)
        there = target > 0
        self.note(under=(logits.argmax(-1)[there] == target[there]).float().mean().item())
        weight = torch.ones(logits.shape[-1])
        weight[0] = 2 * self.options.blank
        return F.cross_entropy(logits, target, weight=weight)

    def align_loss(self, lying: list[tuple[Tensor, Tensor]], targets: list[Tensor]) -> Tensor:
        """1 - cosine between tokens and the sum of their letters' embeddings, each rolled by its number in the token.

        A token with one letter comes to look like that letter's word; the roll keeps two letters in order. The
        embeddings are not moved.
        """
        tokens = torch.cat([tokens for tokens, _ in lying])
        letters = torch.cat(targets).view(-1, SLOTS)  # slots of a token are neighbours in its row
        with torch.no_grad():
            table = F.normalize(self.model.get_input_embeddings().weight.detach(), dim=-1)
            words = torch.cat([torch.zeros_like(table[:1]), table[self.letter_ids]])
            number = (letters > 0).cumsum(-1) - 1
            step = table.shape[1] // SLOTS
            each = [words[letters] * ((number == i) & (letters > 0))[..., None] for i in range(SLOTS)]
            goal = torch.stack([w.sum(1).roll(i * step, -1) for i, w in enumerate(each)]).sum(0)
        held = (letters > 0).any(-1)
        cosine = F.cosine_similarity(tokens[held], goal[held], dim=-1).mean()
        self.note(cosine=cosine.item())
        return 1 - cosine

    def spelling_loss(self, spelled: list[tuple[Tensor, Tensor]]) -> Tensor:
        losses = []
        for steps, text in spelled:
            if len(steps) < len(text):
                continue
            ctc = F.ctc_loss(
                steps[:, None], text[None], torch.tensor([len(steps)]), torch.tensor([len(text)]), zero_infinity=True
            )
            losses.append(ctc)
            with torch.no_grad():
                self.note(cer=error_rate(spell(steps), text.tolist()))
        return torch.stack(losses).mean() if losses else spelled[0][0].sum() * 0


def letters_under(lines: Sequence[Any], box: Box, grid: tuple[int, int], classes: dict[str, int]) -> np.ndarray:
    """(rows, columns) of a grid over `box`: the class of the letter that the cell's centre lies on, 0 for none.

    A letter is as high as its line and as wide as its ink.
    """
    found = np.zeros(grid, np.int64)
    across, down = grid[1] / (box[2] - box[0]), grid[0] / (box[3] - box[1])
    for line in lines:
        if line.box[3] <= box[1] or line.box[1] >= box[3] or line.box[2] <= box[0] or line.box[0] >= box[2]:
            continue
        high = max((b[3] - b[1] for b in line.boxes if b), default=0) / 2
        for char, ink, centre in zip(line.text, line.boxes, line.centres, strict=True):
            if ink is not None:
                x1, x2 = ((x - box[0]) * across - 0.5 for x in (ink[0], ink[2]))
                y1, y2 = ((centre[1] + dy - box[1]) * down - 0.5 for dy in (-high, high))
                rows = slice(max(0, int(np.ceil(y1))), max(0, int(np.floor(y2)) + 1))
                found[rows, max(0, int(np.ceil(x1))) : max(0, int(np.floor(x2)) + 1)] = classes.get(char, 0)
    return found


def clamp(box: tuple[Any, Any, Any, Any], size: tuple[int, int]) -> Box:
    """A box moved or cut into an image, at least 8 pixels wide and high."""
    x1, y1 = max(0, min(int(box[0]), size[0] - 8)), max(0, min(int(box[1]), size[1] - 8))
    return x1, y1, max(x1 + 8, min(int(box[2]), size[0])), max(y1 + 8, min(int(box[3]), size[1]))


def shade(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Another exposure of a piece of a scan: contrast, brightness, a little noise. Mode "L"."""
    if random.random() < 0.4:
        return image
    values = np.asarray(image, np.float32)
    values = (values - 128) * random.uniform(0.6, 1.3) + 128 + random.uniform(-25, 25)
    values += random.standard_normal(values.shape) * random.uniform(0, 6)
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


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
