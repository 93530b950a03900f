"""Models with visual perception tokens (https://arxiv.org/abs/2502.17425): a delta over transformers' ones.

The decoder is untouched; what changes is its input embeddings. The pads of re-encoded images are filled with projected
features, conditioned on a hidden state that the same decoder computed further left, and that state is also the input
embedding of the control token. By causality one pass is enough (`segments`). With mask modelling (training only) the
prefix runs once more.

`LookAgainMixin` is the mechanism (`classes` applies it). Of the class it is mixed into it uses `get_input_embeddings`,
`get_image_features`, `get_rope_index` and `language_model`; what else differs between bases is in their rows
(`relook.bases`).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.qwen2_vl.modeling_qwen2_vl import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from relook.errors import UserError

from .configuration import ReencodeIds
from .decoder import put_columns, run_decoder
from .encoders import ENCODERS, build_encoder, encode_images, image_features, merge_base_images, view_features
from .generation import LookGenerationMixin, continue_call, state_in_cache, states_after
from .packed import Packed
from .projector import ConditionedProjector, init_projector_layer
from .segments import (
    SegmentedBatch,
    SegmentedForward,
    find_calls,
    find_image_spans,
    masked_columns,
    max_over_ranks,
    ranks_synchronised,
    zero_of,
)


@dataclass
class LookAgainOutput(CausalLMOutputWithPast):
    """transformers' output, and `look_states` (B, 2k, d): what a cache does not hold of the calls in it.

    Whoever continues the cache passes it on, as `generate` does (`generation`). None in training.
    """

    look_states: Tensor | None = None

    def to_tuple(self) -> tuple:
        return tuple(self[name] for name in self if name != "look_states")  # as the base model's


class LookAgainMixin(LookGenerationMixin, nn.Module):
    """The looks of a transformers vision-language model. Mix in left of the model class."""

    # The attributes used of the class it is mixed into (transformers' own annotations are wider than that).
    config: Any
    model: Any
    lm_head: Any
    loss_function: Any
    get_input_embeddings: Any
    post_init: Any
    encoders: Any
    projectors: Any

    def __init__(self, config: Any):
        super().__init__(config)
        self._add_looks(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # transformers visits modules that own parameters: the projectors' layers, never a projector itself.
        projectors = getattr(self, "projectors", {}).values()  # absent while the base class builds itself
        if any(module is layer for projector in projectors for layer in projector.children()):
            init_projector_layer(module)
        else:
            super()._init_weights(module)  # type: ignore[misc]

    @property
    def device(self) -> torch.device:
        """Where inputs belong: with the weights or, where accelerate has put these aside, where they come to run."""
        device: torch.device = super().device  # type: ignore[misc]
        if device.type == "meta":
            hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
            places = (getattr(hook, "execution_device", None) for hook in hooks)
            return torch.device(next((place for place in places if place is not None), device))
        return device

    def _add_looks(self, config: Any) -> None:
        """Encoders and projectors, keyed by the look's name."""
        width = config.text_config.hidden_size
        self.encoders = nn.ModuleDict(
            {
                look: build_encoder(look, config.encoders.get(look), config._attn_implementation)
                for look in config.reencodings
                if look in ENCODERS
            }
        )
        self.projectors = nn.ModuleDict()
        for look in config.reencodings:
            spec = ENCODERS.get(look)  # None: the model's own ViT
            channels = width if spec is None else spec.width(self.encoders[look].config)
            feature_map = "identity" if spec is None else spec.feature_map
            self.projectors[look] = ConditionedProjector(channels, width, feature_map)

    # -- the steps of `forward` and of the loop; none keeps state ---------------------------------------------------

    def encode(self, look: str, **tensors: Any) -> list[Tensor]:
        """Encode images for one look, unconditioned.

        Args:
            look: "image" (first look, crops) or "clip": `pixel_values` (patches, p) and `image_grid_thw` (k, 3);
                "detection": `detection_images` (k, 3, 224, 224); "seg": `seg_images` (k, 3, 1024, 1024).

        Returns:
            one tensor per image: (n, (1 + k) d) merged ViT tokens and their k inner features (`run_decoder`), (256, c)
            DINOv2 tokens or a (c, 64, 64) SAM map.
        """
        with self._input_grad_context():
            if look in ENCODERS:
                spec, encoder = ENCODERS[look], self._branch(self.encoders, look)
                images = tensors[spec.input].to(device=self.device, dtype=encoder.dtype)
                return list(spec.features(encoder(images)))
            self._branch(self.projectors, look) if look != "image" else None
            pixels, grids = tensors["pixel_values"].to(self.device), tensors["image_grid_thw"].to(self.device)
            return view_features(self, image_features(self, pixels, grids))

    def project(self, look: str, features: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """One image's features -> tokens for the language model (n, d), and the attention map <F_i, c> (n,) or None.

        `condition` (d,) is the final hidden state at the call's `*_action_start`. First looks and crops ("image",
        "region") pass through, and so do inner features of the model's own ViT, behind the d of each token.
        """
        if look in ("image", "region"):
            return features, None
        width = features.shape[-1] if look in ENCODERS else self.config.text_config.hidden_size
        tokens, attention = self._branch(self.projectors, look)(features[..., :width], condition)
        inner = features[..., width:]
        return (torch.cat([tokens, inner], dim=-1) if inner.shape[-1] else tokens), attention

    def decode(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor, past_key_values: Cache | None
    ) -> Tensor:
        """Run the language model on embeddings (`decoder.run_decoder`); the cache grows in place by L.

        `attention_mask` (B, past + L), `position_ids` (3, B, L). Returns the final normed hidden states (B, L, d).
        """
        return run_decoder(
            self,
            inputs_embeds,
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

    def _positions(self, input_ids, attention_mask, image_grid_thw, video_grid_thw, packed=None, **more) -> Tensor:
        """(3, B, L) positions of whole conversations; padding columns hold arbitrary values."""
        if packed is not None:
            ids, real = packed.unpack(input_ids), packed.unpack(torch.ones_like(input_ids))
            return packed.repack(self._positions(ids, real, image_grid_thw, video_grid_thw, **more))
        if self.config.position_mode == "sequential":
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            return (real.long().cumsum(-1) - 1).clamp(min=0)[None].expand(3, -1, -1)
        kinds = (input_ids == self.config.image_token_id).int() + 2 * (input_ids == self.config.video_token_id).int()
        grids = dict(image_grid_thw=image_grid_thw, video_grid_thw=video_grid_thw, **more)
        try:
            return self.model.get_rope_index(input_ids, kinds, attention_mask=attention_mask, **grids)[0]
        except (TypeError, StopIteration) as error:  # how it reports that a grid is missing
            raise UserError(
                "the text holds more images than image_grid_thw has grids; positions need the grid of every image in "
                "input_ids, also of those in a cache"
            ) from error

    def _branch(self, branches: nn.ModuleDict, look: str) -> Any:
        if look not in branches:
            raise UserError(f"this model has no {look!r} look; it has {', '.join(self.config.looks) or 'none'}")
        return branches[look]

    def _input_grad_context(self):
        """`no_grad` for embeddings and vision encoders with `input_grads: published`, as the published code trained."""
        return torch.no_grad() if self.config.input_grads == "published" else nullcontext()

    # -- forward ------------------------------------------------------------------------------------------------------

    @can_return_tuple
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
        look_states: Tensor | None = None,
        conversation_ids: Tensor | None = None,
        para_mask_modes: Tensor | None = None,
        **kwargs: Any,
    ) -> LookAgainOutput:
        """Teacher-forced pass over conversations with any mix of looks.

        Args beyond the base model's (images of each kind in row-major order of their pads):
            clip_pixel_values (patches, p), clip_images_grid_thw (k, 3): images for `<|clip_image_pad|>`.
            detection_images (k, 3, 224, 224), seg_images (k, 3, 1024, 1024).
            look_states (B, 2k, d): that of the output whose cache is continued.
            conversation_ids (B, L): the conversation that each column of a packed row belongs to (`packed.Packed`).
            para_mask_modes (n,): mask mode 0, 1 or 2 of each conversation; None: drawn as the config says.

        Returns:
            LookAgainOutput: loss, logits (B, L, vocab), past_key_values, look_states (B, 2k, d).
        """
        base = dict(pixel_values=pixel_values, image_grid_thw=image_grid_thw, mm_encoder_outputs=mm_encoder_outputs)
        base |= dict(pixel_values_videos=pixel_values_videos, video_grid_thw=video_grid_thw)
        clip = dict(pixel_values=clip_pixel_values, image_grid_thw=clip_images_grid_thw)
        looks = {"clip": clip, "detection": {"detection_images": detection_images}, "seg": {"seg_images": seg_images}}
        looks = {look: tensors for look, tensors in looks.items() if next(iter(tensors.values())) is not None}
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        given = inputs_embeds if input_ids is None else input_ids
        times = {name: kwargs.pop(name) for name in self.config.base.position_inputs if name in kwargs}
        packed = self._checked(given, attention_mask, base, looks, conversation_ids, past)
        run = dict(past_key_values=past_key_values, use_cache=use_cache if packed is None else False, **kwargs)
        if position_ids is None and input_ids is not None:
            if past:
                raise UserError(
                    "a cache is continued without position_ids, and positions after an image cannot be told from "
                    "the new tokens alone. Pass position_ids=model.rope_positions(block, grids, start)[0][:, None]"
                )
            mask = two_dimensional(attention_mask)
            position_ids = self._positions(input_ids, mask, image_grid_thw, video_grid_thw, packed, **times)
        before = look_states if past else None
        batch = self._batch(input_ids, inputs_embeds, attention_mask, position_ids, before, base, looks, packed, past)
        outputs = self._run(batch, input_ids, para_mask_modes, run)
        return self._head(outputs, batch, input_ids, labels, logits_to_keep, kwargs)

    def _checked(self, given, attention_mask, base, looks, conversation_ids, past: int) -> Packed | None:
        """The conversations of packed rows. Raises UserError for inputs that do not go together."""
        if given is None:
            raise UserError("neither input_ids nor inputs_embeds came; give one of them")
        pairs = (
            ("pixel_values", "image_grid_thw", base),
            ("clip_pixel_values", "clip_images_grid_thw", looks.get("clip")),
        )
        for pixels, grid, images in pairs:
            if images and images["pixel_values"] is not None and images["image_grid_thw"] is None:
                raise UserError(f"{pixels} came without {grid}, the patch grid (t, h, w) of every image")
        if conversation_ids is not None:
            if past:
                raise UserError("packed conversations cannot continue a cache; pass them without past_key_values")
            return Packed(conversation_ids, self.model.language_model.config._attn_implementation)
        mask, shape = two_dimensional(attention_mask), (given.shape[0], past + given.shape[1])
        if mask is not None and mask.shape != shape:
            raise UserError(
                f"attention_mask has shape {tuple(mask.shape)}; expected {shape}: columns of cache and input"
            )
        return None

    def _batch(
        self, input_ids, embeds, attention_mask, position_ids, states, base, looks, packed, past
    ) -> SegmentedBatch:
        """All that is known before the language model runs.

        Base images and unconditioned re-encoded images are merged into the embeddings; the other spans wait for the
        hidden state of their call. Embeddings without their ids hold no looks, since these are found by token id.
        """
        if looks and input_ids is None:
            raise UserError("images for a look came without input_ids: their places are found by token id")
        synchronised, numbers = ranks_synchronised(), None if packed is None else packed.numbers
        zero = zero_of(self._conditional_parameters()) if synchronised and self.training else None
        with self._input_grad_context():
            outputs, features = encode_images(self, base, looks)
            embeds = self.get_input_embeddings()(input_ids) if embeds is None else embeds
            embeds = merge_base_images(self, input_ids, embeds, outputs)
        calls, spans = [], []
        ids = self._call_ids()
        if ids and input_ids is not None:
            shown = _shown(input_ids, attention_mask)
            calls = find_calls(shown, ids, numbers)
            if past:
                embeds, states = continue_call(embeds, shown, states, ids)
        step = past and embeds.shape[1] == 1  # a token that was sampled is no image
        for look in self.config.reencodings if input_ids is not None and not step else ():
            images, token = features.get(look, []), self.config.reencode_ids(look)
            if token is None:
                continue
            found = find_image_spans(input_ids, look, token.pad, [_tokens(x) for x in images], calls, numbers)
            for span in found:
                if span.call is None:
                    state = state_in_cache(look, span.row, states, ids) if past else None
                    tokens, _ = self.project(look, images[span.image], state)
                    embeds = put_columns(embeds, span.row, span.columns, tokens)
            spans += found
        embeds = embeds if zero is None else embeds + zero.to(embeds)
        depth = max((call.order + 1 for call in calls), default=0)
        depth = max_over_ranks(depth, embeds.device) if synchronised else depth
        if packed is not None:
            attention_mask = (packed.numbers >= 0).long()
        if position_ids is not None and (depth or packed is not None):
            # (3, B, L): without the text positions that transformers may put in front, or these three times
            position_ids = position_ids[None] if position_ids.ndim == 2 else position_ids[-3:]
            position_ids = position_ids.expand(3, *embeds.shape[:2])
        return SegmentedBatch(embeds, attention_mask, position_ids, packed, calls, spans, features, states, depth)

    def _call_ids(self) -> dict[str, ReencodeIds]:
        """Token ids of the looks that are conditioned; none in the alignment stage."""
        conditioned = self.config.num_inner_forward_run == 2
        ids = {look: self.config.reencode_ids(look) for look in self.config.reencodings if conditioned}
        return {look: found for look, found in ids.items() if found is not None}

    def _conditional_parameters(self) -> list[nn.Parameter]:
        """The parameters that some batches do not use: vision encoders and projectors."""
        decoder = {id(p) for part in (self.model.language_model, self.lm_head) for p in part.parameters()}
        return [p for p in self.parameters() if id(p) not in decoder]

    def _run(self, batch: SegmentedBatch, input_ids: Any, modes: Tensor | None, run: dict[str, Any]) -> Any:
        """The language model over a batch: in one piece without calls, else in segments over one cache.

        Where mask modelling hides the prefix after its conditions are known, the prefix runs first and then the whole.
        """
        if not batch.depth:
            return run_decoder(self, batch.inputs_embeds, **batch.full_inputs(), **run)
        masked = masked_columns(self.config, input_ids, batch, modes) if self.training else None
        # Checkpointed decoder layers drop the cache (transformers 5.23), and flash attention's kernels for packed
        # conversations take none: there the prefix is run again, not continued.
        recompute = self.training and self.model.language_model.gradient_checkpointing
        recompute = recompute or (batch.packed is not None and batch.packed.varlen)
        if masked is None and not recompute:
            return SegmentedForward(self, batch, run).run()
        segments = SegmentedForward(self, batch, {})
        embeds = segments.run_prefixes() if recompute else segments.run_segments(segments.segments[:-1])[0]
        if masked is not None:
            embeds = embeds.masked_fill(masked.unsqueeze(-1), 0)
        return run_decoder(self, embeds, **batch.full_inputs(), **run)

    def _head(self, outputs: Any, batch: SegmentedBatch, input_ids, labels, logits_to_keep, kwargs) -> LookAgainOutput:
        hidden = outputs.last_hidden_state
        logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        if self.training and torch.is_grad_enabled() and not logits.requires_grad:
            logits = logits + zero_of(self.parameters())  # nothing that learns was used: a step of zero
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        ids, states = self._call_ids(), None
        if ids and input_ids is not None and not self.training:
            shown = _shown(input_ids, batch.attention_mask)
            states = states_after(hidden, batch.calls, batch.states, shown, ids)
        return LookAgainOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            look_states=states,
        )


def two_dimensional(mask: Any) -> Tensor | None:
    """An attention mask (B, columns), None where it is another kind (4-D, or one per kind of layer)."""
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _shown(input_ids: Tensor, attention_mask: Any) -> Tensor:
    """The ids of an input, -1 where a 2-D mask hides them: what is masked is no call."""
    mask = two_dimensional(attention_mask)
    return input_ids if mask is None else input_ids.where(mask[:, -input_ids.shape[1] :].bool(), -1)


def _tokens(features: Tensor) -> int:
    """Image tokens that features become: n of (n, d), h/4 * w/4 of a SAM map (c, h, w)."""
    return features.shape[0] if features.ndim == 2 else (features.shape[1] // 4) * (features.shape[2] // 4)
