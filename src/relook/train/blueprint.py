"""What a recipe's start looks like, without its weights: config, processor where it is at hand, and what is missing.

A start that is nowhere to be had is known all the same where it is one of the published models or their bases. Knows
folders and configs; not data, not training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from relook.errors import CheckpointError, UserError
from relook.model.configuration import VPTQwen2VLConfig
from relook.model.encoders import ENCODERS, encoder_config
from relook.model.loading import encoder_name, load_processor, read_config, resolve, weight_files
from relook.model.modeling import VPTQwen2VLForConditionalGeneration
from relook.model.published import BASES, PUBLISHED, look_token_ids, published_config
from relook.model.start import is_plain, plain_config
from relook.train.recipe import ModelSource, Recipe


@dataclass
class Blueprint:
    """`processor` is None where it is not here; `missing` says why weights (or more) are not, "" where all is here."""

    config: VPTQwen2VLConfig
    processor: Any
    missing: str

    def model(self) -> VPTQwen2VLForConditionalGeneration:
        """The model on the meta device: names and shapes, no numbers."""
        with torch.device("meta"):
            model = VPTQwen2VLForConditionalGeneration(self.config)
        model.tie_weights()
        return model


def blueprint(recipe: Recipe) -> Blueprint:
    """The blueprint of a recipe's start.

    Raises:
        UserError: nothing tells what the start is.
    """
    source = recipe.model
    if source.size is not None:
        from relook.model import new

        model, processor = new.build(source.size, recipe.seed, domain=recipe.domain)
        return Blueprint(model.config, processor, _lacks(source.visual))
    assert source.start is not None
    try:
        folder = resolve(source.start)
    except UserError as error:
        return _by_name(source, str(error))
    if is_plain(folder):
        config, processor, _ = plain_config(folder, source.looks or (), _encoder_configs(source))
        missing = [_lacks(path) for path in (source.detection, source.seg) if path] + [_unweighted(folder)]
        return Blueprint(config, processor, "; ".join(filter(None, missing)))
    return Blueprint(read_config(folder), load_processor(folder), _unweighted(folder))


def _by_name(source: ModelSource, why: str) -> Blueprint:
    """A start that cannot be had, by the shapes that its name stands for."""
    name = str(source.start)
    short = name.removeprefix("rp-yu/")
    looks = [look for look in source.looks or () if look != "region"]
    if short in PUBLISHED:
        values, looks = published_config(short), [PUBLISHED[short].look]
    elif name in BASES:
        values = {**BASES[name], "vision_encoder_ls": [encoder_name(look) for look in looks]}
        for number, look in enumerate(looks):  # ids matter to nobody here, but each its own
            values |= look_token_ids(look, first=151657 + 25 * number)
    else:
        raise UserError(why)
    encoders = {look: encoder_config(look, None).to_diff_dict() for look in looks if look in ENCODERS}
    config = VPTQwen2VLConfig.from_dict({**values, "encoders": encoders, "region": True})
    return Blueprint(config, None, why)


def _encoder_configs(source: ModelSource) -> dict[str, Any]:
    """look -> its encoder's config, the published one where the folder or hub id does not answer."""
    from transformers import AutoConfig

    found: dict[str, Any] = {}
    for look, path in (("detection", source.detection), ("seg", source.seg)):
        if path is None:
            continue
        try:
            config = AutoConfig.from_pretrained(path)
            found[look] = getattr(config, "vision_config", config) if look == "seg" else config
        except (OSError, ValueError):
            found[look] = encoder_config(look, None)
    return found


def _unweighted(folder: Path) -> str:
    try:
        weight_files(folder)
    except CheckpointError as error:
        return "" if (folder / "adapter_config.json").is_file() else str(error)
    return ""


def _lacks(path: str | None) -> str:
    """Why a model that is only taken from is not here; "" where it is, or none is asked for."""
    if path is None:
        return ""
    try:
        resolve(path)
    except UserError as error:
        return str(error)
    return ""
