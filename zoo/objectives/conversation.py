"""Conversations about synthetic pages: read a crop, locate what is asked, and whole dialogues with a second look.

All are one class with different mixes of the same kinds of conversation (the table `KINDS`), so that what is learnt in
parts is learnt in the very words of the whole. `locate` adds an auxiliary head on an inner layer that predicts, for
every image token, whether it lies in what is asked and in which row and column it stands (the vision encoder has
relative positions only; without it, locating is learnt slowly).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from relook.data.collate import IGNORED
from relook.io import rng
from relook.looks import LOOKS, look_turn, parse_calls, write_call, x_token, y_token
from relook.regions import Cells, box_to_cells, cells_to_box, union, widen
from relook.train.instruct import Conversations
from relook.train.objective import AuxiliaryHeads, Setup
from zoo.objectives.pages import PageObjective, coverage, merge_order, patch_grid
from zoo.worlds import QA, Box, Page

# An item in the published format (images in memory), and the page pixels that each of its "images" shows.
Conversation = tuple[dict[str, Any], list[Box]]

SIGHTS = 8  # most image tokens that tell one written token


def turns(
    processor: Any, question: str, replies: Sequence[tuple[str, str]], images: Sequence[Any], **looks: Any
) -> dict[str, Any]:
    """An item: the question, then alternately what the assistant writes and what the next user turn says.

    `replies` are pairs (assistant, next user turn); the last pair's user turn is not used.
    """
    messages = [{"role": "user", "content": processor.first_turn(question)}]
    for i, (assistant, user) in enumerate(replies):
        messages.append({"role": "assistant", "content": assistant})
        if i + 1 < len(replies):
            messages.append({"role": "user", "content": user})
    return {"messages": messages, "images": list(images), **looks}


def shaken(cells: Cells, random: np.random.Generator, chance: float, grid: int) -> Cells:
    """Cells as a model might have put them: each edge off by one cell with probability `chance`, never empty."""
    x0, y0, x1, y1 = (
        int(np.clip(v + (int(random.integers(0, 2)) * 2 - 1 if random.random() < chance else 0), 0, grid - 1))
        for v in cells
    )
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


class Teller:
    """Makes the conversations of a page; one method per row of `KINDS`."""

    def __init__(self, processor: Any, jitter: float) -> None:
        self.processor, self.jitter = processor, jitter

    def ask(self, qa: QA, look: str) -> str:
        """The question, with the published sentence that asks for the look unless the model chooses freely."""
        return qa.question if self.processor.free_choice else f"{qa.question} {LOOKS[look].trigger}"

    def shown(self, page: Page, qa: QA, taught: Cells, random: np.random.Generator) -> Cells:
        """The cells that are shown, given those that are taught."""
        return taught

    def crop(self, page: Page, cells: Cells, random: np.random.Generator) -> Box:
        """What the model is shown for these cells: shaken a little, widened by the margin. Page pixels."""
        grid = self.processor.grid_size
        near = shaken(cells, random, self.jitter, grid)
        return cells_to_box(widen(near, self.processor.region_margin, grid), page.image.size, grid)

    def cells(self, page: Page, qa: QA) -> Cells:
        return box_to_cells(union(qa.boxes), page.image.size, self.processor.grid_size)

    def read(self, page: Page, qa: QA, random: np.random.Generator) -> Conversation:
        """A region look without its first look: the crop is the only image. Only the answer can be learnt from it."""
        item, windows = self.region(page, qa, random)
        item["messages"][0]["content"] = self.ask(qa, "region")
        return {**item, "images": item["images"][1:]}, windows[1:]

    def locate(self, page: Page, qa: QA, random: np.random.Generator) -> Conversation:
        """The page, and the call for the region: the first half of a region look."""
        call = write_call("region", self.cells(page, qa), self.processor.grid_size)
        return turns(self.processor, self.ask(qa, "region"), [(call, "")], [page.image]), [whole(page)]

    def region(self, page: Page, qa: QA, random: np.random.Generator) -> Conversation:
        grid, cells = self.processor.grid_size, self.cells(page, qa)
        call, box = write_call("region", cells, grid), self.crop(page, self.shown(page, qa, cells, random), random)
        replies = [(call, look_turn(parse_calls(call, grid))), (qa.answer, "")]
        images = [page.image, (page.image, box)]
        return turns(self.processor, self.ask(qa, "region"), replies, images), [whole(page), box]

    def clip(self, page: Page, qa: QA, random: np.random.Generator) -> Conversation:
        call = write_call("clip")
        replies = [(call, look_turn(parse_calls(call))), (qa.answer, "")]
        item = turns(self.processor, self.ask(qa, "clip"), replies, [page.image], clip_images=[page.image])
        return item, [whole(page)]

    def direct(self, page: Page, qa: QA, random: np.random.Generator) -> Conversation:
        return turns(self.processor, qa.question, [(qa.answer, "")], [page.image]), [whole(page)]


# kind of conversation -> its formatter
KINDS: dict[str, Callable[[Any, Page, QA, np.random.Generator], Conversation]] = {
    "read": Teller.read,
    "locate": Teller.locate,
    "region": Teller.region,
    "clip": Teller.clip,
    "direct": Teller.direct,
}


def _known_shares(mix: dict[str, float]) -> dict[str, float]:
    if not mix.keys() <= KINDS.keys() or min(mix.values(), default=0.0) < 0 or sum(mix.values()) <= 0:
        raise ValueError(f"expected shares, none below 0 and one above, of {', '.join(KINDS)}")
    return mix


Mix = Annotated[dict[str, float], AfterValidator(_known_shares)]


def _padded_sights(pairs: Sequence[tuple[int, list[int]]]) -> Tensor:
    rows = [[at, *seen[:SIGHTS], *[-1] * (SIGHTS - len(seen))] for at, seen in pairs if seen]
    return torch.tensor(rows, dtype=torch.long).view(-1, 1 + SIGHTS)


def _first(value: Any) -> Any:
    """The first of a tuple, or the value itself; None for an empty tuple."""
    return (value[0] if value else None) if isinstance(value, tuple) else value


def answer_order(page: Page, qa: QA) -> list[Box]:
    """Boxes of the glyphs inside the asked boxes, in reading order (by lines, then from the left).

    Empty where they do not spell the answer (as when it is worded otherwise than it is printed).
    """
    inside = [g for g in page.glyphs for box in qa.boxes if coverage([box], g.box, (1, 1))[0, 0] > 0.5]
    heights = [g.box[3] - g.box[1] for g in inside] or [1]
    line = max(heights) / 2
    inside.sort(key=lambda g: (round(g.box[3] / line) // 2, g.box[0]))
    spelt = "".join(g.char for g in inside)
    return [g.box for g in inside] if spelt == "".join(qa.answer.split()) else []


def numbered(boxes: Sequence[Box], window: Box, grid: tuple[int, int], legible: bool) -> np.ndarray:
    """(rows, columns): number of the box, from 1, whose centre lies in the patch, else 0; all -1 if not legible."""
    rows, columns = grid
    x1, y1, x2, y2 = window
    out = np.full(grid, 0 if legible else -1, dtype=np.int64)
    for i, (a, b, c, d) in enumerate(boxes if legible else ()):
        column, row = ((a + c) / 2 - x1) / (x2 - x1) * columns, ((b + d) / 2 - y1) / (y2 - y1) * rows
        if 0 <= column < columns and 0 <= row < rows:
            out[int(row), int(column)] = i + 1
    return out


def whole(page: Page) -> Box:
    return (0, 0, page.image.width, page.image.height)


class PageConversations(PageObjective, Conversations):
    """Next-token loss on conversations about pages, of one kind per batch (rows of a kind are alike in length)."""

    class Options(Conversations.Options):
        mix: Mix = {"region": 1.0}  # kind -> share of the batches
        jitter: float = Field(0.1, ge=0, le=1)  # chance that an edge of a shown crop is a cell off
        place: float = Field(
            0.0, ge=0
        )  # weight of the auxiliary heads: asked or not, row and column of every image token
        place_layer: int = 2  # it reads the hidden states after this many layers
        spell: int = 16  # how many of the answer's glyphs the head also numbers, patch by patch; 0: none
        places: int = 32  # most rows or columns of merged tokens an image may have under the head
        heed: int = 0  # layer (from 1) whose first head is shown where to look while the assistant writes; 0: none
        heed_weight: float = 0.5

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.teller = Teller(self.processor, self.options.jitter)
        tokens = self.processor.tokens
        grid = range(self.processor.grid_size)
        self.cell_ids = [tokens[name(i)] for name in (x_token, y_token) for i in grid if name(i) in tokens]

    def wrap(self, model: nn.Module) -> nn.Module:
        if self.options.place <= 0 and self.options.heed <= 0:
            return model
        return ConversationHeads(model, self.setup.heads, self.options)

    # -- examples

    def kind(self, index: int) -> str:
        """The kind of the batch that example `index` falls into."""
        kinds, shares = list(self.options.mix), np.array(list(self.options.mix.values()))
        random = rng(self.seed, self.stage.name, "kind", index // self.stage.batch)
        return kinds[int(random.choice(len(kinds), p=shares / shares.sum()))]

    def example(self, index: int) -> dict[str, Any]:
        page, random, kind = self.page(index), self.random(index), self.kind(index)
        qa = page.qas[int(random.integers(len(page.qas)))]
        item, windows = KINDS[kind](self.teller, page, qa, random)
        row = dict(self.processor.encode_item(item))
        row["kind"], row["answer_from"] = kind, len(row["prompt_ids"])
        if kind == "read":  # nothing was seen yet when the call was written
            row["labels"] = [IGNORED] * row["answer_from"] + row["labels"][row["answer_from"] :]
        if self.options.place > 0:
            row |= self._truth(row, page, windows, qa)
        if self.options.heed > 0:
            row["heed"] = self.sights(row, page, windows, qa)
        return row

    def _truth(self, row: dict[str, Any], page: Page, windows: Sequence[Box], qa: QA) -> dict[str, Tensor]:
        """The truth about every image token of the row, for the auxiliary heads.

        asked (n, 4): share of its patches that is asked for. spelt (n, 4): number of the answer's glyph in the patch,
        from 1, else 0; -1 where glyphs are not legible (a whole page). places (n, 2): row, column.
        """
        asked, places, spelt = [], [], []
        order = answer_order(page, qa)[: self.options.spell]
        for thw, window in zip(row["image_grid_thw"], windows, strict=True):
            grid = patch_grid(thw)
            asked.append(merge_order(coverage(qa.boxes, window, grid)))
            rows, columns = grid[0] // 2, grid[1] // 2
            spelt.append(merge_order(numbered(order, window, grid, legible=window != whole(page))))
            places.append(np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2))
        return {
            "asked": torch.tensor(np.concatenate(asked), dtype=torch.float32),
            "places": torch.tensor(np.concatenate(places)),
            "spelt": torch.tensor(np.concatenate(spelt)),
        }

    def sights(self, row: dict[str, Any], page: Page, windows: Sequence[Box], qa: QA) -> Tensor:
        """Where to look while writing: (m, 1 + SIGHTS) positions in the row, -1 for none.

        First the position from which a token is predicted, then the image tokens that tell it: for a cell of a region,
        the tokens of the first look that are asked for; for a letter of the answer, the token it is printed in.
        Rows with a clip look are run in two stretches (`modeling`): their positions count from the second.
        """
        ids = np.array(row["input_ids"])
        config, kind = self.config, row["kind"]
        pairs: list[tuple[int, list[int]]] = []
        if kind == "clip":
            start = int(np.flatnonzero(ids == config.clip_action_start_id)[0]) + 1
            pads = np.flatnonzero(ids == config.clip_image_token_id)
            pairs += self._letters(row, page, qa, pads, row["clip_images_grid_thw"][0], whole(page))
            return _padded_sights([(at - start, [t - start for t in seen]) for at, seen in pairs])
        pads = np.flatnonzero(ids == config.image_token_id)
        for thw, window in zip(row["image_grid_thw"], windows, strict=True):
            here, pads = np.split(pads, [int(thw.prod()) // 4])
            if window != whole(page):
                pairs += self._letters(row, page, qa, here, thw, window)
            elif kind in ("locate", "region"):
                asked = here[merge_order(coverage(qa.boxes, window, patch_grid(thw))).max(1) > 0.3].tolist()
                pairs += [(int(at) - 1, asked) for at in np.flatnonzero(np.isin(ids, self.cell_ids))]
        return _padded_sights(pairs)

    def _letters(
        self, row: dict[str, Any], page: Page, qa: QA, tokens: np.ndarray, thw: Tensor, window: Box
    ) -> list[tuple[int, list[int]]]:
        """For each letter of the answer: the position before it, and those of `tokens` (of one image) that show it."""
        order, letters = answer_order(page, qa), len(row["input_ids"]) - row["answer_from"] - 1
        if len(order) != letters:  # tokens of more than one letter, or an answer that is not printed so
            return []
        spelt = merge_order(numbered(order, window, patch_grid(thw), legible=True))
        return [(row["answer_from"] + i - 1, tokens[(spelt == i + 1).any(1)].tolist()) for i in range(letters)]

    def collate(self, examples: Sequence[Any]) -> dict[str, Any]:
        heed = [F.pad(row["heed"], (1, 0), value=i) for i, row in enumerate(examples) if "heed" in row]
        rows = [{k: v for k, v in row.items() if k != "heed"} for row in examples]
        batch = super().collate(rows)
        if batch["info"]["kind"] == "clip":  # its row is run in segments: the heads cannot see it whole
            batch = {k: v for k, v in batch.items() if k not in ("asked", "places", "spelt")}
        return {**batch, "heed": torch.cat(heed) if heed else None}


class ConversationHeads(AuxiliaryHeads):
    """Heads that locate what is asked for, and attention supervision, beside the language model's own loss."""

    def __init__(self, model: nn.Module, saved: Mapping[str, Tensor], options: Any) -> None:
        super().__init__(model, saved)
        self.options = options
        width = self.model.config.text_config.hidden_size
        if options.place > 0:
            self.add_head("asked", nn.Linear(width, 4))
            self.add_head("row", nn.Linear(width, options.places))
            self.add_head("column", nn.Linear(width, options.places))
            self.add_head("spell", nn.Linear(width, 4 * (1 + options.spell)))

    def forward(self, asked=None, places=None, spelt=None, heed=None, **batch) -> dict[str, Any]:
        layers = self.model.model.language_model.layers
        caught: dict[str, Any] = {}
        handles = []
        if asked is not None:
            layer = layers[self.options.place_layer - 1]
            handles.append(layer.register_forward_hook(lambda _m, _i, o: caught.update(inner=_first(o))))
        if heed is not None and len(heed):
            attention = layers[self.options.heed - 1].self_attn
            catch = lambda _m, args, named: caught.update(seen=(_first(args), named))  # noqa: E731
            handles.append(attention.register_forward_pre_hook(catch, with_kwargs=True))
        try:
            outputs = self.model(**batch)
        finally:
            for handle in handles:
                handle.remove()
        loss, metrics = outputs["loss"], dict[str, float]()
        if "inner" in caught:
            tokens = caught["inner"][batch["input_ids"] == self.model.config.image_token_id]
            loss = loss + self.options.place * self.place_loss(metrics, tokens, asked, places, spelt)
        if "seen" in caught:
            first, named = caught["seen"]
            states = named.get("hidden_states", first)
            loss = loss + self.options.heed_weight * self.heed_loss(metrics, attention, states, named, heed)
        return {"loss": loss, "logits": outputs["logits"], "metrics": metrics}

    def heed_loss(
        self, metrics: dict[str, float], attention: Any, states: Tensor, named: dict[str, Any], heed: Tensor
    ) -> Tensor:
        """Mean of -log(share of the first head's attention that falls on the tokens of `heed`).

        heed (m, 2 + SIGHTS): row, position of the query, positions of the tokens (see `sights`).
        """
        from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

        size = attention.head_dim
        query = attention.q_proj(states)[..., :size].unsqueeze(1)
        key = attention.k_proj(states)[..., :size].unsqueeze(1)
        query, key = (t[:, 0] for t in apply_rotary_pos_emb(query, key, *named["position_embeddings"]))
        rows, at, sights = heed[:, 0], heed[:, 1], heed[:, 2:]
        scores = torch.einsum("md,mld->ml", query[rows, at], key[rows]) * size**-0.5
        later = torch.arange(scores.shape[1], device=scores.device) > at[:, None]
        logs = scores.masked_fill(later, -torch.inf).log_softmax(-1)
        on = logs.gather(1, sights.clamp(min=0)).masked_fill(sights < 0, -torch.inf).logsumexp(-1)
        metrics["heed"] = on.detach().exp().mean().item()
        return -on.mean()

    def place_loss(
        self, metrics: dict[str, float], tokens: Tensor, asked: Tensor, places: Tensor, spelt: Tensor
    ) -> Tensor:
        """tokens (n, d), asked (n, 4), places (n, 2), spelt (n, 4); see `PageConversations._truth`."""
        guess = self.heads["asked"](tokens)
        inside = F.binary_cross_entropy_with_logits(guess, asked, pos_weight=guess.new_tensor(4.0))
        rows = F.cross_entropy(self.heads["row"](tokens), places[:, 0])
        columns = F.cross_entropy(self.heads["column"](tokens), places[:, 1])
        with torch.no_grad():
            truth = asked > 0.3
            metrics["asked"] = ((guess > 0)[truth]).float().mean().item()
            metrics["place"] = (rows + columns).item() / 2
        loss = 4 * inside + 0.5 * (rows + columns)
        numbers, truth = self.heads["spell"](tokens).view(-1, 1 + self.options.spell), spelt.reshape(-1)
        for known, weight in ((truth > 0, 1.0), (truth == 0, 0.3)):
            if self.options.spell and known.any():
                loss = loss + weight * F.cross_entropy(numbers[known], truth[known])
        if (truth > 0).any():
            metrics["spelt"] = (numbers.argmax(-1) == truth)[truth > 0].float().mean().item()
        return loss


class Read(PageConversations):
    """Answering from a legible crop."""

    class Options(PageConversations.Options):
        mix: Mix = {"read": 1.0}


class Locate(PageConversations):
    """Naming the cells of what is asked, with the auxiliary heads; reading is kept up beside it."""

    class Options(PageConversations.Options):
        mix: Mix = {"locate": 0.5, "read": 0.5}
        place: float = 1.0
