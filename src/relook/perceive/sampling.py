"""The next token of a row: which tokens are allowed, and how one is sampled.

`Vocabulary` masks tokens that may not be sampled now (the loop writes the structure of turns; an open call must stay
well formed), `draw` samples from the rest. The samples of a row depend only on its own logits and seed, so a batch
equals its rows one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationMixin,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from relook.errors import UserError
from relook.looks import IM_END, IM_START, IMAGE_PAD, LOOKS, VISION_END, VISION_START, allowed_next, control_tokens
from relook.options import AskOptions
from relook.trace import Token

VIDEO_PAD = "<|video_pad|>"


# Settings of generation_config.json that `ask` follows; others that change what is generated are refused.
SAMPLED = ("temperature", "top_p", "top_k")  # with do_sample, where the question does not say
PROCESSED = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens")
NEUTRAL = {  # what says nothing about a greedy or sampled choice of tokens, or is the question's to say
    *("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample", "max_length"),
    *("max_new_tokens", "use_cache", "cache_implementation", "cache_config", "transformers_version"),
    *("return_dict_in_generate", "_from_model_config", "_commit_hash", "renormalize_logits"),
    *("length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty"),  # of beams
}
OFF: dict[str, float] = {  # values that change nothing
    **{"num_beams": 1, "num_return_sequences": 1, "typical_p": 1, "repetition_penalty": 1},
    **{"encoder_repetition_penalty": 1, "top_k": 0, "min_length": 0, "no_repeat_ngram_size": 0},
    **{"encoder_no_repeat_ngram_size": 0, "epsilon_cutoff": 0, "eta_cutoff": 0, "remove_invalid_values": 0},
}


def generation_defaults(model: Any) -> tuple[dict[str, float], LogitsProcessorList, list[int]]:
    """Of the model's generation config: sampling numbers, processors of logits, ids that end a turn.

    Raises:
        UserError: it asks for something that the loop does not do, such as beams.
    """
    config = model.generation_config
    stated = config.to_diff_dict().items()
    changed = {name: value for name, value in stated if value is not None and value != OFF.get(name, ())}
    left = [n for n in changed if n not in {*NEUTRAL, *SAMPLED, *PROCESSED} and not n.startswith("output_")]
    if left:
        raise UserError(
            f"the model's generation_config.json sets {left[0]}={changed[left[0]]!r}, which `ask` does not follow; "
            "remove it there, or use model.generate"
        )
    plain = type(config)(eos_token_id=config.eos_token_id, **{n: changed[n] for n in PROCESSED if n in changed})
    plain._eos_token_tensor = None
    processors = GenerationMixin._get_logits_processor(model, plain, input_ids_seq_length=1, device=str(model.device))
    ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else list(config.eos_token_id or ())
    return {name: changed[name] for name in SAMPLED if name in changed}, processors, ends


def generator(options: AskOptions) -> torch.Generator:
    """A random generator for one row."""
    generator = torch.Generator()
    generator.seed() if options.seed is None else generator.manual_seed(options.seed)
    return generator


def draw(logits: Tensor, options: AskOptions, generator: torch.Generator) -> int:
    """A token id from logits (V,), banned tokens at -inf; temperature, top-k and top-p in transformers' order."""
    warpers = LogitsProcessorList()
    if options.temperature is not None:
        warpers.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k is not None:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p is not None:
        warpers.append(TopPLogitsWarper(options.top_p))
    no_ids = torch.LongTensor([[]])  # part of the interface; these three look at the scores alone
    probabilities = warpers(no_ids, logits.float().cpu().unsqueeze(0)).softmax(-1)
    return int(torch.multinomial(probabilities[0], 1, generator=generator))


def with_probability(token: int, logits: Tensor, top: int, text: Callable[[list[int]], str]) -> Token:
    """A token with its log probability in `logits` (V,) and the `top` most probable ones; `text` decodes ids."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(top)
    others = tuple((text([i]), value) for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Token(text([token]), float(logprobs[token]), others)


class Vocabulary:
    """Ids of the control tokens, and masks of what may not be sampled.

    Args:
        tokenizer: with the control tokens of its looks.
        size: V, width of the logits (models pad their vocabulary beyond the tokenizer's).
        looks: names of the looks the model has.
        grid: cells per side of the region grid.
        device: where the logits are.
        ends: ids that end a turn, besides `<|im_end|>`, `<|endoftext|>` and the tokenizer's.
    """

    def __init__(
        self,
        tokenizer: Any,
        size: int,
        looks: Collection[str],
        grid: int = 8,
        device: torch.device | str = "cpu",
        ends: Collection[int] = (),
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
        own = [tokenizer.eos_token_id, known.get("<|endoftext|>")]
        self.ends = frozenset(e for e in own if e is not None) | {self.im_end, *ends}
        self._structure = self._mask(t for t in self._ids if t not in self._control and t != IM_END)
        self._structure[len(tokenizer) :] = True
        self._no_looks = self._structure | self._mask(self._control)
        outside = [t for t in self._control if self._starts.get(t) not in self.looks]
        self._no_strays = self._structure | self._mask(outside)

    def __getitem__(self, token: str) -> int:
        return self._ids[token]

    def get(self, token: str) -> int | None:
        return self._ids.get(token)

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
