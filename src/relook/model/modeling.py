"""Qwen2-VL that may look again: a delta over transformers' model at the embedding seam.

The decoder is untouched. What changes is what goes into it: pads of re-encoded images are filled with projected
features, conditioned on a hidden state that the same decoder computed further left, and the control token's embedding
is that hidden state. By causality one pass is enough: run every row up to its control token, look, continue from the
keys and values (`segments`). With mask modelling (training only) the prefix runs once more.

`LookAgainMixin` is the mechanism and knows only `get_input_embeddings`, `get_image_features`, `get_rope_index` and
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
from .generation import LookGenerationMixin
from .packed import Packed
from .projector import ConditionedProjector, init_projector_layer
from .published import register_keys
from .segments import (
    CallSite,
    ImageSpan,
    SegmentedBatch,
    SegmentedForward,
    find_calls,
    find_image_spans,
    max_over_ranks,
    paragraph_mask,
    put_columns,
    same_images,
    zero_of,
)


@dataclass
class LookAgainOutput(CausalLMOutputWithPast):
    """transformers' output, and `last_state` (B, d): the final hidden state of the last column.

    Where the last token is a `*_action_start`, that state is the condition of the look it asks for; `generate` hands it
    to the next step, so that nothing needs to be remembered on the model.
    """

    last_state: Tensor | None = None


class LookAgainMixin(LookGenerationMixin, nn.Module):
    """Gives a transformers vision-language model its looks. Mix in left of the model class."""

    # What the mechanism uses of the class it is mixed into (transformers' own annotations are wider than that).
    config: Any
    model: Any
    lm_head: Any
    device: Any
    loss_function: Any
    lockstep: bool = False  # set where processes hold a part of each weight, see the module of that name
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
        with self._input_grad_context():
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
        """Positions of one span of a conversation: (3, L) and the position after it.

        `input_ids` (L,), `image_grid_thw` (k, 3) the grids of the span's own `<|image_pad|>` images, `start` the
        position after everything before. Example: 2 text tokens, a 4x4-patch image (2x2 tokens), 1 text token from
        start 5 take t = 5 6 7 7 7 7 9, h = 5 6 7 7 8 8 9, w = 5 6 7 8 7 8 9; the next span starts at 10.
        """
        positions = self._positions(input_ids[None], None, image_grid_thw, None)[:, 0]
        return positions + start, start + int(positions.max()) + 1

    def _positions(self, input_ids, attention_mask, image_grid_thw, video_grid_thw, packed=None) -> Tensor:
        """(3, B, L) positions of whole conversations; padding columns hold arbitrary values."""
        if packed is not None:
            ids, real = packed.apart(input_ids), packed.apart(torch.ones_like(input_ids))
            return packed.together(self._positions(ids, real, image_grid_thw, video_grid_thw))
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

    def _input_grad_context(self):
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
        conversation_ids: Tensor | None = None,
        para_mask_modes: Tensor | None = None,
        **kwargs: Any,
    ) -> LookAgainOutput:
        """Teacher-forced pass over conversations with any mix of looks.

        Args beyond the base model's:
            clip_pixel_values (patches, p), clip_images_grid_thw (k, 3): images for `<|clip_image_pad|>`.
            detection_images (k, 3, 224, 224), seg_images (k, 3, 1024, 1024).
            previous_state (B, d): `last_state` of the step before, when a cache is continued right after a
                `*_action_start`.
            conversation_ids (B, L): of rows that hold several conversations, which one each column belongs to (see
                `packed.Packed`); they then share nothing but the row.
            para_mask_modes (n,): 0, 1 or 2, the mask mode of each conversation; drawn where absent (see the config).
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
        packed = self._packed(conversation_ids, past)
        if position_ids is None and input_ids is not None:
            if past:
                raise UserError(
                    "a cache is continued without position_ids, and positions after an image cannot be told from the "
                    "new tokens alone. Pass position_ids=model.rope_positions(span, grids, start)[0][:, None]"
                )
            position_ids = self._positions(input_ids, attention_mask, image_grid_thw, video_grid_thw, packed)

        base = dict(
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_encoder_outputs=mm_encoder_outputs,
        )
        min_depth = 0
        if input_ids is None:
            if looks:
                raise UserError("images for a look came without input_ids: their places are found by token id")
            calls, spans, features = [], [], {}
        else:
            zero = zero_of(self._used_by_some()) if self.lockstep and self.training else torch.zeros(())
            features = self._encode_looks(looks, base)
            inputs_embeds, calls, spans = self._embed(
                input_ids, inputs_embeds, features, previous_state, base, conversation_ids
            )
            base = {}
            if self.lockstep:
                inputs_embeds = inputs_embeds + zero.to(inputs_embeds)
                min_depth = max_over_ranks(max((c.order + 1 for c in calls), default=0), inputs_embeds.device)

        run = dict(past_key_values=past_key_values, use_cache=use_cache if packed is None else False, **kwargs)
        if not (calls or min_depth) or input_ids is None or inputs_embeds is None or position_ids is None:
            where = dict(attention_mask=attention_mask, position_ids=position_ids)
            if packed is not None and inputs_embeds is not None and position_ids is not None:
                where = packed.whole(position_ids[-3:], inputs_embeds.dtype)
            outputs = self.model(inputs_embeds=inputs_embeds, **where, **base, **run)
        else:
            mask = attention_mask if packed is None else (packed.numbers >= 0).long()
            batch = SegmentedBatch(inputs_embeds, mask, position_ids[-3:], calls, spans, features, packed, min_depth)
            outputs = self._run_with_calls(batch, self._masked_columns(input_ids, batch, para_mask_modes), run)
        return self._head(outputs, labels, logits_to_keep, kwargs)

    def _used_by_some(self) -> list[nn.Parameter]:
        """All that batches may do without: encoders, the vision tower, projectors."""
        decoder = {id(p) for part in (self.model.language_model, self.lm_head) for p in part.parameters()}
        return [p for p in self.parameters() if id(p) not in decoder]

    def _packed(self, conversation_ids: Tensor | None, past: int) -> Packed | None:
        if conversation_ids is None:
            return None
        if past:
            raise UserError("packed conversations cannot continue a cache; pass them without past_key_values")
        return Packed(conversation_ids, self.model.language_model.config._attn_implementation)

    def _encode_looks(self, looks: dict[str, Any], base: dict[str, Any]) -> dict[str, list[Tensor]]:
        """Features of every look. A clip look at what a first look or crop shows takes its features: one tower run."""
        images, clip = base["pixel_values"], looks.get("clip")
        if clip is None or images is None or (base["mm_encoder_outputs"] or {}).get("image") is not None:
            return {name: self.encode(name, **tensors) for name, tensors in looks.items()}
        pixels, grids = clip["pixel_values"], clip["image_grid_thw"]
        seen = same_images(pixels, grids, images, base["image_grid_thw"])
        with self._input_grad_context():
            first = self.model.get_image_features(images, base["image_grid_thw"], return_dict=True)
        base["mm_encoder_outputs"] = {**(base["mm_encoder_outputs"] or {}), "image": first}
        fresh = [i for i, at in enumerate(seen) if at is None]
        made: list[Tensor] = []
        if fresh:
            parts = pixels.split(grids.prod(-1).tolist())
            made = self.encode("clip", pixel_values=torch.cat([parts[i] for i in fresh]), image_grid_thw=grids[fresh])
        found = iter(made)
        features = {"clip": [next(found) if at is None else first.pooler_output[at] for at in seen]}
        return features | {name: self.encode(name, **tensors) for name, tensors in looks.items() if name != "clip"}

    def _embed(self, input_ids, inputs_embeds, features, previous_state, base, conversation_ids=None):
        """Fill in everything known before the language model runs; find what has to wait for a condition."""
        with self._input_grad_context():
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            inputs_embeds = self._merge_base_images(input_ids, inputs_embeds, **base)
        conditioned = self.config.num_inner_forward_run == 2
        ids = {n: i for n in self.config.reencodings if (i := self.config.reencode_ids(n)) is not None}
        calls = find_calls(input_ids, ids, conversation_ids) if conditioned and ids else []
        if conditioned and previous_state is not None:
            for token in ids.values():
                is_action = input_ids[:, :1, None] == token.action
                first = torch.where(is_action, previous_state[:, None].to(inputs_embeds.dtype), inputs_embeds[:, :1])
                inputs_embeds = torch.cat([first, inputs_embeds[:, 1:]], dim=1)
        spans: list[ImageSpan] = []
        for look, images in features.items():
            counts = [self._token_count(look, x) for x in images]
            found = find_image_spans(input_ids, look, ids[look].pad, counts, calls, conversation_ids)
            for span in found:
                if span.call is None:
                    tokens, _ = self.project(look, images[span.image])
                    inputs_embeds = put_columns(inputs_embeds, span.row, span.columns, tokens)
            spans += found
        return inputs_embeds, calls, spans

    def _merge_base_images(
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

    def _run_with_calls(self, batch: SegmentedBatch, masked: Tensor | None, run: dict[str, Any]) -> Any:
        """Run a batch with calls: in segments over one cache, or the prefix first where a mask hides it afterwards."""
        # Checkpointed decoder layers drop the cache (transformers 5.23), and flash attention's kernels for packed
        # conversations take none: there the prefix is run again, not continued.
        again = self.training and self.model.language_model.gradient_checkpointing
        again = again or (batch.packed is not None and batch.packed.varlen)
        if masked is None and not again:
            return SegmentedForward(self, batch, run).run()
        segments = SegmentedForward(self, batch, {})
        embeds = segments.run_prefixes() if again else segments.run_up_to_last()
        if masked is not None:
            embeds = embeds.masked_fill(masked.unsqueeze(-1), 0)
        return self.model.language_model(inputs_embeds=embeds, **batch.whole(), **run)

    def inject_condition(self, batch: SegmentedBatch, embeds: Tensor, call: CallSite, state: Tensor) -> Tensor:
        """Spend one condition: it is the control token's embedding and conditions the spans that answer the call."""
        embeds = put_columns(embeds, call.row, torch.tensor([call.start + 1], device=embeds.device), state[None])
        for span in batch.spans:
            if span.call == call:
                tokens, _ = self.project(span.look, batch.features[span.look][span.image], state)
                embeds = put_columns(embeds, span.row, span.columns, tokens)
        return embeds

    def _masked_columns(self, input_ids: Tensor, batch: SegmentedBatch, modes: Tensor | None) -> Tensor | None:
        """Mask modelling: which embeddings (B, L) pass 2 does not see; None for none.

        `modes` (n,) is that of each conversation, row-major; without it the config's is drawn, once for the batch (as
        published) or for each conversation.
        """
        config, packed = self.config, batch.packed
        if not self.training or (modes is None and config.para_mask_id == 0):
            return None
        ids = input_ids if packed is None else packed.apart(input_ids, -1)
        if modes is None:
            draws = torch.rand(len(ids) if config.para_mask_draw == "sample" else 1)
            modes = torch.where(draws < config.para_mask_ratio, config.para_mask_id, 0).expand(len(ids))
        called = torch.zeros(len(ids), dtype=torch.bool)
        called[[c.row if packed is None else packed.index(c.row, c.conversation) for c in batch.calls]] = True
        modes = torch.where(called, modes.cpu(), 0).to(ids.device)[:, None]
        if not modes.any():
            return None
        hidden = [paragraph_mask(ids, config.para_start_id, config.para_end_id, (turn,)) for turn in (1, 3)]
        mask = ((modes >= 1) & hidden[0]) | ((modes == 2) & hidden[1])
        return mask if packed is None else packed.together(mask)

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


class VPTQwen2VLForConditionalGeneration(LookAgainMixin, Qwen2VLForConditionalGeneration):
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
