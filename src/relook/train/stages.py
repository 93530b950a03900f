"""What a stage learns: a table of objectives, each an nn.Module around the model that makes its own examples and loss.

An objective has three parts, and nothing else knows what they are: `example(index)` draws one training example (from
the seed and the index alone, so that a run can be repeated and continued), `collate(examples)` batches them, and
`forward(**batch)` returns the loss and what to log. Throwaway heads live in the objective, not in the model.

Objectives know a world, a processor and a model; optimisers and files are `run`'s business.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relook.data.worlds import Box, Page, World
from relook.errors import UserError
from relook.io import rng, validate
from relook.train.account import Account
from relook.train.feeding import Feed
from relook.train.recipe import Stage, Strict


class Objective(nn.Module, ABC):
    """Base of all rows of `OBJECTIVES`.

    Args:
        model: the VPT model that learns.
        processor: its processor (views, tokens, pixels).
        world: where pages come from; None when the stage reads items from a file.
        stage: the stage of the recipe; `stage.options` must fit the class's `Options`.
        seed: of the examples.
        items: the feed of items of a stage whose data source is json; None with a world.
        held: items of that source that are not taught (see `held_out`).
    """

    accepts_loss_kwargs: ClassVar[bool] = False  # transformers' Trainer: the loss is already a mean over the batch

    class Options(Strict):
        """What a recipe may set under `options:`; subclasses extend it."""

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        world: World | None,
        stage: Stage,
        seed: int,
        items: Any = None,
        held: Sequence[Any] = (),
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.processor, self.world, self.stage, self.seed = processor, world, stage, seed
        self.items, self.held = items, held
        self.options: Any = validate(self.Options, stage.options, f"stage {stage.name}: options")
        self.log: dict[str, list[float]] = {}
        self.account = Account(items.data.max_broken, items.unread) if isinstance(items, Feed) else Account(0.0)

    @abstractmethod
    def example(self, index: int) -> Any:
        """One training example, a function of the seed, the stage and `index` only."""

    def held_out(self, index: int) -> Any:
        """Example `index` for validation: drawn as the others are, from pages that no training gets to."""
        return self.example(first_held_out(self.stage) + index)

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> dict[str, Any]:
        """Examples to the keyword arguments of `forward`."""

    @abstractmethod
    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """`{"loss": scalar}`; figures to log go through `note`."""

    def throwaway(self, name: str, make: Callable[[], nn.Module]) -> Any:
        """A head that a stage needs and nobody ships: made afresh, or as an earlier stage of the run left it.

        Heads that start afresh send a trained model noise for a while, so they are handed from stage to stage beside
        the model (`run` keeps them with each stage's weights). One of another shape starts afresh all the same.
        """
        head, kept = make(), self.model.__dict__.setdefault("_throwaway", {})
        before = kept.get(name, {})
        before = before.state_dict() if isinstance(before, nn.Module) else before
        if {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in head.state_dict().items()}:
            head.load_state_dict(before)
        kept[name] = head
        return head

    def random(self, index: int) -> np.random.Generator:
        """The generator of example `index` (apart from the page's own)."""
        return rng(self.seed, self.stage.name, index)

    def page(self, index: int) -> Page:
        """Page `index` of the world. Indices of one stage are never those of another (each has its own 2**24)."""
        if self.world is None:
            raise UserError(f"Stage {self.stage.name!r} ({self.stage.objective}) needs a world; set data.world.")
        return self.world.sample(page_offset(self.stage.name) + index)

    def note(self, **figures: float) -> None:
        """Remember figures of this batch; `run` logs their means."""
        for key, value in figures.items():
            self.log.setdefault(key, []).append(float(value))

    def figures(self) -> dict[str, float]:
        """Means since the last call (entries that were nan, e.g. no example of a kind, are left out)."""
        means = {k: float(np.nanmean(v)) for k, v in self.log.items() if not np.all(np.isnan(v))}
        self.log = {}
        return means


def first_held_out(stage: Stage) -> int:
    """Number of a stage's first example for validation: half way through its pages, at the start of a batch."""
    return -(-(1 << 23) // stage.batch) * stage.batch


def page_offset(stage_name: str) -> int:
    """First page index of a stage: its own block of 2**24 pages, above the low block kept for evaluation."""
    import zlib

    return (1 + zlib.crc32(stage_name.encode()) % 127) << 24


def coverage(boxes: Sequence[Box], window: Box, grid: tuple[int, int]) -> np.ndarray:
    """How much of each cell of a grid over a window lies in the boxes.

    Args:
        boxes: pixels of the page.
        window: what the grid covers, pixels of the page.
        grid: rows, columns.

    Returns:
        (rows, columns) shares in 0..1; overlapping boxes count once each and are capped at 1.

    Example: a window of 64 x 32 with a 1 x 2 grid and the box (16, 0, 32, 32) gives [[0.5, 0.0]].
    """
    x1, y1, x2, y2 = window
    rows, columns = grid
    xs, ys = np.linspace(x1, x2, columns + 1), np.linspace(y1, y2, rows + 1)
    total = np.zeros((rows, columns))
    for a, b, c, d in boxes:
        across = np.clip(np.minimum(xs[1:], c) - np.maximum(xs[:-1], a), 0, None) / (xs[1:] - xs[:-1])
        down = np.clip(np.minimum(ys[1:], d) - np.maximum(ys[:-1], b), 0, None) / (ys[1:] - ys[:-1])
        total += down[:, None] * across[None, :]
    return np.clip(total, 0, 1)


def merge_order(grid: np.ndarray, merge: int = 2) -> np.ndarray:
    """(rows, columns, ...) per patch -> (tokens, merge * merge, ...) in the order of Qwen2-VL's merged tokens.

    Tokens run row by row; within a token its patches run row by row.
    """
    rows, columns = grid.shape[:2]
    split = grid.reshape(rows // merge, merge, columns // merge, merge, *grid.shape[2:])
    return split.swapaxes(1, 2).reshape(rows * columns // merge**2, merge * merge, *grid.shape[2:])


def patch_grid(thw: Tensor) -> tuple[int, int]:
    """(t, h, w) of one image -> (rows, columns) of patches."""
    return int(thw[1]), int(thw[2])


def patch_truth(page: Page, window: Box, grid: tuple[int, int], charset: str, labels: Sequence[str]):
    """What is printed in every patch of a window.

    Returns:
        glyph (tokens, 4): index in charset, plus one, of the glyph whose centre lies in the patch; 0 for none.
        area (tokens, 4, labels): share of the patch that areas of each label cover.
        Both in `merge_order`.
    """
    x1, y1, x2, y2 = window
    rows, columns = grid
    glyph = np.zeros(grid, dtype=np.int64)
    for mark in page.glyphs:
        a, b, c, d = mark.box
        column, row = ((a + c) / 2 - x1) / (x2 - x1) * columns, ((b + d) / 2 - y1) / (y2 - y1) * rows
        if 0 <= column < columns and 0 <= row < rows:
            glyph[int(row), int(column)] = charset.find(mark.char) + 1
    area = np.zeros((*grid, len(labels)))
    for k, label in enumerate(labels):
        area[..., k] = coverage([a.box for a in page.areas if a.label == label], window, grid)
    return merge_order(glyph), merge_order(area)


class Dense(Objective):
    """What is printed in every patch: the glyph, and the areas' shares, from throwaway heads.

    Reading end to end stays at chance for a long time; with this as the first stage it does not. One example is a
    window of a page seen as a crop, and the whole page as at the first look (areas only: its glyphs are too small).
    Heads sit both before the merger (one per patch) and behind it (four patches per token).
    """

    class Options(Strict):
        window: tuple[int, int] = (192, 192)  # width, height of the windows, page pixels
        snap: int = 16  # windows start at multiples of this, page pixels
        focus: float = 0.9  # share of the windows that hold a chosen glyph; the others lie anywhere
        empty: float = 0.3  # weight of patches without a glyph
        overview: float = 1.0  # weight of the whole page's areas

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.world is not None
        self.charset, self.labels = self.world.charset, self.world.labels
        vision, text = self.model.config.vision_config, self.model.config.text_config
        self.classes = len(self.charset) + 1
        self.patch_head = self.throwaway("patch", lambda: nn.Linear(vision.embed_dim, self.classes))
        self.glyph_head = self.throwaway("glyph", lambda: nn.Linear(text.hidden_size, 4 * self.classes))
        self.area_head = self.throwaway("area", lambda: nn.Linear(text.hidden_size, 4 * len(self.labels)))

    # -- examples

    def window(self, page: Page, random: np.random.Generator) -> Box:
        """A window on the page, in page pixels: around a random glyph, or (1 - focus) anywhere."""
        sides = [min(w, s) for w, s in zip(self.options.window, page.image.size, strict=True)]
        low, high = [0, 0], [s - w for w, s in zip(sides, page.image.size, strict=True)]
        if page.glyphs and random.random() < self.options.focus:
            box = page.glyphs[int(random.integers(len(page.glyphs)))].box
            for axis in (0, 1):
                low[axis] = min(max(low[axis], box[axis + 2] - sides[axis]), high[axis])
                high[axis] = max(min(high[axis], box[axis]), low[axis])
        snap = self.options.snap
        corner: list[int] = []
        for a, b, size, side in zip(low, high, page.image.size, sides, strict=True):
            first, last = -(-a // snap), b // snap
            corner.append(min(int(random.integers(first, max(first, last) + 1)) * snap, size - side))
        x, y = corner
        return x, y, x + sides[0], y + sides[1]

    def example(self, index: int) -> dict[str, Any]:
        page, random = self.page(index), self.random(index)
        views = []
        for window, stage in ((self.window(page, random), "crop"), ((0, 0, *page.image.size), "first")):
            seen = self.processor.view(page.image.crop(window), stage)
            pixels = self.processor.encode_images([seen], "image")
            glyph, area = patch_truth(page, window, patch_grid(pixels["image_grid_thw"][0]), self.charset, self.labels)
            views.append({**pixels, "glyph": torch.tensor(glyph), "area": torch.tensor(area, dtype=torch.float32)})
        return {"crop": views[0], "first": views[1]}

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        views = [e["crop"] for e in examples] + [e["first"] for e in examples]
        batch: dict[str, Any] = {key: torch.cat([v[key] for v in views]) for key in views[0]}
        batch["legible"] = sum(len(e["crop"]["glyph"]) for e in examples)
        return batch

    # -- loss

    def see(self, pixel_values: Tensor, image_grid_thw: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (4 n, embed_dim) before the merger, in merge order, and merged tokens (n, d)."""
        out = self.model.model.visual(pixel_values, grid_thw=image_grid_thw)
        return out.last_hidden_state, out.pooler_output

    def forward(self, pixel_values, image_grid_thw, glyph, area, legible) -> dict[str, Tensor]:  # type: ignore[override]
        patches, tokens = self.see(pixel_values, image_grid_thw)
        return {"loss": self.dense_loss(patches, tokens, glyph, area, legible)}

    def dense_loss(self, patches: Tensor, tokens: Tensor, glyph: Tensor, area: Tensor, legible: int) -> Tensor:
        """glyph (n, 4), area (n, 4, labels); the glyphs of the first `legible` tokens can be read."""
        target = glyph[:legible].reshape(-1)
        by_patch = self.patch_head(patches[: 4 * legible])
        by_token = self.glyph_head(tokens[:legible]).view(-1, self.classes)
        areas = self.area_head(tokens).view(-1, 4, len(self.labels))
        losses = F.binary_cross_entropy_with_logits(areas, area, reduction="none").sum(-1)
        colours = losses[:legible].mean() + self.options.overview * losses[legible:].mean()
        self.note(
            patches=_share_read(by_patch, target),
            glyphs=_share_read(by_token, target),
            areas=_share_named(areas[legible:], area[legible:]),
        )
        return self._reading(by_patch, target) + self._reading(by_token, target) + colours

    def _reading(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross entropy, glyphs and empty patches averaged apart: glyphs are rare and would drown."""
        losses = F.cross_entropy(logits, target, reduction="none")
        there = target > 0
        return losses[there].sum() / there.sum().clamp(min=1) + self.options.empty * losses[~there].mean()


@torch.no_grad()
def _share_read(logits: Tensor, target: Tensor) -> float:
    """Share of the glyphs that are named right (the class 'none' counts as wrong)."""
    there = target > 0
    return (logits.argmax(-1)[there] == target[there]).float().mean().item()


@torch.no_grad()
def _share_named(logits: Tensor, area: Tensor) -> float:
    """Share of the patches mostly or partly (30 %) in an area whose label comes out on top."""
    there = area.amax(-1) > 0.3
    return (logits.argmax(-1)[there] == area.argmax(-1)[there]).float().mean().item()


class Align(Dense):
    """Dense, and each merged token is drawn (cosine) to the language model's own embeddings of what it holds.

    The target is the sum of the embeddings of the glyphs and the area names in the token's patches; patches in its
    right half are rotated by half the width (roll), so that the order of two glyphs is kept. Tokens without any are
    left alone. The embeddings do not move.
    """

    class Options(Dense.Options):
        weight: float = 1.0  # of the cosine loss

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tokenizer = self.processor.tokenizer
        chars = [tokenizer.encode(c, add_special_tokens=False)[0] for c in self.charset]
        names = [tokenizer.encode(" " + label, add_special_tokens=False)[0] for label in self.labels]
        self.register_buffer("char_ids", torch.tensor(chars), persistent=False)
        self.register_buffer("name_ids", torch.tensor(names), persistent=False)

    def targets(self, glyph: Tensor, area: Tensor) -> Tensor:
        """(n, 4), (n, 4, labels) -> (n, d) sums of unit-length embeddings, zero where nothing is printed."""
        with torch.no_grad():
            table = F.normalize(self.model.get_input_embeddings().weight.detach(), dim=-1)
            chars = torch.cat([torch.zeros_like(table[:1]), table[self.char_ids]])  # type: ignore[index]
            slots = chars[glyph] + 0.5 * area @ table[self.name_ids]  # type: ignore[index]
            half = slots.shape[-1] // 2
            return slots[:, 0::2].sum(1) + slots[:, 1::2].sum(1).roll(half, dims=-1)

    def forward(self, pixel_values, image_grid_thw, glyph, area, legible) -> dict[str, Tensor]:  # type: ignore[override]
        patches, tokens = self.see(pixel_values, image_grid_thw)
        readable = torch.cat([glyph[:legible], torch.zeros_like(glyph[legible:])])
        target = self.targets(readable, area)
        cosine = F.cosine_similarity(tokens, target, dim=-1)
        with_glyph = (readable > 0).any(-1)
        with_area = (target.norm(dim=-1) > 0.2) & ~with_glyph
        glyphs, areas = (cosine[mask].sum() / mask.sum().clamp(min=1) for mask in (with_glyph, with_area))
        self.note(cosine=glyphs.item(), cosine_areas=areas.item())
        dense = self.dense_loss(patches, tokens, glyph, area, legible)
        return {"loss": dense + self.options.weight * (2 - glyphs - areas)}


# The one mechanism: a stage's `objective` is a key of this table. A world with needs of its own adds a row.
OBJECTIVES: dict[str, tuple[str, str]] = {
    "dense": ("relook.train.stages", "Dense"),
    "align": ("relook.train.stages", "Align"),
    "lines": ("relook.train.lines", "Lines"),
    "documents": ("relook.train.documents", "Documents"),
    "read": ("relook.train.conversation", "Read"),
    "locate": ("relook.train.conversation", "Locate"),
    "instruct": ("relook.train.conversation", "Instruct"),
}


def make_objective(
    model: Any,
    processor: Any,
    world: World | None,
    stage: Stage,
    seed: int,
    items: Any,
    held: Sequence[Any] = (),
) -> Objective:
    """The objective of a stage.

    Raises:
        UserError: no such objective, or options it does not have.
    """
    if stage.objective not in OBJECTIVES:
        raise UserError(
            f"Stage {stage.name!r}: there is no objective called {stage.objective!r}; "
            f"the objectives are {', '.join(OBJECTIVES)}."
        )
    module, name = OBJECTIVES[stage.objective]
    return getattr(importlib.import_module(module), name)(model, processor, world, stage, seed, items, held)
