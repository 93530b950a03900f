"""Pure functions between token ids and tensors: where calls and image blocks are, how a batch is cut at its calls.

Everything here works on ids, masks and lengths; it refuses to know models, features and files. Legend for shapes:
B rows, L columns of the batch as given, S columns of one wave, N tokens of one image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from relook.errors import UserError

from .configuration import ReencodeIds


@dataclass(frozen=True)
class CallSite:
    """A written re-encoding call: `*_action_start` at (row, start), `*_action` at (row, start + 1).

    `order` counts the calls of its conversation from the left, over all looks; `conversation` is its number in the row
    (0 unless the row is packed, see `packed`).
    """

    look: str
    row: int
    start: int
    order: int
    conversation: int = 0


@dataclass(frozen=True)
class Block:
    """The image tokens of one re-encoded image: columns (N,) of `row`, conditioned by `call` (None: by nothing)."""

    look: str
    image: int
    row: int
    columns: Tensor
    call: CallSite | None


@dataclass(frozen=True)
class Wave:
    """One stretch of every row that can run through the language model at once.

    columns (B, S): column of the batch that each place takes (padding repeats column 0); real (B, S): which are tokens.
    """

    columns: Tensor
    real: Tensor


def find_calls(
    input_ids: Tensor, ids: Mapping[str, ReencodeIds], conversations: Tensor | None = None
) -> list[CallSite]:
    """All complete calls (start followed by its action token), left to right in each row.

    `conversations` (B, L) numbers the conversations of packed rows; None where each row holds one.

    Example: a row `... <|clip_action_start|> <|clip_action|> <|clip_action_end|> ...` with start at column 28 gives
    CallSite("clip", row, 28, 0).
    """
    found: list[tuple[int, int, str]] = []
    for look, token in ids.items():
        at = (input_ids[:, :-1] == token.start) & (input_ids[:, 1:] == token.action)
        found += [(row, column, look) for row, column in at.nonzero().tolist()]
    calls: list[CallSite] = []
    seen: Counter[tuple[int, int]] = Counter()
    for row, column, look in sorted(found):
        number = 0 if conversations is None else int(conversations[row, column])
        calls.append(CallSite(look, row, column, seen[row, number], number))
        seen[row, number] += 1
    return calls


def find_blocks(
    input_ids: Tensor,
    look: str,
    pad: int,
    lengths: Sequence[int],
    calls: Sequence[CallSite],
    conversations: Tensor | None = None,
) -> list[Block]:
    """Cut the pads of one look into images, row-major, and give each the call it answers.

    A block is conditioned by the latest call of its kind to its left in its conversation, if there is one.

    Raises:
        UserError: tokens and features disagree in number, or an image would straddle two rows.
    """
    places = (input_ids == pad).nonzero()  # (total, 2) row-major
    if len(places) != sum(lengths):
        raise UserError(
            f"{look}: the text holds {len(places)} image tokens but the images make {sum(lengths)} features "
            f"({len(lengths)} images); give each placeholder exactly one image"
        )
    blocks = []
    for image, part in enumerate(places.split(list(lengths))):
        row = int(part[0, 0])
        if int(part[-1, 0]) != row:
            raise UserError(f"{look}: image {image} would straddle rows {row} and {int(part[-1, 0])} of the batch")
        column = int(part[0, 1])
        number = 0 if conversations is None else int(conversations[row, column])
        before = [c for c in calls if (c.look, c.row, c.conversation) == (look, row, number) and c.start < column]
        blocks.append(Block(look, image, row, part[:, 1], before[-1] if before else None))
    return blocks


def cut_into_waves(
    mask: Tensor, calls: Sequence[CallSite], conversations: Tensor | None = None, depth: int | None = None
) -> list[Wave]:
    """Cut every row right before the action token of each call; wave w holds stretch w of all rows, right-padded.

    The hidden state that conditions call w of a row is then in wave w, and everything that depends on it (the action
    token's embedding, the second look) lies in later waves. The last stretch of every row is in the last wave, so rows
    without a call only run there. Padding columns of the batch are in no wave. The conversations of a packed row are
    cut each by itself; wave w holds stretch w of all of them. There are `depth` + 1 waves: as many as the calls need,
    unless told; then those before the last hold nothing in excess of that.

    Example: mask of ones (2, 10); a call starting at column 3 of row 0 gives waves
    [row 0: 0..3, row 1: nothing], [row 0: 4..9, row 1: 0..9].
    """
    depth = max((c.order + 1 for c in calls), default=0) if depth is None else depth
    rows: list[list[list[int]]] = []
    for row, pieces in enumerate(_pieces(mask, conversations)):
        stretches: list[list[int]] = [[] for _ in range(depth + 1)]
        for number, columns in pieces.items():
            begin = 0
            for wave, cut in enumerate(c.start + 1 for c in calls if (c.row, c.conversation) == (row, number)):
                end = next((i for i, c in enumerate(columns) if c >= cut), len(columns))
                stretches[wave] += columns[begin:end]
                begin = end
            stretches[depth] += columns[begin:]
        rows.append(stretches)
    return [_wave([stretches[w] for stretches in rows], mask.device) for w in range(depth + 1)]


def prefixes(mask: Tensor, calls: Sequence[CallSite], order: int, conversations: Tensor | None = None) -> Wave:
    """All that stands before the conditions of the calls numbered `order`: their conversations, up to the call's start.

    Example: as above, `order` 0 gives [row 0: 0..3, row 1: nothing].
    """
    ends = {(c.row, c.conversation): c.start for c in calls if c.order == order}
    rows = [
        [c for number, columns in pieces.items() for c in columns if c <= ends.get((row, number), -1)]
        for row, pieces in enumerate(_pieces(mask, conversations))
    ]
    return _wave(rows, mask.device)


def _pieces(mask: Tensor, conversations: Tensor | None) -> list[dict[int, list[int]]]:
    """For each row: the number of each conversation and its columns (padding apart), from the left."""
    numbers = torch.zeros_like(mask, dtype=torch.long) if conversations is None else conversations
    rows: list[dict[int, list[int]]] = []
    for real, row in zip(mask.bool().tolist(), numbers.tolist(), strict=True):
        pieces: dict[int, list[int]] = {}
        for column, (is_real, number) in enumerate(zip(real, row, strict=True)):
            if is_real:
                pieces.setdefault(number, []).append(column)
        rows.append(pieces)
    return rows


def _wave(stretches: list[list[int]], device: torch.device) -> Wave:
    width = max(1, max(map(len, stretches)))
    columns = torch.tensor([s + [0] * (width - len(s)) for s in stretches], device=device)
    lengths = torch.tensor([len(s) for s in stretches], device=device)
    return Wave(columns, torch.arange(width, device=device) < lengths[:, None])


def take(x: Tensor, columns: Tensor) -> Tensor:
    """x (B, L, d) at columns (B, S) -> (B, S, d)."""
    return x.gather(1, columns.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def put(x: Tensor, row: int, columns: Tensor, values: Tensor) -> Tensor:
    """x (B, L, d) with x[row, columns] replaced by values (N, d); a new tensor, so gradients reach both."""
    rows = torch.full_like(columns, row)
    return x.index_put((rows, columns), values.to(x.dtype))


def same_images(pixels: Tensor, grids: Tensor, others: Tensor, other_grids: Tensor) -> list[int | None]:
    """For each image, the first of the others with the same pixels, None where there is none.

    Args:
        pixels, others: (patches, p), image after image; grids, other_grids: (k, 3) their patches as t, h, w.
    """
    ours, theirs = (
        list(zip(x.split(g.prod(-1).tolist()), g.tolist(), strict=True))
        for x, g in ((pixels, grids), (others, other_grids))
    )
    return [
        next((i for i, (other, size) in enumerate(theirs) if size == grid and torch.equal(image, other)), None)
        for image, grid in ours
    ]


def paragraph_mask(input_ids: Tensor, start_id: int, end_id: int, paragraphs: Sequence[int]) -> Tensor:
    """(B, L) bool: columns strictly between the `<|im_start|>` and `<|im_end|>` of the numbered turns (system = 0)."""
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row in range(input_ids.shape[0]):
        starts = (input_ids[row] == start_id).nonzero().flatten().tolist()
        ends = (input_ids[row] == end_id).nonzero().flatten().tolist()
        for number in paragraphs:
            if number < min(len(starts), len(ends)):
                mask[row, starts[number] + 1 : ends[number]] = True
    return mask
