"""What stands in one cell of a table, as other programs write it."""

from __future__ import annotations

import ast
import json
import re
from typing import Any


def cell(text: str) -> Any:
    """A cell of a table: its text, or the list of texts or the struct that somebody's program wrote as text.

    Raises ValueError or the like where it is none; numpy's lists are without commas.
    """
    if not re.match(r"""\s*(\[\s*["']|\{\s*["']\w+["']\s*:)""", text) or text.rstrip()[-1] not in "]}":
        return text
    try:
        return json.loads(text)
    except ValueError:
        if re.search(r"""["']\s+["']""", text):
            raise
        return ast.literal_eval(text)
