"""Region looks as calls of the client's tool: `image_zoom_in_tool` with `bbox_2d`, as Qwen-Agent and DeepEyes have it.

Boxes are always of the original image, in the units that the tool's description states. A call's id carries the grid
cells that the model named, so that its answer finds back to exactly these.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any

from relook.boxes import BOX_FORMS, read_box, write_box
from relook.errors import UserError
from relook.regions import Box, Cells, box_to_cells, check_cells
from relook.serve.types import BadField, ChatRequest, ToolCall, ToolFunction

ZOOM = "image_zoom_in_tool"
_ID = re.compile(r"call_look_(\d+)_(\d+)_(\d+)_(\d+)_[0-9a-f]+")


class ZoomTool:
    """The client's tool that takes region looks.

    Args:
        function: as the client describes it; None where it does not (a conversation that goes on without tools).
        form: how it counts boxes, a name of `BOX_FORMS`; None: as the description says, else pixels.
    """

    def __init__(self, function: ToolFunction | None = None, form: str | None = None):
        parameters = function.parameters if function and function.parameters else {}
        properties = parameters.get("properties")
        self.properties: dict[str, Any] = properties if isinstance(properties, dict) else {"bbox_2d": {}}
        box = self.properties.get("bbox_2d")
        if not isinstance(box, dict):
            raise BadField("tools", f"{ZOOM} has no parameter bbox_2d, by which relook names a region; add it")
        required = parameters.get("required") or []
        if unknown := [name for name in required if name not in ("bbox_2d", "label", "img_idx")]:
            raise BadField("tools", f"{ZOOM} requires {unknown[0]!r}, which relook does not fill; make it optional")
        items = box.get("items")
        self.whole = isinstance(items, dict) and items.get("type") == "integer"
        said = f"{str(function.description)[:4000] if function else ''} {str(box.get('description'))[:4000]}"
        found = (name for name, row in BOX_FORMS.items() if row.said and re.search(row.said, said, re.IGNORECASE))
        self.form = form or next(found, "pixels")

    @classmethod
    def of(cls, body: ChatRequest) -> tuple[ZoomTool | None, list[str]]:
        """The tool among those of a request (None: it is not there, or may not be called), and warnings."""
        functions = [tool.function for tool in body.tools or []]
        zoom = next((function for function in functions if function.name == ZOOM), None)
        others = [function.name for function in functions if function.name != ZOOM]
        choice = body.tool_choice
        if isinstance(choice, dict):
            function = choice.get("function")
            choice = "required" if isinstance(function, dict) and function.get("name") == ZOOM else "unknown"
        if choice not in (None, "auto", "none", "required") or (choice == "required" and zoom is None):
            raise BadField("tool_choice", f"tool_choice={str(body.tool_choice)[:80]}: the model can call {ZOOM} only")
        said = [f"tools that this model never calls: {', '.join(others)}"] if others and choice != "none" else []
        if zoom is None or choice == "none":
            return None, said
        return cls(zoom, body.relook.boxes if body.relook else None), said

    def call(self, cells: Cells, box: Box, image: int, size: tuple[int, int]) -> dict[str, Any]:
        """A tool call, in OpenAI's shape.

        Args:
            cells: as the model named them.
            box: what relook itself would crop, pixels of the original image.
            image: its number among the user's images.
            size: (width, height) of that image.
        """
        values = {"bbox_2d": write_box(box, size, self.form, whole=self.whole), "label": "region", "img_idx": image}
        arguments = {name: value for name, value in values.items() if name in self.properties}
        name = "_".join(map(str, ("call_look", *cells, uuid.uuid4().hex[:12])))
        return {"id": name, "type": "function", "function": {"name": ZOOM, "arguments": json.dumps(arguments)}}

    def region(
        self, call: ToolCall, sizes: Sequence[tuple[int, int]], image: int, grid: int
    ) -> tuple[Cells | None, tuple[float, ...] | None, int]:
        """The cells or the box (pixels) of a call in the history, and the number of the image that it is about.

        Args:
            call: one of `call`, or another server's or client's.
            sizes: of the user's images.
            image: the one that is meant where the call does not say.
            grid: cells per side.
        """
        try:
            arguments = json.loads(call.function.arguments or "{}")
            image = arguments.get("img_idx", image)
            if not isinstance(image, int) or not -1 < image < len(sizes):
                raise UserError(f"img_idx={image} names no image; the user has sent {len(sizes)}, counted from 0")
            if ours := _ID.fullmatch(call.id):
                return check_cells(tuple(map(int, ours.groups())), grid), None, image
            box = read_box([float(value) for value in arguments["bbox_2d"]], sizes[image], self.form)
            box_to_cells(box, sizes[image], grid)  # refuses what is no box
            return None, tuple(box), image
        except UserError as error:
            raise UserError(f"tool call {call.id[:60]!r}: {error}") from None
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            seen = call.function.arguments[:80]
            raise UserError(
                f"tool call {call.id[:60]!r}: arguments {seen} are not understood; expected "
                '{"bbox_2d": [x1, y1, x2, y2]}'
            ) from None
