"""Qwen2-VL with visual perception tokens (https://arxiv.org/abs/2502.17425): a delta over transformers' model.

The decoder is untouched; what changes is its input embeddings. The pads of re-encoded images are filled with projected
features, conditioned on a hidden state that the same decoder computed further left, and that state is also the input
embedding of the control token. By causality one pass is enough (`segments`). With mask modelling (training only) the
prefix runs once more.

`LookAgainMixin` is the mechanism. Of the class it is mixed into it uses `get_input_embeddings`, `get_image_features`,
`get_rope_index` and `language_model`, which Qwen2.5-VL and Qwen3-VL also have. `VPTQwen2VLForConditionalGeneration`
applies it to Qwen2-VL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
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
from .rank_sync import max_over_ranks, ranks_synchronised, zero_of
from .segments import (
    SegmentedBatch,
    SegmentedForward,
    find_calls,
    find_image_spans,
    masked_columns,
    put_columns,
    same_images,
)


@dataclass
class LookAgainOutput(CausalLMOutputWithPast):
    """transformers' output, and `last_state` (B, d): the final hidden state of the last column.

    Where the last token is a `*_action_start`, that state is the condition of the look it asks for; `generate` passes
    it to the next step, so the model itself keeps no state.
    """

    last_state: Tensor | None = None


@dataclass(frozen=True)
class BaseImages:
    """The base model's images and videos (first looks and crops), as its `forward` takes them."""

    pixel_values: Tensor | None
    pixel_values_videos: Tensor | None
    image_grid_thw: Any  # (k, 3) int64; None without images
    video_grid_thw: Any
    mm_encoder_outputs: dict[str, Any] | None


_IMAGE_ENCODER: ContextVar[Callable[..., Any] | None] = ContextVar("image_encoder", default=None)


@contextmanager
def image_encoder(encode: Callable[..., Any]) -> Iterator[None]:
    """Within, `encode` takes the place of the base model's `get_image_features` (for example, a cache around it).

    Args:
        encode: (pixel_values (patches, p), image_grid_thw (k, 3), return_dict=True) -> an output with `pooler_output`,
            one (n, d) tensor per image.
    """
    token = _IMAGE_ENCODER.set(encode)
    try:
        yield
    finally:
        _IMAGE_ENCODER.reset(token)


