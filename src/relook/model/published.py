"""The published checkpoints (https://huggingface.co/rp-yu): facts, names of weights, and the layout on disk.

- `PUBLISHED`: a row for each checkpoint (`bases.HUB` has the shapes of their base models), from which it can be built
  without a network (spec.md, section 7).
- `convert`: writes a checkpoint in the other layout. (`VPTQwen2VLConfig` and `VPTQwen2VLProcessor` read the published
  one; `bases` has the names of its weights.)
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from relook.bases import HUB
from relook.errors import UserError
from relook.io import replacing_folder
from relook.looks import LOOKS, control_tokens

from .configuration import PUBLISHED_CLASS, LookConfig
from .encoders import ENCODERS
from .loading import check_free, load_model, load_processor, read_config, resolve, stored_dtype, weight_files

# -- facts

BASE_TOKENS = 151657  # ids below are Qwen2-VL's own; the published tokenizers add theirs from here


@dataclass(frozen=True)
class Published:
    """One published checkpoint: hub id, base, its re-encoding look, stage, and billions of parameters as stated."""

    hub_id: str
    base: str
    look: str
    alignment: bool
    billions: float


_2B, _7B = "Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct"
PUBLISHED: dict[str, Published] = {
    row.hub_id.split("/")[1]: row
    for row in (
        Published("rp-yu/Qwen2-VL-2b-VPT-Det-Alignment", _2B, "detection", True, 2.75),
        Published("rp-yu/Qwen2-VL-2b-VPT-Seg-Alignment", _2B, "seg", True, 2.76),
        Published("rp-yu/Qwen2-VL-2b-VPT-CLIP", _2B, "clip", False, 2.45),
        Published("rp-yu/Qwen2-VL-2b-VPT-Det", _2B, "detection", False, 2.75),
        Published("rp-yu/Qwen2-VL-2b-VPT-Det-NoPrompt", _2B, "detection", False, 2.75),
        Published("rp-yu/Qwen2-VL-2b-VPT-Seg", _2B, "seg", False, 2.76),
        Published("rp-yu/Qwen2-VL-7b-VPT-CLIP", _7B, "clip", False, 8.32),
    )
}


def look_token_ids(look: str, first: int = BASE_TOKENS) -> dict[str, int]:
    """Config keys of one re-encoding look -> token ids, when its control tokens start at id `first`.

    Example: look_token_ids("clip") == {"clip_image_token_id": 151657, "clip_action_start_id": 151676,
    "clip_action_id": 151677}.
    """
    special, ordinary = control_tokens(["region", look])
    ids = {token: first + i for i, token in enumerate([*special, *ordinary])}
    spec = LOOKS[look]
    return {
        f"{look}_image_token_id": ids[spec.pad],
        f"{look}_action_start_id": ids[spec.start],
        f"{look}_action_id": ids[str(spec.action)],
    }


def published_config(name: str) -> dict[str, Any]:
    """Values for `VPTQwen2VLConfig.from_dict` of the published checkpoint `name`."""
    row = PUBLISHED[name]
    own = {"vision_encoder_ls": [LOOKS[row.look].encoder], "alignment": row.alignment}
    return {**HUB[row.base].config(), **look_token_ids(row.look), **own}


# -- layout

_NOT_PUBLISHED = (
    *("text_config", "rope_parameters", "layer_types", "dtype", "chunk_size_feed_forward", "is_encoder_decoder"),
    *("id2label", "label2id", "problem_type", "return_dict", "output_attentions", "output_hidden_states"),
    *("region", "encoders", "position_mode", "input_grads", "para_mask_draw", "domain", "provenance", "tower"),
)


def published_config_values(config: LookConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The flat dict of a published config.json."""

    def plain(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in _NOT_PUBLISHED}

    values = config.to_dict()
    rope = values["text_config"]["rope_parameters"]
    return {
        **plain(values["text_config"]),
        **plain(values),
        "vision_config": {**plain(values["vision_config"]), "model_type": config.base.plain},
        "architectures": [PUBLISHED_CLASS],
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.45.2",
    }


def convert(
    source: str | Path, target: str | Path, to: str = "relook", encoder_config: dict[str, Any] | None = None
) -> Path:
    """Write `source` anew in the "relook" layout (self-describing) or the "published" one (flat 4.45 config, `.bin`).

    The folder appears whole or not at all. The published code reads only `.bin`, so that is what "published" writes.
    """
    if to not in ("relook", "published"):
        raise UserError(f"--to {to!r} is not a layout; use relook or published")
    check_free(target)
    folder = resolve(source)
    config = read_config(folder, encoder_config)  # as stored: loading may untie it
    model = load_model(folder, dtype=stored_dtype(folder), device="cpu", encoder_config=encoder_config)
    with replacing_folder(target) as out:
        out.mkdir()
        for path in folder.iterdir():  # tokenizer, processor, card: as they are
            if path.is_file() and path not in weight_files(folder) and not path.name.endswith(".index.json"):
                shutil.copy2(path, out / path.name)
        if to == "relook":
            model.save_pretrained(out)
            if (folder / "tokenizer_config.json").is_file():  # what the published name says goes into a file
                load_processor(folder).save_pretrained(out)
        else:
            _save_published(model, config, out)
    return Path(target)


def _save_published(model: Any, config: LookConfig, out: Path) -> None:
    """Write config.json, pytorch_model.bin and encoder_config.json into the folder `out`."""
    values = published_config_values(config, model.dtype)
    (out / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, max_shard_size="1000GB")  # transformers writes the published names back
        tensors = load_file(Path(scratch) / "model.safetensors")
    if config.tie_word_embeddings:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    torch.save(tensors, out / "pytorch_model.bin")
    encoders = {spec.legacy_key: (config.encoders or {}).get(look) for look, spec in ENCODERS.items()}
    (out / "encoder_config.json").write_text(json.dumps(encoders, indent=2) + "\n", encoding="utf-8")
