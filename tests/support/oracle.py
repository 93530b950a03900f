"""The yardstick: a stock base and arXiv 2502.17425, one uncached full forward a call, nothing of relook imported.

`Oracle(model)` copies the weights of a model into transformers' own class of its base. A conversation
is walked from left to right: at `*_action_start`, directly followed by its `*_action`, the decoder runs over everything
so far, and the final hidden state h there becomes the input embedding of `*_action` and the condition of that look's
images from then on: c = Linear_c(LayerNorm_c(h)), y_i = F_i + <F_i, c> c (section 5 of spec.md). Images without an
earlier call of their kind stay F. Inner features of the ViT (deepstack) are added as they are wherever its final ones
stand. Slow, and with nothing to get wrong: no cache, no batch, no padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, layer_norm, linear
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

LOOKS = ("clip", "detection", "seg")
INPUTS = {"clip": "clip_pixel_values", "detection": "detection_images", "seg": "seg_images"}
STOCK = {
    "qwen2_vl_vpt": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl_vpt": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl_vpt": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}
SHARED = (
    *("text_config", "vision_config", "image_token_id", "video_token_id", "vision_start_token_id"),
    *("vision_end_token_id", "tie_word_embeddings"),
)


def stock_model(model: Any) -> Any:
    """transformers' own model of the same base with the same weights."""
    config = model.config.to_dict()
    settings, kind = STOCK[config["model_type"]]
    stock = kind(settings(**{key: config[key] for key in SHARED}))
    own = ("encoders.", "projectors.")
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(own)})
    return stock.eval()


