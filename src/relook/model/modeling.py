"""Qwen2-VL that may look again: a delta over transformers' model at the embedding seam.

The decoder is untouched. What changes is what goes into it: pads of re-encoded images are filled with projected
features, conditioned on a hidden state that the same decoder computed further left, and the control token's embedding
is that hidden state. By causality one pass is enough: run every row up to its control token, look, continue from the
keys and values (`waves`). With mask modelling (training only) the prefix runs once more.

`LooksAgain` is the mechanism and knows only `get_input_embeddings`, `get_image_features`, `get_rope_index` and
`language_model`, which Qwen2.5-VL and Qwen3-VL also have; `VPTQwen2VLForConditionalGeneration` gives it to Qwen2-VL.
This module refuses to know images, text and files.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.models.qwen2_vl.modeling_qwen2_vl import CausalLMOutputWithPast

from relook.errors import UserError

from .configuration import VPTQwen2VLConfig
from .encoders import ENCODERS, build_encoder
from .generation import LooksInGenerate
from .keys import register_keys
from .projector import ConditionedProjector, init_projector_layer
from .splice import Block, CallSite, find_blocks, find_calls, paragraph_mask, put
from .waves import Job, Waves


@dataclass
class LookAgainOutput(CausalLMOutputWithPast):
    """transformers' output, and `last_state` (B, d): the final hidden state of the last column.

    Where the last token is a `*_action_start`, that state is the condition of the look it asks for; `generate` hands it
    to the next step, so that nothing needs to be remembered on the model.
    """

    last_state: Tensor | None = None


class LooksAgain(LooksInGenerate, nn.Module):
    """Gives a transformers vision-language model its looks. Mix in left of the model class."""

    # What the mechanism uses of the class it is mixed into (transformers' own annotations are wider than that).
    config: Any
    model: Any
    lm_head: Any
    device: Any
    loss_function: Any
    get_input_embeddings: Any
    encoders: Any
    projectors: Any
    load_report: Any = None

    def _add_looks(self, config: Any) -> None:
        """Encoders and projectors, keyed by the look's name."""
        width = config.text_config.hidden_size
        extra = [look for look in config.reencodings if look in ENCODERS]
        self.encoders = nn.ModuleDict(
            {look: build_encoder(look, config.encoders.get(look), config._attn_implementation) for look in extra}
        )
        self.projectors = nn.ModuleDict()
        for look in config.reencodings:
            if look in ENCODERS:
                spec = ENCODERS[look]
                projector = ConditionedProjector(spec.width(self.encoders[look].config), width, spec.feature_map)
            else:  # the model's own ViT
                projector = ConditionedProjector(width, width, "identity")
            self.projectors[look] = projector

    # -- pieces: what `forward` and the loop are made of; none keeps state -------------------------------------------

    def encode(self, look: str, **tensors: Any) -> list[Tensor]:
        """Encode images for one look, unconditioned.

        Args:
            look: "image" (first look, crops) or "clip": `pixel_values` (patches, p) and `image_grid_thw` (k, 3);
                "detection": `detection_images` (k, 3, 224, 224); "seg": `seg_images` (k, 3, 1024, 1024).

        Returns:
            one tensor per image: (n, d) merged ViT tokens, (256, c) DINOv2 tokens or a (c, 64, 64) SAM map.
        """
        with self._frozen_inputs():
            if look in ENCODERS:
                spec, encoder = ENCODERS[look], self._branch(self.encoders, look)
                images = tensors[spec.input].to(device=self.device, dtype=encoder.dtype)
                return list(spec.features(encoder(images)))
            output = self.model.get_image_features(
                tensors["pixel_values"].to(self.device), tensors["image_grid_thw"].to(self.device), return_dict=True
            )
            return list(output.pooler_output)

    def project(self, look: str, features: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """One image's features -> tokens for the language model (n, d), and the attention map <F_i, c> (n,) or None.

        `condition` (d,) is the final hidden state at the call's `*_action_start`. First looks and crops ("image",
        "region") pass through.
        """
        if look in ("image", "region"):
            return features, None
        return self._branch(self.projectors, look)(features, condition)

    def decode(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor, past_key_values: Cache | None
    ) -> Tensor:
        """Run the language model on (B, L, d) embeddings; the cache grows in place by L.

        `attention_mask` (B, past + L), `position_ids` (3, B, L). Returns the final normed hidden states (B, L, d).
        """
        return self.model.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        ).last_hidden_state

    def rope_positions(self, input_ids: Tensor, image_grid_thw: Tensor | None = None, start: int = 0):
        """Positions of one block of a conversation: (3, L) and the position after it.

        `input_ids` (L,), `image_grid_thw` (k, 3) the grids of the block's own `<|image_pad|>` images, `start` the
        position after everything before. Example: 2 text tokens, a 4x4-patch image (2x2 tokens), 1 text token from
        start 5 take t = 5 6 7 7 7 7 9, h = 5 6 7 7 8 8 9, w = 5 6 7 8 7 8 9; the next block starts at 10.
        """
        positions = self._positions(input_ids[None], None, image_grid_thw, None)[:, 0]
        return positions + start, start + int(positions.max()) + 1

    def _positions(self, input_ids, attention_mask, image_grid_thw, video_grid_thw) -> Tensor:
        """(3, B, L) positions of whole conversations; padding columns hold arbitrary values."""
        if self.config.position_mode == "sequential":
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            return (real.long().cumsum(-1) - 1).clamp(min=0)[None].expand(3, -1, -1)
        kinds = (input_ids == self.config.image_token_id).int() + 2 * (input_ids == self.config.video_token_id).int()
        return self.model.get_rope_index(
            input_ids,
            kinds,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            attention_mask=attention_mask,
        )[0]

    def _branch(self, branches: nn.ModuleDict, look: str) -> Any:
        if look not in branches:
            raise UserError(f"this model has no {look!r} look; it has {', '.join(self.config.looks) or 'none'}")
        return branches[look]

    def _frozen_inputs(self):
        """The published code cut gradients into embeddings and vision towers; relook only when asked to."""
        return torch.no_grad() if self.config.input_grads == "published" else nullcontext()

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        clip_pixel_values: Tensor | None = None,
        clip_images_grid_thw: Tensor | None = None,
        detection_images: Tensor | None = None,
        seg_images: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        logits_to_keep: int | Tensor = 0,
        previous_state: Tensor | None = None,
        **kwargs: Any,
    ) -> LookAgainOutput:
        """Teacher-forced pass over conversations with any mix of looks.

        Args beyond the base model's:
            clip_pixel_values (patches, p), clip_images_grid_thw (k, 3): images for `<|clip_image_pad|>`.
            detection_images (k, 3, 224, 224), seg_images (k, 3, 1024, 1024).
            previous_state (B, d): `last_state` of the step before, when a cache is continued right after a
                `*_action_start`.
        Images of each kind are listed in row-major order of their pads. Positions are computed here when absent.

        Returns:
            LookAgainOutput: loss, logits (B, L, vocab), past_key_values, last_state (B, d).
        """
        looks = {
            "clip": dict(pixel_values=clip_pixel_values, image_grid_thw=clip_images_grid_thw),
            "detection": dict(detection_images=detection_images),
            "seg": dict(seg_images=seg_images),
        }
        looks = {name: t for name, t in looks.items() if next(iter(t.values())) is not None}
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None and input_ids is not None:
            if past:
                raise UserError(
                    "a cache is continued without position_ids, and positions after an image cannot be told from the "
                    "new tokens alone. Pass position_ids=model.rope_positions(block, grids, start)[0][:, None]"
                )
            position_ids = self._positions(input_ids, attention_mask, image_grid_thw, video_grid_thw)

        base = dict(
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_encoder_outputs=mm_encoder_outputs,
        )
        if input_ids is None:
            if looks:
                raise UserError("images for a look came without input_ids: their places are found by token id")
            calls, blocks, features = [], [], {}
        else:
            features = {name: self.encode(name, **tensors) for name, tensors in looks.items()}
            inputs_embeds, calls, blocks = self._embed(input_ids, inputs_embeds, features, previous_state, base)
            base = {}

        run = dict(past_key_values=past_key_values, use_cache=use_cache, **kwargs)
        if not calls or input_ids is None or inputs_embeds is None or position_ids is None:
            outputs = self.model(
                inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, **base, **run
            )
        else:
            job = Job(inputs_embeds, attention_mask, position_ids[-3:], calls, blocks, features)
            outputs = self._run_with_calls(job, input_ids, run)
        return self._head(outputs, labels, logits_to_keep, kwargs)

    def _embed(self, input_ids, inputs_embeds, features, previous_state, base):
        """Fill in everything known before the language model runs; find what has to wait for a condition."""
        with self._frozen_inputs():
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            inputs_embeds = self._splice_base_images(input_ids, inputs_embeds, **base)
        conditioned = self.config.num_inner_forward_run == 2
        ids = {n: i for n in self.config.reencodings if (i := self.config.reencode_ids(n)) is not None}
        calls = find_calls(input_ids, ids) if conditioned and ids else []
        if conditioned and previous_state is not None:
            for token in ids.values():
                is_action = input_ids[:, :1, None] == token.action
                first = torch.where(is_action, previous_state[:, None].to(inputs_embeds.dtype), inputs_embeds[:, :1])
                inputs_embeds = torch.cat([first, inputs_embeds[:, 1:]], dim=1)
        blocks: list[Block] = []
        for look, images in features.items():
            counts = [self._token_count(look, x) for x in images]
            found = find_blocks(input_ids, look, ids[look].pad, counts, calls)
            for block in found:
                if block.call is None:
                    tokens, _ = self.project(look, images[block.image])
                    inputs_embeds = put(inputs_embeds, block.row, block.columns, tokens)
            blocks += found
        return inputs_embeds, calls, blocks

    def _splice_base_images(
        self,
        input_ids,
        inputs_embeds,
        pixel_values,
        pixel_values_videos,
        image_grid_thw,
        video_grid_thw,
        mm_encoder_outputs,
    ) -> Tensor:
        """First looks and crops, exactly as the base model places them."""
        outputs = dict(mm_encoder_outputs or {})
        if outputs.get("image") is None and pixel_values is not None:
            outputs["image"] = self.model.get_image_features(pixel_values, image_grid_thw, return_dict=True)
        if outputs.get("video") is None and pixel_values_videos is not None:
            outputs["video"] = self.model.get_video_features(pixel_values_videos, video_grid_thw, return_dict=True)
        for index, (kind, output) in enumerate((k, outputs.get(k)) for k in ("image", "video")):
            if output is not None:
                values = torch.cat(list(output.pooler_output), dim=0).to(inputs_embeds)
                mask = self.model.get_placeholder_mask(input_ids, inputs_embeds, **{f"{kind}_features": values})[index]
                inputs_embeds = inputs_embeds.masked_scatter(mask, values)
        return inputs_embeds

    def _token_count(self, look: str, features: Tensor) -> int:
        return features.shape[0] if features.ndim == 2 else (features.shape[1] // 4) * (features.shape[2] // 4)

    def _run_with_calls(self, job: Job, input_ids: Tensor, run: dict[str, Any]) -> Any:
        """Run a batch with calls: in waves over one cache, or the prefix first where a mask hides it afterwards."""
        masked = self._masked_columns(input_ids, job)
        checkpointing = self.training and self.model.language_model.gradient_checkpointing
        if masked is None and not checkpointing:
            return Waves(self, job, run).run()
        # Checkpointed decoder layers drop the cache (transformers 5.23), so the prefix is run again, not continued.
        embeds = self._conditioned_embeddings(job, keep_cache=not checkpointing)
        if masked is not None:
            embeds = embeds.masked_fill(masked.unsqueeze(-1), 0)
        return self.model.language_model(
            inputs_embeds=embeds, attention_mask=job.attention_mask, position_ids=job.position_ids, **run
        )

    def _conditioned_embeddings(self, job: Job, keep_cache: bool) -> Tensor:
        """Pass 1: only up to the last control token of each row."""
        if keep_cache:
            return Waves(self, job, {}).conditions()
        embeds = job.inputs_embeds
        for order in range(job.depth):
            calls = [c for c in job.calls if c.order == order]
            end = max(c.start for c in calls) + 1
            states = self.model.language_model(
                inputs_embeds=embeds[:, :end],
                attention_mask=None if job.attention_mask is None else job.attention_mask[:, :end],
                position_ids=job.position_ids[..., :end],
                use_cache=False,
            ).last_hidden_state
            for call in calls:
                embeds = self.spend(job, embeds, call, states[call.row, call.start])
        return embeds

    def spend(self, job: Job, embeds: Tensor, call: CallSite, state: Tensor) -> Tensor:
        """Spend one condition: it is the control token's embedding and conditions the blocks that answer the call."""
        embeds = put(embeds, call.row, torch.tensor([call.start + 1], device=embeds.device), state[None])
        for block in job.blocks:
            if block.call == call:
                tokens, _ = self.project(block.look, job.features[block.look][block.image], state)
                embeds = put(embeds, block.row, block.columns, tokens)
        return embeds

    def _masked_columns(self, input_ids: Tensor, job: Job) -> Tensor | None:
        """Mask modelling: which embeddings pass 2 does not see; None for none. Drawn once per batch, as published."""
        mode = self.config.para_mask_id
        if not self.training or mode == 0 or torch.rand(1).item() >= self.config.para_mask_ratio:
            return None
        mask = paragraph_mask(
            input_ids, self.config.para_start_id, self.config.para_end_id, (1, 3) if mode == 2 else (1,)
        )
        rows = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        rows[[c.row for c in job.calls]] = True
        return mask & rows[:, None]

    def _head(self, outputs: Any, labels: Tensor | None, logits_to_keep: int | Tensor, kwargs: dict[str, Any]):
        hidden = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return LookAgainOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            last_state=hidden[:, -1],
        )


class VPTQwen2VLForConditionalGeneration(LooksAgain, Qwen2VLForConditionalGeneration):
    """Qwen2-VL with visual perception tokens. Without a look its logits are the base model's, bit for bit."""

    config_class = VPTQwen2VLConfig

    def __init__(self, config: VPTQwen2VLConfig):
        super().__init__(config)
        self._add_looks(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # transformers visits modules that own parameters: the projectors' layers, never a projector itself.
        projectors = getattr(self, "projectors", {}).values()  # absent while the base class builds itself
        if any(module is layer for projector in projectors for layer in projector.children()):
            init_projector_layer(module)
        else:
            super()._init_weights(module)


register_keys(VPTQwen2VLForConditionalGeneration.__name__)
