"""Pure functions between token ids and tensors: where calls and image blocks are, how a batch is cut at its calls.

Everything here works on ids, masks and lengths; it refuses to know models, features and files. Legend for shapes:
B rows, L columns of the batch as given, S columns of one wave, N tokens of one image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from relook.errors import UserError

from .configuration import ReencodeIds


@dataclass(frozen=True)
class CallSite:
    """A written re-encoding call: `*_action_start` at (row, start), `*_action` at (row, start + 1).

    `order` counts the calls of its row from the left, over all looks.
    """

    look: str
    row: int
    start: int
    order: int


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


def find_calls(input_ids: Tensor, ids: Mapping[str, ReencodeIds]) -> list[CallSite]:
    """All complete calls (start followed by its action token), left to right in each row.

    Example: a row `... <|clip_action_start|> <|clip_action|> <|clip_action_end|> ...` with start at column 28 gives
    CallSite("clip", row, 28, 0).
    """
    found: list[tuple[int, int, str]] = []
    for look, token in ids.items():
        at = (input_ids[:, :-1] == token.start) & (input_ids[:, 1:] == token.action)
        found += [(row, column, look) for row, column in at.nonzero().tolist()]
    calls, seen = [], dict.fromkeys(range(input_ids.shape[0]), 0)
    for row, column, look in sorted(found):
        calls.append(CallSite(look, row, column, seen[row]))
        seen[row] += 1
    return calls


def find_blocks(
    input_ids: Tensor, look: str, pad: int, lengths: Sequence[int], calls: Sequence[CallSite]
) -> list[Block]:
    """Cut the pads of one look into images, row-major, and give each the call it answers.

    A block is conditioned by the latest call of its kind to its left in its row, if there is one.

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
        before = [c for c in calls if c.look == look and c.row == row and c.start < int(part[0, 1])]
        blocks.append(Block(look, image, row, part[:, 1], before[-1] if before else None))
    return blocks


def cut_into_waves(mask: Tensor, calls: Sequence[CallSite]) -> list[Wave]:
    """Cut every row right before the action token of each call; wave w holds stretch w of all rows, right-padded.

    The hidden state that conditions call w of a row is then the last one of its stretch in wave w, and everything that
    depends on it (the action token's embedding, the second look) lies in later waves. The last stretch of every row is
    in the last wave, so rows without a call only run there. Padding columns of the batch are in no wave.

    Example: mask of ones (2, 10); a call starting at column 3 of row 0 gives waves
    [row 0: 0..3, row 1: nothing], [row 0: 4..9, row 1: 0..9].
    """
    rows: list[list[list[int]]] = []
    depth = max((c.order + 1 for c in calls), default=0)
    for row, real in enumerate(mask.bool().tolist()):
        columns = [c for c, is_real in enumerate(real) if is_real]
        cuts = [c.start + 1 for c in calls if c.row == row]
        stretches, begin = [], 0
        for cut in cuts:
            end = next((i for i, c in enumerate(columns) if c >= cut), len(columns))
            stretches.append(columns[begin:end])
            begin = end
        rows.append(stretches + [[]] * (depth - len(stretches)) + [columns[begin:]])
    return [_wave([stretches[w] for stretches in rows], mask.device) for w in range(depth + 1)]


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
