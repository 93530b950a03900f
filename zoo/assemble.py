"""A model that may look again from a text model and a vision tower: the middle size between tiny and published ones.

A Llama is a Qwen2 whose query, key and value biases are zero, and M-RoPE with the same number on all three axes is
RoPE: so the language model of the new Qwen2-VL starts out as the text model itself, and the two give the same logits on
text without an image. Everything about seeing (tower, encoders, views, grid, looks) is another relook model's. What
joins the two is fresh: the merger's last layer, the projectors, and the rows of the new tokens.

Refuses to know images, recipes and how the whole is trained.
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
from relook.model.configuration import VPTQwen2VLConfig
from relook.model.loading import _quiet as quiet
from relook.model.loading import check_free, load_model, load_processor, resolve, save_new
from relook.model.modeling import VPTQwen2VLForConditionalGeneration
from relook.model.new import build
from relook.model.start import new_token_rows

FAMILIES = ("llama", "qwen2")  # model types whose layers are Qwen2-VL's, but for biases
TAKEN_OVER = (  # fields of the text model's config that Qwen2-VL's has as well
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("use_sliding_window", "sliding_window", "max_window_layers", "tie_word_embeddings"),
)
QWEN_TOKENS = (  # what a Qwen2-VL conversation is written with; a text model may know some of them
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
DIGITS_APART = ("smollm",)  # GGUF tokenizers that cut numbers into digits, of which transformers does not know
LOOSE = ("q_proj.bias", "k_proj.bias", "v_proj.bias")  # what a Llama lacks, zero here


def assemble(
    text: str | Path, model: Any, processor: Any, seed: int = 0, condition_std: float = 0.005
) -> tuple[VPTQwen2VLForConditionalGeneration, Any]:
    """A new model from a text model and the vision of another relook model; both stay as they are.

        start, processor = assemble("SmolLM2.gguf", load_model("receipts-tiny"), load_processor("receipts-tiny"))

    Args:
        text: a Llama or Qwen2 with its tokenizer: a folder or hub id in Hugging Face's format, or a GGUF file (which is
            dequantised; needs the package gguf). The tokenizer must write pieces of text as they are, as byte-level BPE
            does: turns are encoded one by one.
        model, processor: whose vision tower, encoders, views, grid and looks are taken.
        seed: of what is drawn afresh.
        condition_std: spread of Linear_c in the fresh projectors; see `relook.model.new.Size`.

    Returns:
        (model, processor) in float32, in eval mode, untrained.

    Raises:
        UserError: not a text model, or not one whose layers fit. CheckpointError: its weights cannot be read.
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
    """`relook models assemble`: a new model from a text model and the vision of MODEL, or of a size, into a folder.

    Raises:
        UserError: both or none of `vision` and `size`; there is something at `target`.
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
    """A text model in float32 and its tokenizer, from a folder, a hub id or a GGUF file.

    Raises:
        UserError: no such model, or not of `FAMILIES`. CheckpointError: it cannot be read.
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
    """Architecture of a GGUF file, and how its tokenizer cuts text before merging."""
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
    """A processor like the one given around the text model's tokenizer, to which all tokens are added."""
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in QWEN_TOKENS], special_tokens=True)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.add_bos_token = tokenizer.add_eos_token = False  # conversations say for themselves how they begin
    tokenizer.chat_template = None  # the text model's knows no images
    names = list(inspect.signature(type(processor).__init__).parameters)
    settings = {name: getattr(processor, name) for name in names[names.index("looks") :]}
    fitted = type(processor)(processor.image_processor, tokenizer, **settings)
    fitted.add_look_tokens()
    return fitted


def _config(text: Any, vision: Any, processor: Any) -> VPTQwen2VLConfig:
    """Layers of `text`, everything about seeing from `vision`, token ids of `processor`."""
    tokenizer = processor.tokenizer
    values = {name: getattr(text, name) for name in TAKEN_OVER if hasattr(text, name)}
    half = text.hidden_size // text.num_attention_heads // 2
    # One frequency each for t, h, w in turn: in three blocks, as Qwen2-VL has them, one axis would have only the lowest
    # frequencies, of which the text model has made little use.
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
    """The text model's weights into the new one, whole; biases that it lacks are zero."""
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
    """The other model's tower and encoders. The merger's last layer is drawn afresh: its width is the text model's.

    Args:
        word: root mean square of the text model's embeddings. Image tokens start out about half as long as words (the
            merger's inner values were 0.5 to 0.6 in trained and in fresh towers).
    """
    new.encoders.load_state_dict(source.encoders.state_dict())
    last = new.model.visual.merger.mlp[-1]
    nn.init.normal_(last.weight, std=word / last.in_features**0.5)
    nn.init.zeros_(last.bias)
    fresh = {f"merger.mlp.{len(new.model.visual.merger.mlp) - 1}.{k}": v for k, v in last.state_dict().items()}
    new.model.visual.load_state_dict(source.model.visual.state_dict() | fresh)
