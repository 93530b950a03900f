"""Build a relook model from a text model and the vision part of another relook model.

A Llama is a Qwen2 whose query, key and value biases are zero, and M-RoPE with equal positions on its three axes is
RoPE. The language model of the new Qwen2-VL therefore starts as the text model itself, with equal logits on text
without images. Vision encoder, look encoders, views, grid and looks come from another relook model. New weights are
the last layer of the merger, the projectors, and the rows of the new tokens.
"""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from relook.errors import CheckpointError, UserError
from relook.looks import LOOKS
from relook.model.classes import VPTQwen2VLForConditionalGeneration
from relook.model.configuration import VPTQwen2VLConfig
from relook.model.loading import check_free, load_model, load_processor, quiet, resolve, save_new
from relook.model.new import build
from relook.model.start import new_token_rows

FAMILIES = ("llama", "qwen2")  # model types with Qwen2-VL's layers, except for biases
TAKEN_OVER = (  # config fields copied from the text model
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("use_sliding_window", "sliding_window", "max_window_layers", "tie_word_embeddings"),
)
QWEN_TOKENS = (  # tokens of a Qwen2-VL conversation; added where missing
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
DIGITS_APART = ("smollm",)  # GGUF tokenizers that split digits, which transformers ignores
LOOSE = ("q_proj.bias", "k_proj.bias", "v_proj.bias")  # zero for a Llama, which has none


def assemble(
    text: str | Path, model: Any, processor: Any, seed: int = 0, condition_std: float = 0.005
) -> tuple[VPTQwen2VLForConditionalGeneration, Any]:
    """Combine a text model with the vision part of another relook model; neither is modified.

        start, processor = assemble("SmolLM2.gguf", load_model("receipts-tiny"), load_processor("receipts-tiny"))

    Args:
        text: a Llama or Qwen2 with its tokenizer: a folder or hub id in Hugging Face's format, or a GGUF file, which is
            dequantized (needs the package gguf). Its tokenizer must encode the parts of a text independently, as
            byte-level BPE does, because turns are encoded one by one.
        model, processor: the relook model whose vision encoder, look encoders, views, grid and looks are used.
        seed: of the new weights.
        condition_std: standard deviation of Linear_c in the new projectors; see `relook.model.new.Size`.

    Returns:
        (model, processor): float32, in eval mode, untrained.

    Raises:
        UserError: not a text model, or its layers do not fit.
        CheckpointError: its weights cannot be read.
    """
    source, tokenizer = load_text(text)
    known = len(tokenizer)
    fitted = _fit_processor(processor, tokenizer)
    config = _config(source.config, model.config, fitted)
    config.provenance = {"text": Path(text).name, "vision": model.config.provenance, "seed": seed}
    torch.manual_seed(seed)
    new = VPTQwen2VLForConditionalGeneration(config).float()
    _take_text(new, source, str(text))
    words = source.get_input_embeddings().weight[:known].detach()
    _take_vision(new, model, words.square().mean().sqrt().item())
    for projector in new.projectors.values():
        nn.init.normal_(projector.linear_condition.weight, std=condition_std)
    new_token_rows(new, known, len(tokenizer))
    new.generation_config.eos_token_id = tokenizer.eos_token_id
    new.generation_config.pad_token_id = tokenizer.pad_token_id
    return new.eval(), fitted


def write(text: str, target: Path, *, vision: str | None = None, size: str | None = None, seed: int = 0) -> Path:
    """Implement `relook models assemble`: assemble a model and save it in the new folder `target`.

    Args:
        text: as for `assemble`.
        vision: a relook model to take the vision part from.
        size: or the name of a size, for an untrained vision part. Give exactly one of the two.

    Raises:
        UserError: both or none of `vision` and `size`; `target` exists.
    """
    if (vision is None) == (size is None):
        raise UserError("give exactly one of --vision MODEL and --size SIZE")
    check_free(target)
    if vision is not None:
        seeing = load_model(vision, dtype="float32", device="cpu"), load_processor(vision)
    else:
        seeing = build(str(size), seed)
    return save_new(*assemble(text, *seeing, seed=seed), target)


# -- the text model ---------------------------------------------------------------------------------------------------


def load_text(source: str | Path) -> tuple[Any, Any]:
    """Load a text model in float32 and its tokenizer from a folder, a hub id or a GGUF file.

    Raises:
        UserError: no such model, or its type is not in `FAMILIES`.
        CheckpointError: it cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = Path(source).expanduser()
    from_gguf = path.suffix.lower() == ".gguf"
    folder, options = (path.parent, {"gguf_file": path.name}) if from_gguf else (resolve(source), {})
    pre = ""
    try:
        if from_gguf:
            family, pre = _gguf_header(path)
        else:
            family = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if family not in FAMILIES:
            raise UserError(f"{source}: a text model of type {family!r}; {' or '.join(FAMILIES)} was expected")
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, **options
            ).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{source}: not a readable text model ({_first_line(error)})") from error
    if pre in DIGITS_APART:
        from tokenizers import pre_tokenizers

        backend = tokenizer.backend_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return model, tokenizer


def _gguf_header(path: Path) -> tuple[str, str]:
    """Return the architecture of a GGUF file and the name of its tokenizer's pre-tokenization."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a folder, a hub id or a .gguf file")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{path}: reading GGUF needs the package gguf; pip install 'relook[gguf]'")
    from transformers.integrations.gguf import read_gguf_metadata

    header, _ = read_gguf_metadata(str(path))
    return str(header["general.architecture"]), str(header.get("tokenizer.ggml.pre", ""))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# -- putting together -------------------------------------------------------------------------------------------------


def _fit_processor(processor: Any, tokenizer: Any) -> Any:
    """Copy a processor with the text model's tokenizer, to which all missing tokens are added."""
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in QWEN_TOKENS], special_tokens=True)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.add_bos_token = tokenizer.add_eos_token = False  # the conversation format writes its own
    tokenizer.chat_template = None  # the text model's has no images
    names = list(inspect.signature(type(processor).__init__).parameters)
    settings = {name: getattr(processor, name) for name in names[names.index("looks") :]}
    fitted = type(processor)(processor.image_processor, tokenizer, **settings)
    fitted.add_look_tokens()
    return fitted


