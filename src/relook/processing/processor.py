"""Text, images and looks to tensors, on transformers' Qwen2-VL processor, with or without torchvision.

`VPTQwen2VLProcessor` is a Qwen2VLProcessor that adds the control tokens of the looks, the resolution of each look
(`relook.views`) and the token ids of conversations with second looks: `encode_item` for training data, `turn_ids` and
its relatives for the generation loop, the usual call for transformers. All three give the same ids.

Conversations are tokenised piece by piece, as the published pipeline did: the system turn, each user turn together with
the assistant's header, and each assistant content on its own. (As one text, an answer that begins with a newline would
melt into the newline of its header.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from relook.errors import UserError
from relook.io import checkpoint_name
from relook.looks import (
    DEFAULT_SYSTEM,
    IM_END,
    IM_START,
    LOOKS,
    VISION_END,
    VISION_START,
    control_tokens,
    parse_calls,
    strip_calls,
)
from relook.processing.pixels import ENCODERS, is_vit, pinned, vit_size
from relook.processing.turns import (
    Message,
    check_counts,
    check_pads,
    expand_pads,
    image_stages,
    pad_stages,
    plain_turn,
    split_system,
    template_turn,
)
from relook.processing.vocabulary import BREAK, IGNORED, KINDS, TENSORS, add_look_tokens, as_text, encode, expand
from relook.processing.vocabulary import chat_template as own_template  # `chat_template` is an argument of __init__
from relook.views import DEFAULT_VIEW, PREPROCESSING, View, load_item_image, open_image

logger = logging.get_logger(__name__)


class VPTQwen2VLProcessor(Qwen2VLProcessor):
    """Text, images and looks to the tensors of `VPTQwen2VLForConditionalGeneration.forward`, and ids back to text.

    Args:
        image_processor: Qwen2-VL's; its PIL class is used whatever is given.
        tokenizer: with the control tokens of `looks` in it, or without them until `add_look_tokens` is called.
        chat_template: of the folder; if there is none, the tokenizer's or our own.
        looks: names of the looks that the model has. (`from_pretrained` of a folder without processor_config.json:
            those whose tokens the tokenizer has.)
        grid_size: cells along each side of the region grid.
        region_margin: cells by which a region is widened before it is cropped.
        region_of: what the cells of a region call count in: the "whole" image, as published, or the "last" view that a
            region look of the same answer has shown (at first the whole image, too).
        max_looks: how often the model was taught to look for one answer.
        first_look, second_look: views of the image and of a crop. A `View`, its dict, or a longest side.
        reencode_look: view of a re-encoded image; None for the view of the first look, whose features can be reused.
        free_choice: whether the model decides to look without being asked for it in the prompt. (Of a published
            checkpoint: where its name ends in NoPrompt.)
        system: system prompt; empty for no system turn.
        question_first: whether the question stands before the image in the first turn (tiny models are trained so:
            image tokens can then see what is asked) and not after it, as in the published data; see `first_turn`.

    All but the first three are kept in processor_config.json.
    """

    # transformers finds the sub-processors by the names of these arguments. There is no `video_processor` among them,
    # because the only one there is needs torchvision; and so ProcessorMixin.__init__ is called past Qwen2VLProcessor's.
    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | dict | None = None,
        looks: Sequence[str] = ("region", "clip"),
        grid_size: int = 8,
        region_margin: int = 1,
        first_look: View | Mapping | int | None = DEFAULT_VIEW,
        second_look: View | Mapping | int | None = DEFAULT_VIEW,
        reencode_look: View | Mapping | int | None = None,
        free_choice: bool = False,
        system: str = DEFAULT_SYSTEM,
        question_first: bool = False,
        region_of: str = "whole",
        max_looks: int = 1,
    ) -> None:
        if unknown := [look for look in looks if look not in LOOKS]:
            raise UserError(f"looks: {', '.join(unknown)} unknown; expected some of {', '.join(LOOKS)}")
        if region_of not in ("whole", "last"):
            raise UserError(f"region_of={region_of!r} is unknown; expected whole or last")
        if max_looks < 1:
            raise UserError(f"max_looks={max_looks}; expected at least 1")
        self.region_of, self.max_looks = region_of, max_looks
        self.looks = list(looks)
        self.grid_size = grid_size
        self.region_margin = region_margin
        self.first_look = View.of(first_look)
        self.second_look = View.of(second_look)
        self.reencode_look = None if reencode_look is None else View.of(reencode_look)
        self.free_choice = free_choice
        self.system = system
        self.question_first = question_first
        self.image_token, self.video_token = KINDS["image"].pad, "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        if "padding_side" not in tokenizer.init_kwargs:  # as stock Qwen2-VL ships: batches are generated from
            tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
        ProcessorMixin.__init__(
            self,
            pinned(image_processor),
            tokenizer,
            chat_template=chat_template or _template_of(tokenizer) or own_template(system),
        )

    # ---- loading and saving

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict | None = None, **kwargs: Any
    ) -> list:
        # transformers' own way asks AutoImageProcessor, which prefers torchvision, and hands every keyword (such as
        # `looks=`) to the tokenizer, which would write it into its config.
        settings = {*cls.__init__.__code__.co_varnames, "backend"}  # images are opened by Pillow, whatever is asked for
        kwargs = {key: value for key, value in kwargs.items() if key not in settings}
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        found = [look for look, spec in LOOKS.items() if spec.start in tokenizer.get_added_vocab()]
        if processor_dict is not None and found:  # a published folder says neither
            processor_dict.setdefault("looks", found)
            place = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            free_choice = checkpoint_name(place).endswith("NoPrompt")
            processor_dict.setdefault("free_choice", free_choice)
        return [Qwen2VLImageProcessorPil.from_pretrained(pretrained_model_name_or_path, **kwargs), tokenizer]

    def to_dict(self) -> dict[str, Any]:
        later = {"region_of": "whole", "max_looks": 1}  # left out, so that files and hashes of older models stay alike
        saved = {key: value for key, value in super().to_dict().items() if later.get(key, ()) != value}
        return {key: value.to_dict() if isinstance(value, View) else value for key, value in saved.items()}

    def with_settings(self, name: str) -> VPTQwen2VLProcessor:
        """A processor with the views of a named setting ("default", "published", "published-224"), all else shared."""
        if name not in PREPROCESSING:
            raise UserError(f"preprocessing {name!r} is unknown; expected one of {', '.join(PREPROCESSING)}")
        other = copy.copy(self)
        for stage, view in PREPROCESSING[name].items():
            setattr(other, stage, view)
        return other

    # ---- vocabulary

    def add_look_tokens(self, looks: Iterable[str] | None = None) -> int:
        """Add the control tokens of `looks` (default: the processor's) to its tokenizer; returns how many were new."""
        if looks is not None:
            self.looks = list(looks)
        return add_look_tokens(self.tokenizer, self.looks, self.grid_size)

    @property
    def tokens(self) -> dict[str, int]:
        """Every control token of the looks, the pads among them, with its id."""
        pads, ordinary = control_tokens(tuple(self.looks), grid=self.grid_size)
        return self._ids({token: token for token in [*pads, *ordinary]})

    @property
    def ignored_ids(self) -> frozenset[int]:
        """Ids that are never a label: the `*_action` tokens, which the loop writes itself."""
        ids = (self._id(spec.action) for spec in LOOKS.values() if spec.action)
        return frozenset(i for i in ids if i is not None)

    def config_token_ids(self) -> dict[str, int]:
        """The token ids that the model's config needs, under the config's names (`clip_action_start_id`, ...)."""
        names = {
            "image_token_id": self.image_token,
            "video_token_id": self.video_token,
            "vision_start_token_id": VISION_START,
            "vision_end_token_id": VISION_END,
            "para_start_id": IM_START,
            "para_end_id": IM_END,
        }
        for look, spec in LOOKS.items():
            if look in self.looks and spec.action is not None:
                names[f"{look}_image_token_id"] = spec.pad
                names[f"{look}_action_start_id"] = spec.start
                names[f"{look}_action_id"] = spec.action
        return self._ids(names)

    def _ids(self, tokens: Mapping[str, str]) -> dict[str, int]:
        ids = {name: self._id(token) for name, token in tokens.items()}
        if missing := [tokens[name] for name, i in ids.items() if i is None]:
            raise UserError(
                f"tokenizer lacks {len(missing)} control tokens of the looks {', '.join(self.looks)} "
                f"({', '.join(missing[:3])}...); call processor.add_look_tokens() and resize the model's embeddings"
            )
        return {name: i for name, i in ids.items() if i is not None}

    def _id(self, token: str) -> int | None:
        i = self.tokenizer.convert_tokens_to_ids(token)  # an absent token is None, or the unknown token's id
        return i if i is not None and self.tokenizer.convert_ids_to_tokens(i) == token else None

    # ---- images

    @property
    def min_side(self) -> int:
        """Pixels along one merged token: the least side of an image that the ViT takes (28 in Qwen2-VL)."""
        return self.image_processor.patch_size * self.image_processor.merge_size

    def view(self, image: Any, stage: str, look: str = "image") -> Any:
        """A PIL image as the look sees it.

        Args:
            image: whatever `open_image` takes; for a crop, the crop of the original pixels.
            stage: "first", "crop" or "reencode".
            look: what it will be encoded as: "image", "clip", "detection" or "seg". For the ViT's two the size is moved
                to the multiples of `min_side` that it takes, so that pixels are resampled once; the others resize by
                themselves.
        """
        snap = partial(vit_size, self.image_processor)
        return self.view_of(stage).apply(open_image(image), self.min_side, snap if is_vit(look) else None)

    def view_of(self, stage: str) -> View:
        """The view of a stage: "first", "crop" or "reencode"."""
        views = {"first": self.first_look, "crop": self.second_look, "reencode": self.reencode_look or self.first_look}
        if stage not in views:
            raise UserError(f"stage {stage!r} is unknown; expected one of {', '.join(views)}")
        return views[stage]

    def encode_images(self, images: Sequence[Any], look: str = "image") -> dict[str, Any]:
        """Images as viewed (PIL, RGB) to tensors under forward's names; an empty dict for no images.

        "image": pixel_values (patches, 3*2*p*p), image_grid_thw (n, 3); "clip" likewise under its names; "detection":
        detection_images (n, 3, 224, 224); "seg": seg_images (n, 3, 1024, 1024). float32; the grids int64.
        """
        if look not in TENSORS:
            raise UserError(f"look {look!r} is unknown; expected one of {', '.join(TENSORS)}")
        if not images:
            return {}
        encoded = (self.image_processor if is_vit(look) else ENCODERS[look])(list(images), return_tensors="pt")
        return {name: encoded[source] for name, source in zip(TENSORS[look], TENSORS["image"], strict=False)}

    def pad_count(self, look: str, grid_thw: Sequence[int] | Any = None) -> int:
        """How many pads stand for an encoded image: t*h*w / merge^2 of its patch grid, or the look's fixed number.

        `pad_count("image", (1, 22, 36))` is 198 in Qwen2-VL, `pad_count("seg")` is 256.
        """
        fixed = KINDS[look].fixed_tokens
        if fixed is not None:
            return fixed
        if grid_thw is None:
            raise UserError(f"look {look!r} has no fixed number of tokens; give the patch grid (t, h, w) of its image")
        t, h, w = (int(v) for v in grid_thw)
        return t * h * w // self.image_processor.merge_size**2

    def pad_counts(self, look: str, tensors: Mapping[str, Any], images: int) -> list[int]:
        """`pad_count` of each of the `images` that `encode_images` made into `tensors`."""
        grids = tensors[TENSORS[look][1]].tolist() if images and is_vit(look) else [None] * images
        return [self.pad_count(look, grid) for grid in grids]

    # ---- text and ids

    def as_text(self, text: str) -> str:
        """Text from outside for a turn, of which nothing is read as structure; see `vocabulary.as_text`."""
        return as_text(text, self.tokenizer, placeholders=True)

    def first_turn(self, question: str, images: int = 1) -> str:
        """Content of the first user turn: a line `<image>` per image and the question, in the order of training."""
        placeholders = [KINDS["image"].placeholder] * images
        return "\n".join([question, *placeholders] if self.question_first else [*placeholders, question])

    def user_ids(self, content: str, opening: bool, system: str | None = None) -> list[int]:
        """Ids of a user turn, its content expanded, and the assistant's header, so that the assistant goes on there.

        Before it the system turn, where it is the `opening` (None: the processor's, if it has one); else the newline
        after the assistant's turn.
        """
        system = (self.system or None) if system is None else system
        before = "\n" if not opening else "" if system is None else f"{IM_START}system\n{system}{IM_END}\n"
        return encode(f"{before}{IM_START}user\n{content}{IM_END}\n{IM_START}assistant\n", self.tokenizer)

    def conversation_ids(
        self, messages: Sequence[Message], counts: Mapping[str, Iterable[int]]
    ) -> tuple[list[int], list[bool]]:
        """Ids of a conversation whose images have `counts` pads, and whether each is the assistant's (its end is).

        After a user turn, with the assistant's header. In the contents, only placeholders and the calls of the
        assistant are structure; all else is plain text, also where it spells a control token.
        """
        counts = {kind: iter(numbers) for kind, numbers in counts.items()}
        plain = partial(as_text, tokenizer=self.tokenizer)
        messages = [plain_turn(message, plain, self.grid_size) for message in messages]
        system, turns = split_system(messages)
        ids: list[int] = []
        written: list[bool] = []
        for i, turn in enumerate(turns):
            content = expand(turn["content"], counts)
            said = turn["role"] == "assistant"
            block = encode(content + IM_END, self.tokenizer) if said else self.user_ids(content, i == 0, system)
            ids += block
            written += [said] * len(block)
        return ids, written

    # ---- data items

    def encode_item(
        self, item: Mapping[str, Any], *, labels: bool = True, image_root: str | Path | None = None
    ) -> dict[str, Any]:
        """One conversation in the published JSON format (spec.md, section 8) to what a model is trained on.

        Images are paths (relative to `image_root`; crops by path suffix), PIL images, arrays, bytes, or (image, box).

        Returns:
            input_ids, labels (lists of one length; IGNORED where there is no loss: everything but assistant turns
            with their <|im_end|>, and in them the `*_action` tokens), prompt_ids (everything before the last answer),
            and the tensors of `encode_images` for every kind of image in the item.
        """
        plain = partial(as_text, tokenizer=self.tokenizer)
        messages = [plain_turn(message, plain, self.grid_size) for message in item["messages"]]
        sources = {kind: list(item.get(spec.item_key) or []) for kind, spec in KINDS.items()}
        check_counts(messages, {kind: len(images) for kind, images in sources.items()})
        stages = {kind: ["reencode"] * len(images) for kind, images in sources.items()}
        stages["image"] = image_stages(messages)
        encoded: dict[str, Any] = {}
        counts: dict[str, list[int]] = {}
        for kind, images in sources.items():
            opened = [load_item_image(image, image_root) for image in images]
            viewed = [self.view(image, stage, kind) for image, stage in zip(opened, stages[kind], strict=True)]
            tensors = self.encode_images(viewed, kind)
            encoded.update(tensors)
            counts[kind] = self.pad_counts(kind, tensors, len(images))
        ids, written = self.conversation_ids(messages, counts)
        answer = next((i for i, w in enumerate(reversed(written)) if not w), 0)  # the last block, if the assistant's
        result: dict[str, Any] = {"input_ids": ids, "prompt_ids": ids[: len(ids) - answer]}
        if labels:
            ignored = self.ignored_ids
            result["labels"] = [i if w and i not in ignored else IGNORED for i, w in zip(ids, written, strict=True)]
        return result | encoded

    # ---- the way transformers calls it

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        clip_images: Any = None,
        detection_images: Any = None,
        seg_images: Any = None,
        views: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Texts with one pad per image (as the chat template writes them) and their images to forward's tensors.

        Images of a kind are taken in the order of its pads. Each is first brought to the view of its stage: re-encoded
        images to `reencode_look`, an image after an assistant turn that called a region to `second_look`, others to
        `first_look`; `views=False` leaves them as they are. Other keywords are those of Qwen2VLProcessor.
        """
        if videos is not None:
            raise UserError("videos are not supported; give images")
        texts = [text] if isinstance(text, str) else list(text or [])
        given = {"image": images, "clip": clip_images, "detection": detection_images, "seg": seg_images}
        flat = {kind: opened(value) for kind, value in given.items()}
        if texts:
            check_pads(texts, {kind: len(value) for kind, value in flat.items()})
        extra: dict[str, Any] = {}
        for kind in ("clip", "detection", "seg"):
            seen = [self.view(image, "reencode", kind) if views else image for image in flat[kind]]
            tensors = self.encode_images(seen, kind)
            extra.update(tensors)
            texts = expand_pads(texts, KINDS[kind].pad, self.pad_counts(kind, tensors, len(seen)))
        stages = pad_stages(texts) if texts else ["first"] * len(flat["image"])
        seen = [self.view(i, s) if views else i for i, s in zip(flat["image"], stages, strict=True)]
        if any(BREAK in text for text in texts):
            kwargs["sanitize_control_tokens"] = True  # the tokenizer encodes what is broken as plain text
        out = super().__call__(images=seen or None, text=texts or None, **kwargs)
        as_torch = kwargs.get("return_tensors") == "pt"
        out.update(extra if as_torch else {name: tensor.numpy() for name, tensor in extra.items()})
        return out

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with user turns in the form that the model was trained on, whatever the order of parts.

        With `tokenize=True` the ids are those of `encode_item` and of the loop, and texts are plain text. (A template
        that is only rendered is a string, in which nothing tells a literal `<|im_end|>` from a turn's end.)
        """
        chats, batched = self._normalize_conversations(conversation)
        plain = self.as_text if kwargs.get("tokenize") else None
        chats = [
            [template_turn(message, plain, self.question_first, self.grid_size) for message in chat] for chat in chats
        ]
        return super().apply_chat_template(chats if batched else chats[0], *args, **kwargs)

    def _multimodal_inputs_from_conversations(self, conversations: list, *args: Any, **kwargs: Any) -> tuple:
        # apply_chat_template(tokenize=True) passes the fourth value on to __call__ as keywords
        images, videos, audios, more = super()._multimodal_inputs_from_conversations(conversations, *args, **kwargs)
        parts = [p for c in conversations for m in c if not isinstance(m["content"], str) for p in m["content"]]
        for kind in ("clip", "detection", "seg"):
            name = KINDS[kind].placeholder.strip("<>")
            found = [p[name] for p in parts if p["type"] == name and name in p]
            if found:
                more = {**more, KINDS[kind].item_key: found}
        return images, videos, audios, more

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, *args, **kwargs):
        """The texts of generated ids, as a pipeline shows them: without calls of looks."""
        texts = super().post_process_image_text_to_text(generated_outputs, skip_special_tokens, *args, **kwargs)
        if not skip_special_tokens:
            return texts
        stripped = []
        for text in texts:  # a pipeline looks for the prompt at its beginning, which stays as it is
            call = next(iter(parse_calls(text, self.grid_size)), None)
            at = len(text) if call is None else call.span[0]
            stripped.append(text[:at] + strip_calls(text[at:], self.grid_size))
        if stripped != texts:
            logger.warning_once("a look was asked for, which needs pipeline_class=relook.LookPipeline")
        return stripped

    @property
    def model_input_names(self) -> list[str]:
        return super().model_input_names + [name for look in self.looks if look in TENSORS for name in TENSORS[look]]


def opened(images: Any) -> list[Any]:
    """All images of nested lists in order, opened; addresses are fetched as transformers does."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4:
        return [one for image in images for one in opened(image)]
    return [open_image(images, fetch=True)]


def _template_of(tokenizer: Any) -> str | dict | None:
    """The tokenizer's chat template, if it takes images (a text model's does not)."""
    template = getattr(tokenizer, "chat_template", None)
    return template if isinstance(template, dict) or (template and "image" in template) else None
