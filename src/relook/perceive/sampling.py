"""The next token of a row: which tokens are allowed, and how one is sampled.

`Vocabulary` masks tokens that may not be sampled now (the loop writes the structure of turns; an open call must stay
well formed), `Sampling` samples from the rest. The samples of a row depend only on its own logits and seed, so a batch
equals its rows one by one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from relook.errors import UserError
from relook.looks import IM_END, IM_START, IMAGE_PAD, LOOKS, VISION_END, VISION_START, allowed_next, control_tokens

VIDEO_PAD = "<|video_pad|>"


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Greedy unless `do_sample`; then temperature, top-k and top-p in transformers' order.

    `seed`: two runs with one seed draw the same tokens; None draws differently every time.
    """

    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        limits = {
            "temperature": (self.temperature, lambda v: v > 0, "a number above 0"),
            "top_p": (self.top_p, lambda v: 0 < v <= 1, "a number above 0 and at most 1"),
            "top_k": (self.top_k, lambda v: v >= 1 and int(v) == v, "a whole number of at least 1"),
        }
        for name, (value, holds, expected) in limits.items():
            if value is None:
                continue
            if not holds(value):
                raise UserError(f"{name}={value} is not {expected}")
            if not self.do_sample:
                raise UserError(
                    f"{name}={value} has no effect on greedy decoding; add do_sample=True or leave {name} out"
                )

    def generator(self) -> torch.Generator:
        """A random generator for one row."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """One token id from logits (V,), banned tokens at -inf."""
        if not self.do_sample:
            return int(logits.argmax())
        warpers = LogitsProcessorList()
        if self.temperature is not None:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(int(self.top_k)))
        if self.top_p is not None:
            warpers.append(TopPLogitsWarper(float(self.top_p)))
        scores = logits.float().cpu().unsqueeze(0)
        no_ids = torch.LongTensor([[]])  # part of the interface; these three look at the scores alone
        probabilities = warpers(no_ids, scores).softmax(-1)
        return int(torch.multinomial(probabilities[0], 1, generator=generator))


class Vocabulary:
    """Ids of the control tokens, and masks of what may not be sampled.

    Args:
        tokenizer: with the control tokens of its looks.
        size: V, width of the logits (models pad their vocabulary beyond the tokenizer's).
        looks: names of the looks the model has.
        grid: cells per side of the region grid.
        device: where the logits are.
    """

    def __init__(
        self, tokenizer: Any, size: int, looks: Collection[str], grid: int = 8, device: torch.device | str = "cpu"
    ):
        self.tokenizer, self.size, self.looks, self.grid, self.device = tokenizer, size, frozenset(looks), grid, device
        self._ids: dict[str, int] = {}
        known = tokenizer.get_vocab()
        every_pad, every_token = control_tokens(list(LOOKS), grid)
        structure = (IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD)
        for token in (*structure, VIDEO_PAD, *every_pad, *every_token):
            if token in known:
                self._ids[token] = known[token]
        missing = [t for t in structure if t not in self._ids]
        missing += [t for t in control_tokens(sorted(self.looks), grid)[1] if t not in self._ids]
        if missing:
            raise UserError(
                f"the tokenizer has no token {missing[0]!r}, which the model's looks {sorted(self.looks)} need"
            )
        self._control = [t for t in every_token if t in self._ids]
        self._starts = {s.start: n for n, s in LOOKS.items() if s.start in self._ids}
        self.im_end = self._ids[IM_END]
        ends = [tokenizer.eos_token_id, known.get("<|endoftext|>")]
        self.ends = frozenset(e for e in ends if e is not None) | {self.im_end}
        self._structure = self._mask(t for t in self._ids if t not in self._control and t != IM_END)
        self._structure[len(tokenizer) :] = True
        self._no_looks = self._structure | self._mask(self._control)
        outside = [t for t in self._control if self._starts.get(t) not in self.looks]
        self._no_strays = self._structure | self._mask(outside)

    def __getitem__(self, token: str) -> int:
        return self._ids[token]

    def _mask(self, tokens: Any) -> Tensor:
        """(V,) bool, True at the given tokens."""
        mask = torch.zeros(self.size, dtype=torch.bool, device=self.device)
        mask[[self._ids[t] for t in tokens]] = True
        return mask

    @property
    def hidden_ids(self) -> frozenset[int]:
        """Ids that are not part of an answer's text: control tokens, structure, ends."""
        return frozenset(self._ids.values()) | self.ends

    def text_of(self, token: int) -> str:
        """The token's own text where it is a control token (`<|x_3|>`), else whatever the tokenizer calls it."""
        return self.tokenizer.convert_ids_to_tokens(token) or ""

    def allowed(self, turn: Sequence[str]) -> frozenset[str] | None:
        """Tokens that keep the open call of this turn well formed; None where no call is open."""
        return allowed_next(turn, self.looks, self.grid)

    def banned(self, turn: Sequence[str], may_look: bool, constrain: bool) -> Tensor:
        """(V,) bool: what may not be sampled next.

        Pads, `<|im_start|>` and the vision brackets are never sampled: a pad without its image would shift every later
        position. Without looks left, no control token; under `constrain` no call to a look the
        model lacks, no stray piece of a call, and within a call only what keeps it well formed.
        """
        if not may_look:
            return self._no_looks
        if not constrain:
            return self._structure
        allowed = self.allowed(turn)
        if allowed is None:
            return self._no_strays
        return ~self._mask(t for t in allowed if t in self._ids)
