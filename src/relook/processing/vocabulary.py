"""Text of a conversation: kinds of encodings and their pads, the chat template, the tokens of the looks."""

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from transformers import AddedToken
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_START as BREAK
from transformers.utils.chat_template_utils import encode_marked_chat

from relook.errors import UserError
from relook.looks import DEFAULT_SYSTEM, LOOKS, VISION_END, VISION_START, LookSpec, control_tokens

IGNORED = -100  # label of positions without loss

# What an image can be encoded as: "image" is the model's own view (first look or crop), the others are re-encodings.
KINDS: dict[str, LookSpec] = {("image" if name == "region" else name): look for name, look in LOOKS.items()}

# Keyword of forward that holds an encoding; the ViT's two kinds come with a patch grid.
TENSORS = {
    "image": ("pixel_values", "image_grid_thw"),
    "clip": ("clip_pixel_values", "clip_images_grid_thw"),
    "detection": ("detection_images",),
    "seg": ("seg_images",),
}

# Qwen2-VL's turns, and one part type per placeholder ({"type": "clip_image"} and so on).
_TEMPLATE = """\
{%- set pads = __PADS__ -%}
{%- if messages and messages[0].role != "system" and __SYSTEM__ -%}
    {{- "<|im_start|>system\\n" + __SYSTEM__ + "<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message.role + "\\n" -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == "text" -%}
                {{- part.text -}}
            {%- elif part.type in pads -%}
                {{- "<|vision_start|>" + pads[part.type] + "<|vision_end|>" -}}
            {%- else -%}
                {{- raise_exception("content part of type " + part.type + ", expected: text, " + pads | join(", ")) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""


def chat_template(system: str = DEFAULT_SYSTEM) -> str:
    """A Jinja chat template for Qwen2-VL's ChatML, with the placeholders of every look as content parts."""
    pads = {spec.placeholder.strip("<>"): spec.pad for spec in LOOKS.values()}
    as_jinja = "{" + ", ".join(f"{_quoted(part)}: {_quoted(pad)}" for part, pad in pads.items()) + "}"
    return _TEMPLATE.replace("__PADS__", as_jinja).replace("__SYSTEM__", _quoted(system))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def add_look_tokens(tokenizer: Any, looks: Iterable[str], grid_size: int = 8) -> int:
    """Add the control tokens of `looks` to a tokenizer, in the published order: pads (special), then the ordinary ones.

    Tokens that are there keep their ids. Returns how many were added. On Qwen2-VL's tokenizer, whose last id is 151656,
    `add_look_tokens(tokenizer, ["region", "clip"])` gives <|clip_image_pad|> 151657 and the rest 151658 to 151678.
    """
    pads, ordinary = control_tokens(tuple(looks), grid=grid_size)
    added = tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in pads], special_tokens=True)
    return added + tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ordinary])


def expand(text: str, counts: Mapping[str, Iterable[int]]) -> str:
    """Placeholders (<image>, <clip_image>, ...) to vision start, pads, vision end, taking the counts in order.

    `counts` gives, for each kind of encoding, the number of pads of each image. Iterators are consumed, so that the
    turns of a conversation can be expanded one after the other. `expand("<image>?", {"image": [2]})` is
    "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>?".
    """
    numbers = {kind: iter(values) for kind, values in counts.items()}

    def write(match: re.Match[str]) -> str:
        kind = _KIND_OF_PLACEHOLDER[match.group()]
        count = next(numbers.get(kind, iter(())), None)
        if count is None:
            raise UserError(f"{text[:60]!r} has more {match.group()} than images; give one image per placeholder")
        return VISION_START + KINDS[kind].pad * count + VISION_END

    return _PLACEHOLDERS.sub(write, text)


def as_text(text: str, tokenizer: Any, placeholders: bool = False) -> str:
    """Text from outside, of which nothing is read as structure: `encode` makes plain text of all of it.

    `BREAK` (a private character, which `encode` and transformers' tokenizers leave out again) is put behind the first
    character of every literal token of the tokenizer, such as `<|im_end|>` or `<|x_3|>`; with `placeholders`, of
    `<image>` and its like, too.
    """
    return _starts(tuple(tokenizer.get_added_vocab()), placeholders).sub(rf"\1{BREAK}", text.replace(BREAK, ""))


@lru_cache
def _starts(tokens: tuple[str, ...], placeholders: bool) -> re.Pattern[str]:
    tokens += tuple(_KIND_OF_PLACEHOLDER) if placeholders else ()
    any_token = "|".join(re.escape(token) for token in tokens if len(token) > 1) or "(?!)"
    return re.compile(f"(?={any_token})(.)", re.DOTALL)


def encode(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a piece of a conversation; what went through `as_text` is plain text."""
    if BREAK in text:
        return encode_marked_chat(tokenizer, text)
    return tokenizer.encode(text, add_special_tokens=False) if text else []


_KIND_OF_PLACEHOLDER = {spec.placeholder: kind for kind, spec in KINDS.items()}
_PLACEHOLDERS = re.compile("|".join(re.escape(placeholder) for placeholder in _KIND_OF_PLACEHOLDER))