class LookAgainMixin(LookGenerationMixin, nn.Module):
    """The looks of a transformers vision-language model. Mix in left of the model class."""

    # The attributes used of the class it is mixed into (transformers' own annotations are wider than that).
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

    # -- the steps of `forward` and of the loop; none keeps state ---------------------------------------------------

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
            pixels, grids = tensors["pixel_values"].to(self.device), tensors["image_grid_thw"].to(self.device)
            return list(self._image_features(pixels, grids).pooler_output)

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

    def _positions(self, input_ids, attention_mask, image_grid_thw, video_grid_thw, packed=None) -> Tensor:
        """(3, B, L) positions of whole conversations; padding columns hold arbitrary values."""
        if packed is not None:
            ids, real = packed.unpack(input_ids), packed.unpack(torch.ones_like(input_ids))
            return packed.repack(self._positions(ids, real, image_grid_thw, video_grid_thw))
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
        """`no_grad` for embeddings and vision encoders with `input_grads: published`, as the published code trained."""
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

        Args beyond the base model's (images of each kind in row-major order of their pads):
            clip_pixel_values (patches, p), clip_images_grid_thw (k, 3): images for `<|clip_image_pad|>`.
            detection_images (k, 3, 224, 224), seg_images (k, 3, 1024, 1024).
            previous_state (B, d): `last_state` of the step before, to continue a cache right after `*_action_start`.
            conversation_ids (B, L): the conversation that each column of a packed row belongs to (`packed.Packed`).
            para_mask_modes (n,): mask mode 0, 1 or 2 of each conversation; None: drawn as the config says.

        Returns:
            LookAgainOutput: loss, logits (B, L, vocab), past_key_values, last_state (B, d).
        """
        base = BaseImages(pixel_values, pixel_values_videos, image_grid_thw, video_grid_thw, mm_encoder_outputs)
        looks = {
            "clip": dict(pixel_values=clip_pixel_values, image_grid_thw=clip_images_grid_thw),
            "detection": dict(detection_images=detection_images),
            "seg": dict(seg_images=seg_images),
        }
        looks = {name: tensors for name, tensors in looks.items() if next(iter(tensors.values())) is not None}
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        packed = self._packed(conversation_ids, past)
        run = dict(past_key_values=past_key_values, use_cache=use_cache if packed is None else False, **kwargs)
        if input_ids is None:
            outputs = self._run_embeds(inputs_embeds, attention_mask, position_ids, base, looks, packed, run)
        else:
            if position_ids is None:
                position_ids = self._initial_positions(input_ids, attention_mask, base, packed, past)
            embedded = self._embed(input_ids, inputs_embeds, previous_state, base, looks, packed)
            batch = self._batch(attention_mask, position_ids, packed, *embedded)
            outputs = self._run(batch, input_ids, para_mask_modes, run)
        return self._head(outputs, labels, logits_to_keep, kwargs)

    def _packed(self, conversation_ids: Tensor | None, past: int) -> Packed | None:
        if conversation_ids is None:
            return None
        if past:
            raise UserError("packed conversations cannot continue a cache; pass them without past_key_values")
        return Packed(conversation_ids, self.model.language_model.config._attn_implementation)

    def _initial_positions(self, input_ids, attention_mask, base: BaseImages, packed: Packed | None, past: int):
        """(3, B, L) positions of conversations that begin in this forward."""
        if past:
            raise UserError(
                "a cache is continued without position_ids, and positions after an image cannot be told from the "
                "new tokens alone. Pass position_ids=model.rope_positions(block, grids, start)[0][:, None]"
            )
        return self._positions(input_ids, attention_mask, base.image_grid_thw, base.video_grid_thw, packed)

    def _run_embeds(self, inputs_embeds, attention_mask, position_ids, base: BaseImages, looks, packed, run) -> Any:
        """The base model over embeddings without their ids: no looks, since these are found by token id."""
        if looks:
            raise UserError("images for a look came without input_ids: their places are found by token id")
        inputs = dict(attention_mask=attention_mask, position_ids=position_ids)
        if packed is not None and inputs_embeds is not None and position_ids is not None:
            inputs = packed.full_inputs(position_ids[-3:], inputs_embeds.dtype)
        return self.model(inputs_embeds=inputs_embeds, **inputs, **vars(base), **run)

    def _embed(self, input_ids, inputs_embeds, previous_state, base: BaseImages, looks, packed: Packed | None):
        """All that is known before the language model runs: (inputs_embeds (B, L, d), calls, spans, features).

        Base images and unconditioned re-encoded images are merged into the embeddings; the other spans wait for the
        hidden state of their call.
        """
        synchronised, numbers = ranks_synchronised() and self.training, None if packed is None else packed.numbers
        zero = zero_of(self._conditional_parameters()) if synchronised else None
        features, base = self._encode_looks(looks, base)
        with self._input_grad_context():
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            inputs_embeds = self._merge_base_images(input_ids, inputs_embeds, base)
        conditioned = self.config.num_inner_forward_run == 2
        ids = {n: i for n in self.config.reencodings if (i := self.config.reencode_ids(n)) is not None}
        calls = find_calls(input_ids, ids, numbers) if conditioned and ids else []
        if conditioned and previous_state is not None:
            for token in ids.values():
                is_action = input_ids[:, :1, None] == token.action
                first = torch.where(is_action, previous_state[:, None].to(inputs_embeds.dtype), inputs_embeds[:, :1])
                inputs_embeds = torch.cat([first, inputs_embeds[:, 1:]], dim=1)
        spans = []
        for look, images in features.items():
            found = find_image_spans(input_ids, look, ids[look].pad, [_tokens(x) for x in images], calls, numbers)
            for span in found:
                if span.call is None:
                    tokens, _ = self.project(look, images[span.image])
                    inputs_embeds = put_columns(inputs_embeds, span.row, span.columns, tokens)
            spans += found
        return inputs_embeds if zero is None else inputs_embeds + zero.to(inputs_embeds), calls, spans, features

    def _batch(self, attention_mask, position_ids, packed: Packed | None, embeds, calls, spans, features):
        depth = max((call.order + 1 for call in calls), default=0)
        depth = max_over_ranks(depth, embeds.device) if ranks_synchronised() else depth
        if packed is not None:
            attention_mask = (packed.numbers >= 0).long()
        if depth or packed is not None:
            position_ids = position_ids[-3:]  # without the text positions that transformers may put in front
        return SegmentedBatch(embeds, attention_mask, position_ids, packed, calls, spans, features, depth)

    def _conditional_parameters(self) -> list[nn.Parameter]:
        """The parameters that some batches do not use: vision encoders and projectors."""
        decoder = {id(p) for part in (self.model.language_model, self.lm_head) for p in part.parameters()}
        return [p for p in self.parameters() if id(p) not in decoder]

    def _image_features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Any:
        """The base model's own vision encoder over images; see `image_encoder`."""
        encode = _IMAGE_ENCODER.get() or self.model.get_image_features
        return encode(pixel_values, image_grid_thw, return_dict=True)

    def _encode_looks(self, looks: dict[str, Any], base: BaseImages) -> tuple[dict[str, list[Tensor]], BaseImages]:
        """Features of every look, and the base images, encoded where a clip look could share them.

        A clip look at an image that is also a first look or a crop takes that one's features: one encoder run.
        """
        images, clip = base.pixel_values, looks.get("clip")
        if clip is None or images is None or (base.mm_encoder_outputs or {}).get("image") is not None:
            return {name: self.encode(name, **tensors) for name, tensors in looks.items()}, base
        pixels, grids = clip["pixel_values"], clip["image_grid_thw"]
        same = same_images(pixels, grids, images, base.image_grid_thw)
        with self._input_grad_context():
            first = self._image_features(images, base.image_grid_thw)
        others = [i for i, at in enumerate(same) if at is None]
        encoded: list[Tensor] = []
        if others:
            parts = pixels.split(grids.prod(-1).tolist())
            pixels, grids = torch.cat([parts[i] for i in others]), grids[others]
            encoded = self.encode("clip", pixel_values=pixels, image_grid_thw=grids)
        rest = iter(encoded)
        features = {"clip": [next(rest) if at is None else first.pooler_output[at] for at in same]}
        features |= {name: self.encode(name, **tensors) for name, tensors in looks.items() if name != "clip"}
        return features, replace(base, mm_encoder_outputs={**(base.mm_encoder_outputs or {}), "image": first})

    def _merge_base_images(self, input_ids: Tensor, inputs_embeds: Tensor, base: BaseImages) -> Tensor:
        """First looks and crops (and videos) into the embeddings, exactly as the base model does."""
        outputs = dict(base.mm_encoder_outputs or {})
        if outputs.get("image") is None and base.pixel_values is not None:
            outputs["image"] = self._image_features(base.pixel_values, base.image_grid_thw)
        if outputs.get("video") is None and base.pixel_values_videos is not None:
            video = (base.pixel_values_videos, base.video_grid_thw)
            outputs["video"] = self.model.get_video_features(*video, return_dict=True)
        for index, (kind, output) in enumerate((k, outputs.get(k)) for k in ("image", "video")):
            if output is not None:
                values = torch.cat(list(output.pooler_output), dim=0).to(inputs_embeds)
                mask = self.model.get_placeholder_mask(input_ids, inputs_embeds, **{f"{kind}_features": values})[index]
                inputs_embeds = inputs_embeds.masked_scatter(mask, values)
        return inputs_embeds

    def _run(self, batch: SegmentedBatch, input_ids: Tensor, modes: Tensor | None, run: dict[str, Any]) -> Any:
        """The language model over a batch: in one piece without calls, else in segments over one cache.

        Where mask modelling hides the prefix after its conditions are known, the prefix runs first and then the whole.
        """
        if not batch.depth:
            return self.model(inputs_embeds=batch.inputs_embeds, **batch.full_inputs(), **run)
        masked = masked_columns(self.config, input_ids, batch, modes) if self.training else None
        # Checkpointed decoder layers drop the cache (transformers 5.23), and flash attention's kernels for packed
        # conversations take none: there the prefix is run again, not continued.
        recompute = self.training and self.model.language_model.gradient_checkpointing
        recompute = recompute or (batch.packed is not None and batch.packed.varlen)
        if masked is None and not recompute:
            return SegmentedForward(self, batch, run).run()
        segments = SegmentedForward(self, batch, {})
        embeds = segments.run_prefixes() if recompute else segments.run_up_to_last()
        if masked is not None:
            embeds = embeds.masked_fill(masked.unsqueeze(-1), 0)
        return self.model.language_model(inputs_embeds=embeds, **batch.full_inputs(), **run)

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


def _tokens(features: Tensor) -> int:
    """Image tokens that features become: n of (n, d), h/4 * w/4 of a SAM map (c, h, w)."""
    return features.shape[0] if features.ndim == 2 else (features.shape[1] // 4) * (features.shape[2] // 4)


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
