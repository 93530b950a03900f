"""Starting a new model that may look again from the parts it is made of. Training it is not this module's business."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from relook.errors import CheckpointError, UserError

from .configuration import VPTQwen2VLConfig
from .loading import encoder_name, load_model, load_processor, load_with_report, read_config, resolve, torch_dtype
from .modeling import VPTQwen2VLForConditionalGeneration


def new_model(
    base: str | Path,
    looks: tuple[str, ...] = ("region", "clip"),
    detection: str | Path | None = None,
    seg: str | Path | None = None,
    dtype: torch.dtype | str = torch.float32,
    seed: int = 0,
) -> tuple[VPTQwen2VLForConditionalGeneration, Any]:
    """A new model that may look again, from a plain Qwen2-VL folder plus DINOv2 and SAM folders.

    Control tokens are added to the tokenizer; their embeddings start at the mean of the old ones; projectors are
    Xavier-uniform from `seed`; everything else is the given weights.

    Returns:
        (model, processor)
    """
    from transformers import Dinov2Model, SamModel

    sources: dict[str, tuple[str | Path | None, Callable[[Any], Any]]] = {
        "detection": (detection, lambda path: Dinov2Model.from_pretrained(path, dtype=dtype)),
        "seg": (seg, lambda path: SamModel.from_pretrained(path, dtype=dtype).vision_encoder),
    }
    lacking = [look for look, (path, _) in sources.items() if look in looks and path is None]
    if lacking:
        raise UserError(f"look {lacking[0]!r} needs its encoder: give {lacking[0]}=FOLDER (DINOv2 or SAM weights)")
    folder = resolve(base)
    encoders = {look: _read(load, path) for look, (path, load) in sources.items() if look in looks}
    config, processor, known = plain_config(folder, looks, {look: each.config for look, each in encoders.items()})
    config.provenance = {"base": Path(folder).name, "seed": seed}
    torch.manual_seed(seed)
    model, report = load_with_report(folder, config, torch_dtype(dtype), None)
    foreign = [k for k in report.missing if not k.startswith(("encoders.", "projectors."))]
    if foreign or report.unexpected or report.mismatched:
        raise CheckpointError(f"{base}: not a whole Qwen2-VL checkpoint: {report}")
    for look, encoder in encoders.items():
        model.encoders[look].load_state_dict(encoder.state_dict())
    new_token_rows(model, known, len(processor.tokenizer))
    return model.eval(), processor


def plain_config(folder: Path, looks: Sequence[str], encoders: Mapping[str, Any]) -> tuple[VPTQwen2VLConfig, Any, int]:
    """Config and processor of a plain Qwen2-VL that is given looks, and how many tokens it knew before.

    Args:
        encoders: look -> the config of its encoder.

    Raises:
        UserError: it is not plain, or no looks are given.
    """
    from transformers import AutoConfig

    from relook.processing import VPTQwen2VLProcessor

    base_config = AutoConfig.from_pretrained(folder)
    if base_config.model_type != "qwen2_vl":
        raise UserError(f"{folder}: model_type is {base_config.model_type!r}; a plain 'qwen2_vl' was expected")
    if not looks:
        raise UserError(f"{folder} is a plain Qwen2-VL; say which looks it is given, e.g. looks: [region, clip]")
    processor = VPTQwen2VLProcessor.from_pretrained(folder)
    known = len(processor.tokenizer)
    processor.add_look_tokens(looks)
    values = base_config.to_dict()
    values.pop("architectures", None)
    config = VPTQwen2VLConfig.from_dict(
        {
            **values,
            "model_type": VPTQwen2VLConfig.model_type,
            **processor.config_token_ids(),
            "vision_encoder_ls": [encoder_name(look) for look in looks if look != "region"],
            "encoders": {look: config.to_diff_dict() for look, config in encoders.items()},
            "region": "region" in looks,
            "num_inner_forward_run": 2,
        }
    )
    return config, processor, known


def _read(load: Callable[[Any], Any], path: str | Path | None) -> Any:
    try:
        return load(path)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: no encoder could be read there ({first}); give a folder or a hub id") from error


def start_model(
    start: str | Path,
    looks: Sequence[str] | None = None,
    detection: str | Path | None = None,
    seg: str | Path | None = None,
    seed: int = 0,
    dtype: torch.dtype | str = torch.float32,
) -> tuple[VPTQwen2VLForConditionalGeneration, Any]:
    """What training starts from: a model that may look again as it is, or a plain Qwen2-VL that is given `looks`.

    A start that has its looks keeps its own encoders; `detection` and `seg` are for a plain one.

    Returns:
        (model, processor), on the CPU.

    Raises:
        UserError: no such model, or it lacks one of `looks` and is not plain.
    """
    folder = resolve(start)
    if is_plain(folder):
        return new_model(folder, tuple(looks or ()), detection, seg, dtype, seed)
    config = read_config(folder)
    lacking = [look for look in looks or () if look not in config.looks]
    if lacking:
        raise UserError(
            f"{start} has the looks {', '.join(config.looks)}, not {lacking[0]!r}; start from a plain Qwen2-VL to give "
            "it other looks"
        )
    model = load_model(folder, dtype=dtype, device="cpu")
    return model, load_processor(folder)


def is_plain(folder: Path) -> bool:
    """Whether a folder holds a Qwen2-VL without looks."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a readable config.json ({error})") from error
    return values.get("model_type") == "qwen2_vl"


@torch.no_grad()
def new_token_rows(model: VPTQwen2VLForConditionalGeneration, known: int, total: int) -> None:
    """Rows known..total of the embedding (and of an untied head): the mean of the rows before, growing if need be."""
    if total > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(total, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.lm_head):
        layer.weight[known:total] = layer.weight[:known].mean(0)