class Oracle:
    """What a model with perception tokens computes, by the book.

    Args:
        model: whose weights, encoders (transformers' own classes) and token ids are taken.
    """

    def __init__(self, model: Any):
        config, weights = model.config.to_dict(), model.state_dict()
        self.stock = stock_model(model)
        self.stock.to(next(model.parameters()).dtype).eval()
        self.stock.generation_config = model.generation_config
        self.weights = {k.removeprefix("projectors."): v for k, v in weights.items() if k.startswith("projectors.")}
        self.encoders, self.image = model.encoders, config["image_token_id"]
        self.conditioned = config["num_inner_forward_run"] == 2  # 1: alignment, one pass without a condition
        self.tokens = {  # pad, action start, action
            look: tuple(config[f"{look}_{name}_id"] for name in ("image_token", "action_start", "action"))
            for look in LOOKS
            if any(name.startswith(f"projectors.{look}.") for name in weights)
        }

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _norm(self, look: str, part: str, x: Tensor) -> Tensor:
        weight, bias = (self.weights[f"{look}.layernorm_{part}.{name}"] for name in ("weight", "bias"))
        return layer_norm(x, weight.shape, weight, bias)

    def _linear(self, look: str, part: str, x: Tensor) -> Tensor:
        return linear(x, *(self.weights[f"{look}.linear_{part}.{name}"] for name in ("weight", "bias")))

    def _vit(self, images: Tensor, grids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Of every image: merged tokens (n, d), and inner features (k, n, d), k 0 in most bases."""
        output = self.stock.model.get_image_features(images, grids)
        final, inner = list(output.pooler_output), getattr(output, "deepstack_features", [])
        return final, [torch.stack([layer[i] for layer in inner] or [x])[: len(inner)] for i, x in enumerate(final)]

    def _features(self, look: str, row: dict[str, Tensor]) -> list[Tensor]:
        """F of every image of a look, each (n, d)."""
        images = row[INPUTS[look]]
        if look == "clip":
            return self._vit(images, row["clip_images_grid_thw"])[0]
        states = self.encoders[look](images).last_hidden_state
        if look == "detection":  # DINOv2: the class token dropped
            return [self._linear(look, "feature", self._norm(look, "feature", x[1:])) for x in states]
        kernel, bias = (self.weights[f"seg.conv_feature.{name}"] for name in ("weight", "bias"))
        normed = self._norm(look, "feature", states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # over channels
        return list(conv2d(normed, kernel, bias, stride=4).flatten(2).transpose(1, 2))

    def _project(self, look: str, features: Tensor, state: Tensor | None) -> Tensor:
        if state is None:
            return features
        c = self._linear(look, "condition", self._norm(look, "condition", state))
        return features + (features @ c)[:, None] * c

    def _hidden(self, embeds: Tensor, positions: Tensor, inner: dict[int, Tensor]) -> Tensor:
        """(L, d) final normed hidden states of one forward; `inner` (k, n, d) by the first column it belongs to."""
        return self.stock.model.language_model(
            inputs_embeds=embeds[None], position_ids=positions, use_cache=False, **deepstack_inputs(len(embeds), inner)
        ).last_hidden_state[0]

    # -- whole conversations -------------------------------------------------------------------------------------------

    def logits(self, row: dict[str, Tensor]) -> Tensor:
        """(L, V) logits of one conversation without padding.

        `row`: `input_ids` (1, L) and the images of each kind in the order of their pads, under the names of `forward`.
        """
        ids = row["input_ids"][0].tolist()
        embeds = self.stock.get_input_embeddings()(row["input_ids"])[0].clone()
        kinds = (row["input_ids"] == self.image).int()
        inner: dict[int, Tensor] = {}
        if "pixel_values" in row:
            seen, layers = self._vit(row["pixel_values"], row["image_grid_thw"])
            embeds[kinds[0].bool()] = torch.cat(seen).to(embeds)
            for x, at in zip(layers, _starts(ids, self.image, [len(x) for x in seen]), strict=True):
                inner[at] = x
        clips = self._vit(row["clip_pixel_values"], row["clip_images_grid_thw"])[1] if INPUTS["clip"] in row else []
        positions, _ = self.stock.model.get_rope_index(row["input_ids"], kinds, row.get("image_grid_thw"))
        waiting = {look: self._features(look, row) for look in self.tokens if INPUTS[look] in row}
        state: dict[str, Tensor] = {}
        at = 0
        while at < len(ids):
            for look, (pad, start, action) in self.tokens.items():
                if self.conditioned and ids[at : at + 2] == [start, action]:
                    state[look] = self._hidden(embeds[: at + 1], positions[..., : at + 1], inner)[at]
                    embeds = torch.cat([embeds[: at + 1], state[look][None], embeds[at + 2 :]])
                elif ids[at] == pad:
                    block = self._project(look, waiting[look].pop(0), state.get(look))
                    embeds = torch.cat([embeds[:at], block, embeds[at + len(block) :]])
                    if look == "clip":
                        inner[at] = clips.pop(0)
                    at += len(block) - 1
            at += 1
        return self.stock.lm_head(self._hidden(embeds, positions, inner))

    def generate(self, row: dict[str, Tensor], steps: int, suppress: tuple[int, ...] = ()) -> list[int]:
        """`steps` greedy tokens after the prompt, none of `suppress`; after `*_action_start` its action is written."""
        row, forced = dict(row), {start: action for _, start, action in self.tokens.values()}
        for _ in range(steps):
            logits = self.logits(row)[-1].index_fill(0, torch.tensor(suppress, dtype=torch.long), -torch.inf)
            token = forced.get(int(row["input_ids"][0, -1]), int(logits.argmax()))
            row["input_ids"] = torch.cat([row["input_ids"], torch.tensor([[token]])], dim=1)
        return row["input_ids"][0, -steps:].tolist()


def deepstack_inputs(length: int, inner: dict[int, Tensor]) -> dict[str, Any]:
    """The decoder's inputs for inner features (k, n, d), by the first of the `length` columns that they belong to."""
    seen = {at: x for at, x in sorted(inner.items()) if at < length and len(x)}
    if not seen:
        return {}
    mask = torch.zeros(1, length, dtype=torch.bool)
    for at, x in seen.items():
        mask[0, at : at + x.shape[1]] = True
    return {"visual_pos_masks": mask, "deepstack_visual_embeds": list(torch.cat(list(seen.values()), dim=1))}


def _starts(ids: list[int], pad: int, lengths: list[int]) -> list[int]:
    """Column of the first pad of each image of `lengths` pads."""
    columns = [i for i, token in enumerate(ids) if token == pad]
    return [columns[sum(lengths[:n])] for n in range(len(lengths))]
