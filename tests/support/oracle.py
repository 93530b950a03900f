"""The yardstick: stock Qwen2-VL and arXiv 2502.17425, one uncached full forward a call, nothing of relook imported.

`Oracle(model)` copies the weights of a model into transformers' own `Qwen2VLForConditionalGeneration`. A conversation
is walked from left to right: at `*_action_start`, directly followed by its `*_action`, the decoder runs over everything
so far, and the final hidden state h there becomes the input embedding of `*_action` and the condition of that look's
images from then on: c = Linear_c(LayerNorm_c(h)), y_i = F_i + <F_i, c> c (section 5 of spec.md). Images without an
earlier call of their kind stay F. Slow, and with nothing to get wrong: no cache, no batch, no padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, layer_norm, linear
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

LOOKS = ("clip", "detection", "seg")
INPUTS = {"clip": "clip_pixel_values", "detection": "detection_images", "seg": "seg_images"}
SHARED = (
    *("text_config", "vision_config", "image_token_id", "video_token_id", "vision_start_token_id"),
    *("vision_end_token_id", "tie_word_embeddings"),
)


class Oracle:
    """What a model with perception tokens computes, by the book.

    Args:
        model: whose weights, encoders (transformers' own classes) and token ids are taken.
    """

    def __init__(self, model: Any):
        config, weights = model.config.to_dict(), model.state_dict()
        self.stock = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**{key: config[key] for key in SHARED}))
        own = ("encoders.", "projectors.")
        self.stock.load_state_dict({k: v for k, v in weights.items() if not k.startswith(own)})
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

    def _features(self, look: str, row: dict[str, Tensor]) -> list[Tensor]:
        """F of every image of a look, each (n, d)."""
        images = row[INPUTS[look]]
        if look == "clip":
            return list(self.stock.model.get_image_features(images, row["clip_images_grid_thw"]).pooler_output)
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

    def _hidden(self, embeds: Tensor, positions: Tensor) -> Tensor:
        """(L, d) final normed hidden states of one full forward."""
        return self.stock.model.language_model(
            inputs_embeds=embeds[None], position_ids=positions, use_cache=False
        ).last_hidden_state[0]

    # -- whole conversations -------------------------------------------------------------------------------------------

    def logits(self, row: dict[str, Tensor]) -> Tensor:
        """(L, V) logits of one conversation without padding.

        `row`: `input_ids` (1, L) and the images of each kind in the order of their pads, under the names of `forward`.
        """
        ids = row["input_ids"][0].tolist()
        embeds = self.stock.get_input_embeddings()(row["input_ids"])[0].clone()
        kinds = (row["input_ids"] == self.image).int()
        if "pixel_values" in row:
            seen = self.stock.model.get_image_features(row["pixel_values"], row["image_grid_thw"]).pooler_output
            embeds[kinds[0].bool()] = torch.cat(list(seen)).to(embeds)
        positions, _ = self.stock.model.get_rope_index(row["input_ids"], kinds, row.get("image_grid_thw"))
        waiting = {look: self._features(look, row) for look in self.tokens if INPUTS[look] in row}
        state: dict[str, Tensor] = {}
        at = 0
        while at < len(ids):
            for look, (pad, start, action) in self.tokens.items():
                if self.conditioned and ids[at : at + 2] == [start, action]:
                    state[look] = self._hidden(embeds[: at + 1], positions[..., : at + 1])[at]
                    embeds = torch.cat([embeds[: at + 1], state[look][None], embeds[at + 2 :]])
                elif ids[at] == pad:
                    block = self._project(look, waiting[look].pop(0), state.get(look))
                    embeds = torch.cat([embeds[:at], block, embeds[at + len(block) :]])
                    at += len(block) - 1
            at += 1
        return self.stock.lm_head(self._hidden(embeds, positions))

    def generate(self, row: dict[str, Tensor], steps: int, suppress: tuple[int, ...] = ()) -> list[int]:
        """`steps` greedy tokens after the prompt, none of `suppress`; after `*_action_start` its action is written."""
        row, forced = dict(row), {start: action for _, start, action in self.tokens.values()}
        for _ in range(steps):
            logits = self.logits(row)[-1].index_fill(0, torch.tensor(suppress, dtype=torch.long), -torch.inf)
            token = forced.get(int(row["input_ids"][0, -1]), int(logits.argmax()))
            row["input_ids"] = torch.cat([row["input_ids"], torch.tensor([[token]])], dim=1)
        return row["input_ids"][0, -steps:].tolist()
