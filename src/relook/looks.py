"""The vocabulary: one table of looks, and the reading and writing of the calls that ask for them.

A look is a function call written in tokens:

    <|region_token_start|><|x_1|><|y_2|><|x_3|><|y_4|><|region_token_end|>
    <|clip_action_start|><|clip_action|><|clip_action_end|>

Tokens are strings here. A further look is one more row of `LOOKS`.

Reading never raises: whatever a model wrote, malformed or cut off, comes out as a `Call` whose `problem` says what is
wrong with it. Writing does raise `UserError`, since there the caller chose the arguments.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from relook.errors import UserError
from relook.regions import GRID, Cells, check_cells

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
DEFAULT_SYSTEM = "You are a helpful assistant."
ANSWER_PREFIX = "Now answer the question.\n"  # opens many answers of the published data

_TRIGGER_REGION = "Identify the region that can help you answer the question, and then answer the question."
_TRIGGER_REENCODE = "Require additional perception features, and then answer the question."


@dataclass(frozen=True)
class LookSpec:
    """One row of the look table: how a look is asked for, and how its result enters the conversation.

    name          region | clip | detection | seg (clip: the model's own vision encoder, detection: DINOv2, seg: SAM)
    start, end    control tokens around the call
    action        the control token between them, whose input embedding is replaced by a hidden state; None: the call
                  holds cell coordinates instead
    pad           token repeated once per vision token of the new view
    placeholder   what stands for one such view in a turn's text
    item_key      where the published JSON items list this look's images
    trigger       the published sentence that asks a model to look this way
    fixed_tokens  vision tokens per view, None when it depends on the view's size
    encoder       the published name in `vision_encoder_ls`, None when nothing is re-encoded
    extent        which part of the view its tokens lie over: whole | centre | padded (`regions.token_area`)
    """

    name: str
    start: str
    action: str | None
    end: str
    pad: str
    placeholder: str
    item_key: str
    trigger: str
    fixed_tokens: int | None
    encoder: str | None
    extent: str = "whole"

    @property
    def reencodes(self) -> bool:
        """True when the whole view is encoded again under a control token; False when a region is cut out."""
        return self.action is not None


def _reencoding(name: str, encoder: str, fixed_tokens: int | None = None, extent: str = "whole") -> LookSpec:
    return LookSpec(
        name=name,
        start=f"<|{name}_action_start|>",
        action=f"<|{name}_action|>",
        end=f"<|{name}_action_end|>",
        pad=f"<|{name}_image_pad|>",
        placeholder=f"<{name}_image>",
        item_key=f"{name}_images",
        trigger=_TRIGGER_REENCODE,
        fixed_tokens=fixed_tokens,
        encoder=encoder,
        extent=extent,
    )


LOOKS: dict[str, LookSpec] = {
    spec.name: spec
    for spec in (
        LookSpec(
            name="region",
            start="<|region_token_start|>",
            action=None,
            end="<|region_token_end|>",
            pad=IMAGE_PAD,
            placeholder="<image>",
            item_key="images",
            trigger=_TRIGGER_REGION,
            fixed_tokens=None,
            encoder=None,
        ),
        _reencoding("clip", encoder="clip"),
        _reencoding("detection", encoder="dino", fixed_tokens=256, extent="centre"),
        _reencoding("seg", encoder="sam", fixed_tokens=256, extent="padded"),
    )
}

_BY_START = {spec.start: spec for spec in LOOKS.values()}
_BY_END = {spec.end: spec for spec in LOOKS.values()}
_BY_ACTION = {spec.action: spec for spec in LOOKS.values() if spec.action is not None}


def x_token(i: int) -> str:
    """Token of grid column `i`, counted from the left, from 0."""
    return f"<|x_{i}|>"


def y_token(i: int) -> str:
    """Token of grid row `i`, counted from the top, from 0."""
    return f"<|y_{i}|>"


def look_spec(name: str) -> LookSpec:
    """The row of the table called `name`. Raises UserError naming the looks there are."""
    if name not in LOOKS:
        raise UserError(f"unknown look {name!r}: expected one of {', '.join(LOOKS)}")
    return LOOKS[name]


def control_tokens(looks: Iterable[str], grid: int = GRID) -> tuple[list[str], list[str]]:
    """(special pad tokens, ordinary tokens) that a tokenizer needs for `looks`, in the order in which ids are given.

    For ("region", "clip") that is the order of the published tokenizers after Qwen2-VL's own 151657 tokens: the pad,
    then region start, region end, x_0.., y_0.., then clip start, action, end. The order of `looks` does not matter.
    """
    chosen = {look_spec(name).name for name in looks}
    specs = [spec for spec in LOOKS.values() if spec.name in chosen]
    pads = [spec.pad for spec in specs if spec.reencodes]
    ordinary: list[str] = []
    for spec in specs:
        if spec.action is None:
            coordinates = [token(i) for token in (x_token, y_token) for i in range(grid)]
            ordinary += [spec.start, spec.end, *coordinates]
        else:
            ordinary += [spec.start, spec.action, spec.end]
    return pads, ordinary


@dataclass(frozen=True)
class Call:
    """One call as read from what a model wrote.

    look      name of the look it asks for
    cells     (x0, y0, x1, y1) grid cells, both ends inclusive; set exactly for a well-formed region call
    problem   None for a well-formed call, else what is wrong with it, for people
    span      [start, end) of the call: characters for `parse_calls`, token positions for `parse_tokens`
    """

    look: str
    cells: Cells | None
    problem: str | None
    span: tuple[int, int]


def parse_calls(text: str, grid: int = GRID) -> list[Call]:
    """All calls in `text`, in order; well formed or not. Never raises; [] when nothing in it looks like a call.

    >>> text = "<|region_token_start|><|x_3|><|y_4|><|x_1|><|y_2|><|region_token_end|>"
    >>> parse_calls(text)
    [Call(look='region', cells=(1, 2, 3, 4), problem=None, span=(0, 70))]
    >>> parse_calls("<|clip_action_start|><|clip_action|>")[0].problem
    'cut off: <|clip_action_end|> is missing'
    """
    return list(_calls(_text_pieces(text), grid))


def parse_tokens(tokens: Sequence[str], grid: int = GRID) -> list[Call]:
    """As `parse_calls`, over a sequence of token strings; spans are positions in it."""
    return list(_calls(((token, i, i + 1) for i, token in enumerate(tokens)), grid))


def strip_calls(text: str, grid: int = GRID) -> str:
    """`text` without its calls, well formed or not, and without the blank space that this leaves at the ends."""
    kept, at = [], 0
    for call in parse_calls(text, grid):
        kept.append(text[at : call.span[0]])
        at = call.span[1]
    return "".join([*kept, text[at:]]).strip()


def without_triggers(text: str) -> str:
    """`text` without the published sentences that ask for a look, each with the blank before it.

    >>> without_triggers("What is it? Require additional perception features, and then answer the question.")
    'What is it?'
    """
    for trigger in dict.fromkeys(spec.trigger for spec in LOOKS.values()):
        text = text.replace(f" {trigger}", "").replace(trigger, "")
    return text


def with_trigger(question: str, look: str, looks: Collection[str]) -> str:
    """The question as a model with `looks` was trained to be asked for one; without looks, as a plain question.

    "auto": the sentence of the look to take is not known, so the first look's is given. A question that holds one of
    the sentences (published ones do) keeps it then, and loses it where another or none belongs.
    """
    plain = without_triggers(question).strip() or question
    if look == "auto" and looks:
        if plain != question:
            return question
        look = next(iter(looks))
    return f"{plain} {LOOKS[look].trigger}" if looks and look in LOOKS else plain


def write_call(look: str, cells: Cells | None = None, grid: int = GRID) -> str:
    """The call for `look` as text: `cells` for a region (published order x0 y0 x1 y1), none for the others.

    Raises UserError for an unknown look, cells that a look does not take or needs, and cells outside the grid.
    """
    spec = look_spec(look)
    if spec.action is not None:
        if cells is not None:
            raise UserError(f"a {look} look takes no cells, got {cells}: leave them out, or ask for a region look")
        return spec.start + spec.action + spec.end
    if cells is None:
        raise UserError(f"a {look} look needs cells (x0, y0, x1, y1), got none")
    x0, y0, x1, y1 = check_cells(cells, grid)
    return "".join([spec.start, x_token(x0), y_token(y0), x_token(x1), y_token(y1), spec.end])


def look_turn(calls: Sequence[Call]) -> str:
    """Content of the user turn that brings the results of `calls`; calls with a problem bring nothing.

    One region: ``<image>``. Several: ``Region 0: <image>\\nRegion 1: <image>\\n`` (the published form, with its last
    newline). Re-encoding: ``<clip_image>``. Mixtures: a line for each, regions together, looks in order of first call.
    """
    wanted = [call for call in calls if call.problem is None]
    parts: dict[str, list[str]] = {}
    for call in wanted:
        parts.setdefault(call.look, []).append(LOOKS[call.look].placeholder)
    for look, views in parts.items():
        if not LOOKS[look].reencodes and len(views) > 1:
            parts[look] = [f"Region {i}: {view}" for i, view in enumerate(views)]
    lines = [line for views in parts.values() for line in views]
    only_regions = len(parts) == 1 and len(lines) > 1 and not LOOKS[wanted[0].look].reencodes
    return "\n".join(lines) + ("\n" if only_regions else "")


def allowed_next(tokens: Sequence[str], looks: Collection[str], grid: int = GRID) -> frozenset[str] | None:
    """Tokens that keep the call being written well formed; None when nothing is being written (any token will do).

    tokens   what the model wrote in this turn so far
    looks    names of the looks the model has: only these may be started after a finished call

    After a region's start: x, y, x, y, end (the published order, though any is read). After a re-encoding start: its
    action, then its end. After an end: another call, or the end of the turn; a re-encoding look is not asked for twice
    in one turn, since its view is the whole image both times. A call that is already malformed (written while nothing
    constrained it) may only be closed.

    >>> sorted(allowed_next(["<|clip_action_start|>"], {"clip"}))
    ['<|clip_action|>']
    """
    if tokens and tokens[-1] in _BY_END:
        started = {_BY_START[token].name for token in tokens if token in _BY_START}
        again = [LOOKS[n].start for n in LOOKS if n in looks and not (LOOKS[n].reencodes and n in started)]
        return frozenset([IM_END, *again])
    for back in range(len(tokens) - 1, -1, -1):
        token = tokens[back]
        if token in _BY_END or token == IM_END:
            return None
        if token in _BY_START:
            return _expected(_BY_START[token], tokens[back + 1 :], grid)
    return None


def _expected(spec: LookSpec, written: Sequence[str], grid: int) -> frozenset[str]:
    """Tokens that may follow `written` inside an open call of `spec`."""
    if spec.action is not None:
        slots = [frozenset([spec.action])]
    else:
        slots = [frozenset(token(i) for i in range(grid)) for token in (x_token, y_token)] * 2
    on_track = len(written) < len(slots) and all(token in slot for token, slot in zip(written, slots, strict=False))
    return slots[len(written)] if on_track else frozenset([spec.end])


_TOKEN = re.compile(r"<\|[^<>|\s]*\|>")
_COORDINATE = re.compile(r"<\|[xy]_[^<>|\s]*\|>")
_BLANKS = (
    " \t\r\n\u0120\u010a"  # decoders put blanks between tokens; Ġ and Ċ are the byte-level spelling of two of them
)

_Piece = tuple[str, int, int]  # string, [start, end)


def _text_pieces(text: str) -> list[_Piece]:
    """`text` cut into tokens of the form ``<|...|>`` and the plain text between them."""
    pieces, at = [], 0
    for match in _TOKEN.finditer(text):
        if match.start() > at:
            pieces.append((text[at : match.start()], at, match.start()))
        pieces.append((match.group(), match.start(), match.end()))
        at = match.end()
    if at < len(text):
        pieces.append((text[at:], at, len(text)))
    return pieces


def _calls(pieces: Iterable[_Piece], grid: int) -> Iterator[Call]:
    """Read `pieces` into calls. A call opens at a start token, or at a coordinate, action or end token without one."""
    call: list[_Piece] = []
    for piece in pieces:
        token = piece[0]
        if call and (token in _BY_START or token == IM_END):
            yield _read(call, grid)
            call = []
        if token in _BY_END:
            yield _read([*call, piece], grid)
            call = []
        elif _of_a_call(token) or (call and token != IM_END and token.strip(_BLANKS)):
            call.append(piece)
    if call:
        yield _read(call, grid)


def _of_a_call(token: str) -> bool:
    return token in _BY_START or token in _BY_END or token in _BY_ACTION or _COORDINATE.fullmatch(token) is not None


def _read(pieces: list[_Piece], grid: int) -> Call:
    """One call: its start token (or none), coordinates, actions and strays, its end token (or none)."""
    while not _of_a_call(pieces[-1][0]):  # text after a call that was never ended may be the answer's
        pieces.pop()
    tokens = [token for token, _, _ in pieces]
    opener, closer = _BY_START.get(tokens[0]), _BY_END.get(tokens[-1])
    inner = tokens[opener is not None : len(tokens) - (closer is not None)]
    columns, rows = ({token(i): i for i in range(grid)} for token in (x_token, y_token))
    xs, ys = ([axis[token] for token in inner if token in axis] for axis in (columns, rows))
    actions = [token for token in inner if token in _BY_ACTION]
    off_grid = [t for t in inner if _COORDINATE.fullmatch(t) and t not in columns and t not in rows]
    spec = opener or (_BY_ACTION.get(inner[0], LOOKS["region"]) if inner else closer) or LOOKS["region"]

    problems = [] if closer else [f"cut off: {spec.end} is missing"]
    problems += [] if opener else ["its start token is missing"]
    problems += [f"{token} is not on the grid of {grid} x {grid} cells" for token in off_grid]
    if closer is not None and closer.name != spec.name:
        problems.append(f"a {spec.name} call that ends in {closer.end}")
    problems += [f"{_short(t)} does not belong inside a call" for t in inner if not _of_a_call(t)][:1]
    if spec.action is None:
        problems += [f"{token} does not belong in a region call" for token in actions]
    elif xs or ys:
        problems.append(f"a {spec.name} call takes no cells")
    elif others := [action for action in actions if action != spec.action]:
        problems.append(f"a {spec.name} call that holds {others[0]}")
    elif len(actions) > 1:
        problems.append(f"{spec.action} stands in it {len(actions)} times")
    if closer and spec.action is None and not (xs and ys) and not off_grid:
        missing = "no cells" if not (xs or ys) else "no row (y)" if xs else "no column (x)"
        problems.append(f"the region names {missing}")
    if closer and spec.action is not None and not actions:
        problems.append(f"{spec.action} is missing")
    cells = (min(xs), min(ys), max(xs), max(ys)) if spec.action is None and not problems else None
    return Call(spec.name, cells, "; ".join(problems) or None, (pieces[0][1], pieces[-1][2]))


def _short(text: str, limit: int = 40) -> str:
    text = text.strip(_BLANKS)
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")
