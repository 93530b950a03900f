"""How the model behind an endpoint spells a region look, and how crops go back to it.

A dialect is a row of `DIALECTS`. There are two spellings: control tokens in the text, as VPT models write them
(`ControlTokens`), and calls of the tool `image_zoom_in_tool` with `bbox_2d`, as Qwen2.5-VL and Qwen3-VL make them
(`ZoomCalls`). Crops go back as images of the user's: engines take no images from tools, or drop them in silence.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image

from relook.boxes import BOX_FORMS, read_box, write_box
from relook.errors import UserError
from relook.looks import (
    DEFAULT_SYSTEM,
    IM_END,
    IM_START,
    IMAGE_PAD,
    LOOKS,
    VISION_END,
    VISION_START,
    control_tokens,
    look_turn,
    parse_calls,
    write_call,
)
from relook.looks import Call as TokenCall
from relook.regions import Box, Cells, box_to_cells, clamp_box
from relook.views import View

ZOOM = "image_zoom_in_tool"
Size = tuple[int, int]
Body = dict[str, Any]  # a message, or fields of a request
_STRUCTURE = (IM_START, VISION_START, VISION_END, IMAGE_PAD, "<|video_pad|>")
NOT_HERE = (
    "a {} look needs hidden states of the model, which an endpoint does not give; "
    "serve the model with relook serve, or load it in this process"
)


@dataclass(frozen=True)
class Dialect:
    """One row: how a family of models calls regions.

    Attributes:
        models: regular expression for the ids of its models.
        boxes: what `bbox_2d` counts, a name of `relook.boxes.BOX_FORMS`, of the image as it was sent; None: no boxes
            but control tokens.
        prompted: the tool is described in the system prompt, and calls are text (chat templates without tools).
        side: pixels of a merged token. Images are sent in multiples of it, so that the server does not resize them and
            boxes in pixels mean what was sent; 0: images are sent as they are.
        longest_side: that images and crops are sent with at most.
    """

    models: str = ""
    boxes: str | None = None
    prompted: bool = False
    side: int = 0
    longest_side: int | None = None


DIALECTS = {
    "tokens": Dialect(),  # VPT models; views, grid and prompts are those of a relook model's processor
    "relook": Dialect(boxes="pixels"),  # relook serve, which sees to views and prompts by itself
    "qwen3-vl": Dialect(r"qwen-?3[-_]?vl", boxes="0-1000", side=32, longest_side=1024),
    "qwen2.5-vl": Dialect(r"qwen-?2[._]5[-_]?vl|deepeyes", boxes="pixels", prompted=True, side=28, longest_side=1036),
}


@dataclass
class Called:
    """A look that the model calls: the cells or the box of the original image that it names; or a problem."""

    kind: str = "region"
    cells: Cells | None = None
    box: Box | None = None
    problem: str | None = None
    id: str = ""
    frame: Box | None = None  # that the cells count in, where the server says it


@dataclass
class Reply:
    """One turn of the server's model: its text as it came, and its tool calls ({"id", "name", "arguments"})."""

    text: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)
    finish: str | None = None
    usage: Any = None
    own: Mapping[str, Any] = field(default_factory=dict)  # what relook's server says beyond OpenAI's API
    kept: Body = field(default_factory=dict)  # of it, what goes back in the message


class ControlTokens:
    """Regions as control tokens in the text.

    Args:
        processor: of the model that the server has: its grid, margin, prompts and views hold.
    """

    def __init__(self, processor: Any):
        self.processor, self.grid = processor, processor.grid_size
        tokens = [token for part in control_tokens(LOOKS, self.grid) for token in part]
        self.hidden = re.compile("|".join(map(re.escape, [*tokens, IM_END])))

    def system(self, given: str | None) -> str | None:
        return self.processor.system if given is None else given

    def question(self, question: str, images: Sequence[Image.Image]) -> Body:
        content = self.processor.first_turn("\0", len(images))
        return _user(content, images, question)

    def fields(self, may_look: bool, forced: bool) -> Body:
        """`forced`: the last message begins the call, and the model goes on with it.

        Fields beyond OpenAI's are vLLM's; SGLang and llama.cpp have the first ones, and pass over what they lack.
        """
        others = [LOOKS[name].start for name in self.processor.looks if LOOKS[name].reencodes]
        banned = [*_STRUCTURE, *(others if may_look else self.processor.tokens)]  # as in this process
        more = {"continue_final_message": True, "add_generation_prompt": False} if forced else {}
        return {"extra_body": {"skip_special_tokens": False, "bad_words": banned, **more}}

    def read(self, reply: Reply, size: Size, sent: Size) -> list[Called]:
        found = []
        for call in parse_calls(reply.text, self.grid):
            problem = NOT_HERE.format(call.look) if LOOKS[call.look].reencodes and not call.problem else call.problem
            found.append(Called(call.look, call.cells, problem=problem))
        return found

    def call(self, called: Sequence[Called], size: Size, sent: Size) -> Body:
        text = "".join(write_call("region", each.cells, self.grid) for each in called)
        return {"role": "assistant", "content": text}

    def said(self, reply: Reply) -> Body:
        return {"role": "assistant", "content": reply.text}

    def results(self, called: Sequence[Called], crops: Sequence[Image.Image], untold: bool = False) -> list[Body]:
        """The turn with the crops; an empty one where `untold`."""
        good = [TokenCall("region", each.cells, None, (0, 0)) for each in called if each.problem is None]
        return [_user("" if untold else look_turn(good), crops)] if crops or untold else []


