"""The configurations of models that may look again, read from relook's layout or the published one.

Everything needed to rebuild the model without a network is here: the published keys (transformers 4.45,
spec: `detection_action_id`, `num_inner_forward_run`, ...) under their published names and meanings, and the few
fields the published checkpoints left to the command line (which looks, which encoders, which positions).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig
from transformers.utils import cached_file

from relook.bases import BASES, Base
from relook.io import checkpoint_name
from relook.looks import LOOKS

POSITION_MODES = ("mrope", "sequential")
INPUT_GRADS = ("full", "published")
PUBLISHED_CLASS = "VPT_Qwen2VLForConditionalGeneration"  # what a published config.json calls its model


@dataclass(frozen=True)
class ReencodeIds:
    """Token ids of one re-encoding look: its image pad, and the control token with the start before it."""

    pad: int
    start: int
    action: int


@dataclass(kw_only=True)
class LookConfig:
    """The fields of visual perception tokens (https://arxiv.org/abs/2502.17425), beside those of a base's config.

    Published keys keep their published meaning:

    - `<look>_image_token_id`, `<look>_action_start_id`, `<look>_action_id` for look in clip, detection, seg; None
      where the model lacks the look.
    - `num_inner_forward_run`: 2 conditions the second look on the control token's hidden state; 1 does not
      (alignment stage: y = F).
    - `para_mask_id`: 0 no mask modelling; 1 zeroes the first user turn's input embeddings once the condition is
      known; 2 the second user turn's as well. Training only, in rows that hold a control token, with probability
      `para_mask_ratio`.
    - `para_mask_draw`: that draw is made once for a "batch", as published, or for each "sample" of it.
    - `projector_scale`: number of control vectors in one condition. Only 1 is accepted: no published checkpoint uses
      another value, so there is nothing to check another one against.
    - `vision_encoder_ls`: of "clip", "dino", "sam".

    relook's own:

    - `encoders`: look -> the config of its stock encoder, as a dict.
    - `position_mode`: "mrope" as the base model generates, or "sequential" as the published training ran.
    - `input_grads`: "full", or "published": embeddings and vision encoders under no_grad.
    - `region`: whether the model was trained with region tokens.
    - `domain`: what a small model was trained on.
    - `provenance`: free-form record of where the weights come from.
    """

    detection_image_token_id: int | None = None
    detection_action_start_id: int | None = None
    detection_action_id: int | None = None
    clip_image_token_id: int | None = None
    clip_action_start_id: int | None = None
    clip_action_id: int | None = None
    seg_image_token_id: int | None = None
    seg_action_start_id: int | None = None
    seg_action_id: int | None = None
    para_start_id: int = 151644
    para_end_id: int = 151645
    num_inner_forward_run: int = 2
    projector_scale: int = 1
    para_mask_id: int = 0
    para_mask_ratio: float | int = 0.0
    para_mask_draw: str = "batch"
    alignment: bool = False
    vision_encoder_ls: list[str] | None = None

    region: bool = True
    encoders: dict | None = None
    position_mode: str = "mrope"
    input_grads: str = "full"
    domain: str | None = None
    provenance: dict | None = None

    if TYPE_CHECKING:  # of the base's config
        model_type: ClassVar[str]
        architectures: Any
        text_config: Any
        tie_word_embeddings: bool
        to_dict: Any
        _name_or_path: Any

    def __post_init__(self, encoder_config: dict | None = None, **kwargs):  # noqa: RUF033  # as strict configs do
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.vision_encoder_ls = list(self.vision_encoder_ls or [])
        self.encoders = dict(self.encoders or {})
        if self.architectures == [PUBLISHED_CLASS]:
            self._read_published(encoder_config)
        known = [spec.encoder for spec in LOOKS.values() if spec.reencodes]
        _one_of("vision_encoder_ls", self.vision_encoder_ls, known)
        if getattr(self.text_config, "use_sliding_window", False):
            raise ValueError(
                "use_sliding_window is true; looks are cut in and padded, which needs full attention: false"
            )
        _one_of("position_mode", [self.position_mode], POSITION_MODES)
        _one_of("input_grads", [self.input_grads], INPUT_GRADS)
        _one_of("num_inner_forward_run", [self.num_inner_forward_run], (1, 2))
        _one_of("projector_scale", [self.projector_scale], (1,))
        _one_of("para_mask_id", [self.para_mask_id], (0, 1, 2))
        _one_of("para_mask_draw", [self.para_mask_draw], ("batch", "sample"))

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        return values, {**kwargs, "name_or_path": str(pretrained_model_name_or_path)}  # as AutoConfig gives it

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], encoder_config: dict | None = None, **kwargs: Any) -> Any:
        """A config from the values of a config.json in either layout.

        Args:
            encoder_config: of a published one: configs of its encoders, `{"dino": {...}, "sam_vision": {...}}`.
        """
        if "position_mode" not in config_dict:  # which relook always writes
            config_dict = {**config_dict, "architectures": [PUBLISHED_CLASS], "encoder_config": encoder_config}
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def _read_published(self, given: dict[str, Any] | None) -> None:
        """What a published config leaves to others.

        How its model was run came from the command line: models past the alignment stage are run with the condition
        (`num_inner_forward_run` 2), whatever number was saved. The configs of its encoders are `given`, in the
        encoder_config.json beside it (what `convert --to published` writes), or the published ones.
        """
        from .encoders import ENCODERS, encoder_config

        keys = {look: spec.legacy_key for look, spec in ENCODERS.items() if look in self.reencodings}
        given = given or (_encoder_configs_beside(self._name_or_path) if keys and self._name_or_path else {})
        self.num_inner_forward_run = 1 if self.alignment else 2
        self.encoders = {look: encoder_config(look, given.get(key)).to_diff_dict() for look, key in keys.items()}
        self.provenance = {"layout": "published", "source": checkpoint_name(self._name_or_path)}
        self.architectures = [self.base.model_class]

    @property
    def base(self) -> Base:
        """The row of its base model."""
        return BASES[self.model_type]

    @property
    def reencodings(self) -> list[str]:
        """Names of the re-encoding looks this model has, in the order of the look table."""
        return [n for n, s in LOOKS.items() if s.reencodes and s.encoder in (self.vision_encoder_ls or [])]

    @property
    def looks(self) -> list[str]:
        """Names of all looks this model has, in the order of the look table."""
        return (["region"] if self.region else []) + self.reencodings

    def reencode_ids(self, look: str) -> ReencodeIds | None:
        """Token ids of re-encoding look `look`; None where the config does not name them."""
        pad = getattr(self, f"{look}_image_token_id")
        start, action = getattr(self, f"{look}_action_start_id"), getattr(self, f"{look}_action_id")
        return (
            None if pad is None else ReencodeIds(pad, -1 if start is None else start, -1 if action is None else action)
        )


@strict
class VPTQwen2VLConfig(LookConfig, Qwen2VLConfig):
    """Qwen2-VL's configuration with visual perception tokens."""

    model_type = "qwen2_vl_vpt"
    keys_to_ignore_at_inference = ["past_key_values", "look_states"]


@strict
class VPTQwen2_5_VLConfig(LookConfig, Qwen2_5_VLConfig):
    """Qwen2.5-VL's configuration with visual perception tokens."""

    model_type = "qwen2_5_vl_vpt"
    keys_to_ignore_at_inference = ["past_key_values", "look_states"]


@strict
class VPTQwen3VLConfig(LookConfig, Qwen3VLConfig):
    """Qwen3-VL's configuration with visual perception tokens."""

    model_type = "qwen3_vl_vpt"
    keys_to_ignore_at_inference = ["past_key_values", "look_states"]


def config_class(model_type: str) -> Any:
    """The config class of a model type of the table of bases."""
    return globals()[BASES[model_type].config_class]


def _encoder_configs_beside(name: str) -> dict[str, Any]:
    quiet = {f"_raise_exceptions_for_{kind}": False for kind in ("gated_repo", "missing_entries", "connection_errors")}
    name = str(Path(name).parent) if Path(name).is_file() else name
    path = cached_file(name, "encoder_config.json", **quiet)
    try:
        return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from error


def _one_of(field: str, seen, expected) -> None:
    wrong = [v for v in seen if v not in expected]
    if wrong:
        raise ValueError(f"config field {field} holds {wrong[0]!r}; expected one of {', '.join(map(str, expected))}")