def _config(text: Any, vision: Any, processor: Any) -> VPTQwen2VLConfig:
    """Build the config: layers of `text`, vision fields of `vision`, token ids of `processor`."""
    tokenizer = processor.tokenizer
    values = {name: getattr(text, name) for name in TAKEN_OVER if hasattr(text, name)}
    half = text.hidden_size // text.num_attention_heads // 2
    # Interleave the frequencies of t, h and w. With Qwen2-VL's three blocks one axis would get only the lowest
    # frequencies, which the text model hardly uses.
    rope = {**text.rope_parameters, "mrope_section": [1] * half}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return VPTQwen2VLConfig.from_dict(
        {
            "text_config": {**values, **ends, "rope_parameters": rope},
            "vision_config": {**vision.vision_config.to_dict(), "hidden_size": text.hidden_size},
            "tie_word_embeddings": text.tie_word_embeddings,
            "initializer_range": text.initializer_range,
            "vision_encoder_ls": [LOOKS[look].encoder for look in processor.looks if look != "region"],
            "encoders": vision.encoders,
            "region": "region" in processor.looks,
            "num_inner_forward_run": 2,
            **processor.config_token_ids(),
        }
    )


@torch.no_grad()
def _take_text(new: Any, source: Any, name: str) -> None:
    """Copy all weights of the text model into the new model; missing biases become zero."""
    ours = new.model.language_model
    weights = source.model.state_dict()
    lacking = {k: torch.zeros_like(v) for k, v in ours.state_dict().items() if k not in weights and k.endswith(LOOSE)}
    try:
        ours.load_state_dict(weights | lacking)
    except RuntimeError as error:
        problem = " ".join(str(error).split()[:40])
        raise UserError(f"{name}: its layers are not a Llama's or Qwen2's as Qwen2-VL has them: {problem}") from error
    if not source.config.tie_word_embeddings:
        new.lm_head.load_state_dict(source.lm_head.state_dict())


@torch.no_grad()
def _take_vision(new: Any, source: Any, word: float) -> None:
    """Copy the vision encoder and look encoders; initialize the merger's last layer, whose width is the text model's.

    Args:
        word: root mean square of the text model's embeddings. Image tokens start about half as long as those (the
            merger's inner activations were 0.5 to 0.6 in trained and in untrained encoders).
    """
    new.encoders.load_state_dict(source.encoders.state_dict())
    last = new.model.visual.merger.mlp[-1]
    nn.init.normal_(last.weight, std=word / last.in_features**0.5)
    nn.init.zeros_(last.bias)
    fresh = {f"merger.mlp.{len(new.model.visual.merger.mlp) - 1}.{k}": v for k, v in last.state_dict().items()}
    new.model.visual.load_state_dict(source.model.visual.state_dict() | fresh)