class ZoomCalls:
    """Regions as calls of `image_zoom_in_tool`.

    Args:
        dialect: its row.
        grid: cells a side that looks are recorded in, and that regions are asked for in.
        options: of relook's own server, which takes them in a field of their own.
    """

    def __init__(self, dialect: Dialect, grid: int, options: Body | None = None):
        self.dialect, self.grid, self.options = dialect, grid, options
        in_text = r"<tool_call>.*?(</tool_call>|$)" if options is None else "(?!)"
        self.hidden = re.compile(in_text, re.DOTALL)

    @property
    def tool(self) -> Body:
        """The tool, described to the model."""
        counts = {"pixels": "in pixels of the image", "0-1000": "relative to the image, from 0 to 1000"}
        about = f"[x1, y1, x2, y2] of the region, {counts[str(self.dialect.boxes)]}"
        box = {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4, "description": about}
        label = {"type": "string", "description": "What is in the region"}
        parameters = {"type": "object", "properties": {"bbox_2d": box, "label": label}, "required": ["bbox_2d"]}
        said = "Zoom in on a region of the image; the enlarged region is shown next"
        return {"type": "function", "function": {"name": ZOOM, "description": said, "parameters": parameters}}

    def system(self, given: str | None) -> str | None:
        tool = json.dumps(self.tool)
        return _PROMPT.format(given or DEFAULT_SYSTEM, tool) if self.dialect.prompted else given

    def question(self, question: str, images: Sequence[Image.Image]) -> Body:
        return _user("<image>" * len(images) + "\0", images, question)

    def fields(self, may_look: bool, forced: bool) -> Body:
        if self.options is not None:
            return {"tools": [self.tool], "extra_body": {"relook": self.options}}
        if self.dialect.prompted:
            return {}
        choice = {"type": "function", "function": {"name": ZOOM}} if forced else "auto" if may_look else "none"
        return {"tools": [self.tool], "tool_choice": choice}

    def read(self, reply: Reply, size: Size, sent: Size) -> list[Called]:
        calls = reply.calls
        if not calls:
            texts = [match.group().removeprefix("<tool_call>") for match in self.hidden.finditer(reply.text)]
            calls = [{"id": "", "name": ZOOM, "text": text.removesuffix("</tool_call>")} for text in texts]
        own = reply.own.get("looks", ())
        named = [look for look in own if look["crop"] is None and look["cells"] and look["problem"] is None]
        found = [self._read(call, size, sent) for call in calls]
        for each, look in zip(found, named, strict=False):  # relook's server also says which cells the model named
            each.cells = tuple(look["cells"]) if each.problem is None else None
            each.frame = tuple(look["frame"]) if look.get("frame") else None
        return found

    def _read(self, call: Mapping[str, str], size: Size, sent: Size) -> Called:
        said = call.get("text") or call.get("arguments") or ""
        try:
            values = json.loads(said)
            if "text" in call:
                call, values = {**call, "name": values["name"]}, values["arguments"]
            if call["name"] != ZOOM:
                return Called(problem=f"a call of {call['name'][:40]!r}; there is {ZOOM} only", id=call["id"])
            form, frame = self._form(size, sent)
            seen = read_box([float(value) for value in values["bbox_2d"]], frame, form)
            pixels = clamp_box(_rescaled(seen, frame, size), size)
            return Called("region", box_to_cells(pixels, size, self.grid), pixels, id=call["id"])
        except (UserError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            why = str(error) if isinstance(error, UserError) else 'expected {"bbox_2d": [x1, y1, x2, y2]}'
            return Called(problem=f"{said.strip()[:80]} is no region: {why}", id=call["id"])

    def _form(self, size: Size, sent: Size) -> tuple[str, Size]:
        """How boxes count, and the size of what they lie on: pixels are those of the image as it was sent."""
        form = self.dialect.boxes or "pixels"
        return form, size if BOX_FORMS[form].side else sent

    def call(self, called: Sequence[Called], size: Size, sent: Size) -> Body:
        calls = []
        for number, each in enumerate(called):
            each.id = each.id or f"call_look_{'_'.join(map(str, each.cells or ()))}_{number:x}"
            form, frame = self._form(size, sent)
            seen = clamp_box(_rescaled(each.box or (0, 0, *size), size, frame), frame)
            box = write_box(seen, frame, form, whole=True)
            calls.append({"id": each.id, "name": ZOOM, "arguments": json.dumps({"bbox_2d": box})})
        if not self.dialect.prompted:
            return self.said(Reply(calls=calls))
        texts = [f'<tool_call>\n{{"name": "{ZOOM}", "arguments": {call["arguments"]}}}\n</tool_call>' for call in calls]
        return {"role": "assistant", "content": "\n".join(texts)}

    def said(self, reply: Reply) -> Body:
        if not reply.calls:
            return {"role": "assistant", "content": reply.text}
        functions = [{"name": call["name"], "arguments": call["arguments"]} for call in reply.calls]
        calls = [
            {"id": call["id"], "type": "function", "function": function}
            for call, function in zip(reply.calls, functions, strict=True)
        ]
        return {"role": "assistant", "content": reply.text or None, "tool_calls": calls, **reply.kept}

    def results(self, called: Sequence[Called], crops: Sequence[Image.Image], untold: bool = False) -> list[Body]:
        """What each call gave; crops follow in a message of the user's. `untold`: nothing, and no crop is promised."""
        if self.dialect.prompted or not all(each.id for each in called):
            shown = "<tool_response>\n<image>\n</tool_response>" * len(crops)
            said = "\n".join(each.problem for each in called if each.problem)
            return [_user(shown + ("<tool_response>\n</tool_response>" if untold else "") + "\0", crops, said)]
        given = "" if untold else "the region is shown in the next message"
        told: list[Body] = [
            {"role": "tool", "tool_call_id": each.id, "content": each.problem or given} for each in called
        ]
        return [*told, _user("<image>" * len(crops), crops)] if crops else told


_PROMPT = """{}

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


class Views:
    """In place of a relook processor, for other models: how images are sent, and regions asked for.

    `own` is what relook's server says of its model.
    """

    system: str | None = None
    free_choice = True  # no sentence asks for a look
    region_of, region_margin, max_looks = "whole", 0, 1

    def __init__(self, dialect: Dialect, grid: int, own: Mapping[str, Any]):
        self.dialect, self.grid_size, self.looks = dialect, grid, list(own.get("looks", ["region"]))
        vars(self).update(own.get("regions", {}))

    def view(self, image: Image.Image, stage: str) -> Image.Image:
        """The image as it is sent."""
        side = self.dialect.side
        return View(self.dialect.longest_side).apply(image, side, partial(_multiples, side)) if side else image

    def first_size(self, size: Size) -> Size | None:
        """The size at which an image is sent; None where the server makes another of it."""
        side = self.dialect.side
        return _multiples(side, View(self.dialect.longest_side).target(size, side)) if side else None

    def to_json_string(self) -> str:
        return json.dumps({"dialect": vars(self.dialect), "grid_size": self.grid_size})


def _multiples(side: int, size: Size) -> Size:
    width, height = (max(side, round(length / side) * side) for length in size)
    return width, height


def _rescaled(box: Sequence[float], of: Size, to: Size) -> Sequence[float]:
    return box if of == to else [value * new / old for value, old, new in zip(box, of * 2, to * 2, strict=True)]


def _user(content: str, images: Sequence[Image.Image], question: str = "") -> Body:
    """A user's message: `content` has `<image>` for each image, and NUL for the question."""
    pieces = re.split(r"(<image>)", content)
    left = iter(images)
    parts = [
        {"type": "image_url", "image_url": {"url": _data_url(next(left))}}
        if piece == "<image>"
        else {"type": "text", "text": piece.replace("\0", question)}
        for piece in pieces
        if piece and (piece != "\0" or question)
    ]
    return {"role": "user", "content": parts or ""}  # templates take no empty list


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
