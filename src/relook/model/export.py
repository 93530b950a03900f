"""A checkpoint with looks for engines that do not know it: its language model and ViT as its plain base.

Control tokens are ordinary tokens of the vocabulary, so the plain base calls regions as the model itself does; who
asks it makes the crops (`relook.load` with an address). Encoders and projectors of re-encoding looks stay behind.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import torch
import transformers

from relook.bases import Base
from relook.errors import UserError
from relook.io import replacing_folder
from relook.looks import IMAGE_PAD, VISION_END, VISION_START

from .adapters import is_adapter
from .loading import check_free, quiet, read_json, resolve, stored_dtype
from .start import open_model

ENGINES = ("vllm", "transformers")  # which take the same folder
_LEFT = ("encoders.", "projectors.")  # weights of re-encoding looks

# The turns of every base. A user's question and its images are put in the form of training, whatever the order of
# the parts; parts with text between images, as a look shows several regions, stay as they are.
_TEMPLATE = """\
{%- set image = __IMAGE__ -%}
{%- if messages and messages[0].role != "system" and __SYSTEM__ -%}
    {{- "<|im_start|>system\\n" + __SYSTEM__ + "<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message.role + "\\n" -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- set seen = namespace(images=0, text="", sides=0, last="") -%}
        {%- for part in message.content -%}
            {%- if part.type not in ("text", "image", "image_url") -%}
                {{- raise_exception("content part of type " + part.type + ", expected: text, image") -}}
            {%- endif -%}
            {%- set kind = "text" if part.type == "text" else "image" -%}
            {%- set seen.sides = seen.sides + (1 if kind != seen.last else 0) -%}
            {%- set seen.last = kind -%}
            {%- set seen.images = seen.images + (1 if kind == "image" else 0) -%}
            {%- set seen.text = seen.text + (part.text if kind == "text" else "") -%}
        {%- endfor -%}
        {%- if message.role == "user" and seen.text and seen.images and seen.sides <= 2 -%}
            {{- __QUESTION__ -}}
        {%- else -%}
            {%- for part in message.content -%}
                {{- part.text if part.type == "text" else image -}}
            {%- endfor -%}
        {%- endif -%}
    {%- endif -%}
    {{- "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""


def export(source: str | Path, target: str | Path, engine: str = "vllm") -> Path:
    """Write a model into a new or empty folder that stock transformers and vLLM take for its plain base.

    The folder appears whole or not at all; weights keep the dtype that they are stored in.

    Args:
        source: a shipped model, a folder, a hub id, or an adapter.
        target: where to.
        engine: one of `ENGINES`.

    Raises:
        UserError: an unknown engine; a model that its plain base would run otherwise than relook does.
    """
    if engine not in ENGINES:
        raise UserError(f"--for {engine!r} is no engine that models are exported for; expected {', '.join(ENGINES)}")
    check_free(target)
    folder = resolve(source)
    dtype = torch.float32 if is_adapter(folder) else stored_dtype(folder)
    model, processor = open_model(folder, dtype=dtype, device="cpu")
    sections = model.config.get_text_config().rope_parameters["mrope_section"]
    if model.config.position_mode != "mrope" or (len(sections) != 3 and set(sections) != {1}):
        raise UserError(
            f"{source}: positions {model.config.position_mode!r} in sections {sections}, which other engines do not "
            "have; serve it with relook serve"
        )
    with replacing_folder(target) as out, quiet():
        out.mkdir()
        plain_model(model).save_pretrained(out)
        _save_processor(processor, model.config.base, out)
    return Path(target)


def plain_model(model: Any) -> Any:
    """The plain base inside: its weights are the model's own tensors."""
    stock, weights = plain_classes(model.config.base)
    kept = _plain_keys(stock)
    config = stock(**{name: value for name, value in model.config.to_dict().items() if name in kept})
    config.dtype = model.dtype
    with torch.device("meta"):
        plain = weights(config)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(_LEFT)}
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain.eval()


def vllm_command(folder: Path) -> str:
    """What serves an exported folder with vLLM."""
    rope = read_json(folder / "config.json")["text_config"]["rope_parameters"]
    words = ["vllm", "serve", str(folder), "--enable-prompt-tokens-details"]
    if changed := _vllm_rope(rope):
        words += ["--hf-overrides", json.dumps({"text_config": {"rope_parameters": {**rope, **changed}}})]
    return shlex.join(words)


def _vllm_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """What vLLM calls M-RoPE in sections that transformers lists one by one, as the tiny models have them.

    vLLM takes one section for time, height and width each, or the three interleaved channel by channel.
    """
    sections = rope["mrope_section"]
    if len(sections) == 3:
        return {}
    return {"mrope_section": [len(sections[axis::3]) for axis in range(3)], "mrope_interleaved": True}


def plain_classes(base: Base) -> tuple[Any, Any]:
    """transformers' own config and model class of a base."""
    names = f"{base.stock}Config", f"{base.stock}ForConditionalGeneration"
    return getattr(transformers, names[0]), getattr(transformers, names[1])


def _plain_keys(stock: Any) -> set[str]:
    """Of a config: all that transformers keeps in a plain one but what names the class."""
    return set(stock().to_dict()) - {"model_type", "architectures", "transformers_version", "dtype"}


def _save_processor(processor: Any, base: Base, out: Path) -> None:
    """Tokenizer, image processor and chat template, as folders of plain bases have them."""
    tokenizer = processor.tokenizer
    tokenizer._set_processor_class(base.processor_class)
    tokenizer.chat_template = plain_template(processor.system, processor.question_first)
    tokenizer.save_pretrained(out)
    processor.image_processor.save_pretrained(out)


def plain_template(system: str, question_first: bool) -> str:
    """The chat template, for content parts of type "text" and "image"."""
    images, text = "(image + newline) * seen.images", "seen.text | trim"
    question = f"({text}) + (newline + image) * seen.images" if question_first else f"{images} + ({text})"
    words = {
        "__IMAGE__": json.dumps(VISION_START + IMAGE_PAD + VISION_END),
        "__SYSTEM__": json.dumps(system, ensure_ascii=False),
        "__QUESTION__": question.replace("newline", '"\\n"'),
    }
    template = _TEMPLATE
    for word, value in words.items():
        template = template.replace(word, value)
    return template
