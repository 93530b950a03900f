"""Dense supervision: a vision encoder learns what is printed in every patch of a page.

Reading end to end stays at chance for a long time; with this as the first stage it does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relook.train.objective import AuxiliaryHeads, Setup
from zoo.objectives.pages import PageObjective, patch_grid, patch_truth
from zoo.worlds import Box, Page


class Dense(PageObjective):
    """What is printed in every patch: the glyph, and the areas' shares, from auxiliary heads.

    Reading end to end stays at chance for a long time; with this as the first stage it does not. One example is a
    window of a page seen as a crop, and the whole page as at the first look (areas only: its glyphs are too small).
    Heads sit both before the merger (one per patch) and behind it (four patches per token).
    """

    class Options(PageObjective.Options):
        window: tuple[int, int] = (192, 192)  # width, height of the windows, page pixels
        snap: int = 16  # windows start at multiples of this, page pixels
        focus: float = 0.9  # share of the windows that hold a chosen glyph; the others lie anywhere
        empty: float = 0.3  # weight of patches without a glyph
        overview: float = 1.0  # weight of the whole page's areas

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.charset, self.labels = self.source.charset, self.source.labels

    def wrap(self, model: nn.Module) -> nn.Module:
        return DenseHeads(model, self.setup.heads, self.options, len(self.charset) + 1, len(self.labels))

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


class DenseHeads(AuxiliaryHeads):
    """Heads on the vision encoder's patches and merged tokens, and their loss.

    Args:
        classes: of glyphs, with the class "none".
        labels: number of the areas' labels.
    """

    def __init__(self, model: nn.Module, saved: Mapping[str, Tensor], options: Any, classes: int, labels: int) -> None:
        super().__init__(model, saved)
        self.options, self.classes, self.labels = options, classes, labels
        vision, text = self.model.config.vision_config, self.model.config.text_config
        self.add_head("patch", nn.Linear(vision.embed_dim, classes))
        self.add_head("glyph", nn.Linear(text.hidden_size, 4 * classes))
        self.add_head("area", nn.Linear(text.hidden_size, 4 * labels))

    def see(self, pixel_values: Tensor, image_grid_thw: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (4 n, embed_dim) before the merger, in merge order, and merged tokens (n, d)."""
        out = self.model.model.visual(pixel_values, grid_thw=image_grid_thw)
        return out.last_hidden_state, out.pooler_output

    def forward(self, pixel_values, image_grid_thw, glyph, area, legible) -> dict[str, Any]:
        patches, tokens = self.see(pixel_values, image_grid_thw)
        return self.dense_loss(patches, tokens, glyph, area, legible)

    def dense_loss(self, patches: Tensor, tokens: Tensor, glyph: Tensor, area: Tensor, legible: int) -> dict[str, Any]:
        """glyph (n, 4), area (n, 4, labels); the glyphs of the first `legible` tokens can be read."""
        target = glyph[:legible].reshape(-1)
        by_patch = self.heads["patch"](patches[: 4 * legible])
        by_token = self.heads["glyph"](tokens[:legible]).view(-1, self.classes)
        areas = self.heads["area"](tokens).view(-1, 4, self.labels)
        losses = F.binary_cross_entropy_with_logits(areas, area, reduction="none").sum(-1)
        colours = losses[:legible].mean() + self.options.overview * losses[legible:].mean()
        metrics = {
            "patches": _share_read(by_patch, target),
            "glyphs": _share_read(by_token, target),
            "areas": _share_named(areas[legible:], area[legible:]),
        }
        return {"loss": self._reading(by_patch, target) + self._reading(by_token, target) + colours, "metrics": metrics}

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

    def wrap(self, model: nn.Module) -> nn.Module:
        tokenizer = self.processor.tokenizer
        chars = [tokenizer.encode(c, add_special_tokens=False)[0] for c in self.charset]
        names = [tokenizer.encode(" " + label, add_special_tokens=False)[0] for label in self.labels]
        return AlignHeads(model, self.setup.heads, self.options, chars, names)


class AlignHeads(DenseHeads):
    """The heads and loss of `Dense`, and the cosine loss.

    Args:
        chars, names: token ids of the glyphs and of the areas' labels.
    """

    def __init__(
        self, model: nn.Module, saved: Mapping[str, Tensor], options: Any, chars: list[int], names: list[int]
    ) -> None:
        super().__init__(model, saved, options, len(chars) + 1, len(names))
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

    def forward(self, pixel_values, image_grid_thw, glyph, area, legible) -> dict[str, Any]:
        patches, tokens = self.see(pixel_values, image_grid_thw)
        readable = torch.cat([glyph[:legible], torch.zeros_like(glyph[legible:])])
        target = self.targets(readable, area)
        cosine = F.cosine_similarity(tokens, target, dim=-1)
        with_glyph = (readable > 0).any(-1)
        with_area = (target.norm(dim=-1) > 0.2) & ~with_glyph
        glyphs, areas = (cosine[mask].sum() / mask.sum().clamp(min=1) for mask in (with_glyph, with_area))
        dense = self.dense_loss(patches, tokens, glyph, area, legible)
        metrics = {"cosine": glyphs.item(), "cosine_areas": areas.item(), **dense["metrics"]}
        return {"loss": dense["loss"] + self.options.weight * (2 - glyphs - areas), "metrics": metrics}
