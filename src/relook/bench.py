"""What a look costs, as ratios within one run on one machine: `relook bench`.

Everything is measured on a random model of one size (8 layers, width 512, images of 324 tokens, one thread, float32)
and set against stock transformers on the same weights and tokens, so that only the cost of *looking* is left. Weights
do not matter for time; what is written is cut at a fixed length.

    answer with a look   from the image to the last token, with a forced `clip` look
    plain, read once     transformers' Qwen2-VL on the very same final sequence: vision once, one prefill of everything
                         before the answer, then the answer token by token; no loop could do with less
    direct answer        `ask` with look="none", as many answer tokens
    training step        forward and backward of a batch in which every row looks again; plain: the same tokens with a
                         second image in place of the look

Times are processor time of the one thread, which other programs on the machine stretch far less than the clock on the
wall. Repeats are interleaved, so that a slow minute hits all cases alike; a ratio is that of medians over the repeats,
with a bootstrap interval.
"""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

ANSWER_TOKENS = 8  # short: long answers cost the same on both sides and would hide the look
SIDE = 504  # pixels: 36 x 36 patches, 324 tokens
BATCH = 1  # rows of a training step
QUESTION = "What is the code in the red box?"

# what -> (case measured, case it is set against, budget of the ratio)
RATIOS: dict[str, tuple[str, str, float]] = {
    "answer with a clip look / plain, same sequence read once": ("look", "plain", 1.10),
    "answer with a clip look / direct answer": ("look", "direct", 1.5),
    "training step with a look / plain step, same tokens": ("step", "plain step", 1.05),
    "training step with mask modelling / plain step": ("masked step", "plain step", 1.5),
}
COMMANDS = {"import relook": (["-c", "import relook"], 0.5), "relook --help": (["-m", "relook.cli", "--help"], 1.0)}


@dataclass(frozen=True)
class Line:
    """One row of the table: a ratio or seconds, its 95 % interval over n repeats, and what it should stay under."""

    what: str
    value: float
    low: float
    high: float
    n: int
    budget: float
    unit: str = "x"

    @property
    def ok(self) -> bool:
        return self.value <= self.budget


@dataclass(frozen=True)
class Bench:
    """A finished benchmark: where and how it ran, and its lines."""

    machine: str
    versions: str
    seed: int
    lines: list[Line]
    seconds: dict[str, float]  # case -> median

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        width = max(len(line.what) for line in self.lines)
        rows = [f"{self.machine}; {self.versions}; seed {self.seed}, 1 thread, float32, processor time"]
        rows.append(f"{'':{width}}  {'':>8}  {'95 % interval':>17}  {'n':>3}  budget")
        for line in self.lines:
            value, low, high = (
                f"{v:.3f}" if line.unit == "s" else f"{v:.2f}" for v in (line.value, line.low, line.high)
            )
            verdict = "" if line.ok else "  OVER"
            budget = f"<= {line.budget:g} {line.unit}{verdict}"
            rows.append(f"{line.what:{width}}  {value:>6} {line.unit}  {f'{low} .. {high}':>17}  {line.n:3}  {budget}")
        rows.append("medians: " + ", ".join(f"{case} {seconds:.3f} s" for case, seconds in self.seconds.items()))
        return "\n".join(rows)


def run(repeats: int = 7, seed: int = 0, note: Callable[[str], None] = lambda text: None) -> Bench:
    """Measure everything; some minutes on one core. `note` hears about progress."""
    import torch
    import transformers

    with _one_thread():
        note("building a random model (8 layers, width 512)")
        subject = Subject.build(seed)
        cases: dict[str, Callable[[], Any]] = {
            "look": lambda: subject.answer("clip"),
            "direct": lambda: subject.answer("none"),
            "plain": subject.plain_answer,
            "step": lambda: subject.step(mask=0),
            "masked step": lambda: subject.step(mask=1),
            "plain step": subject.plain_step,
        }
        times = measure(cases, repeats, note)
        usage = subject.answer("clip").usage
    lines = [ratio(what, times[a], times[b], budget, seed) for what, (a, b, budget) in RATIOS.items()]
    versions = [("Python", platform.python_version()), ("torch", torch.__version__)]
    versions.append(("transformers", transformers.__version__))
    positions = usage.lm_positions / usage.sequence_length
    lines.insert(2, Line("LM positions / length of the final sequence", positions, positions, positions, 1, 1.0))
    for what, (arguments, budget) in COMMANDS.items():
        note(what)
        lines.append(seconds(what, [_command(arguments) for _ in range(repeats)], budget, seed))
    return Bench(
        machine=f"{platform.system()} {platform.machine()}, {_processor()}",
        versions=", ".join(f"{what} {version}" for what, version in versions),
        seed=seed,
        lines=lines,
        seconds={case: median(values) for case, values in times.items()},
    )


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(
    cases: Mapping[str, Callable[[], Any]], repeats: int, note: Callable[[str], None] = lambda text: None
) -> dict[str, list[float]]:
    """Processor seconds of each case, round by round; a first round warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        note(f"round {turn} of {repeats}" if turn else "warming up")
        for name, case in cases.items():
            begin = time.process_time()
            case()
            if turn:
                times[name].append(time.process_time() - begin)
    return times


def ratio(what: str, over: Sequence[float], under: Sequence[float], budget: float, seed: int) -> Line:
    """median(over) / median(under); rounds are drawn whole, since both cases of a round met the same machine."""
    low, high = bootstrap(len(over), lambda i: median(over[k] for k in i) / median(under[k] for k in i), seed)
    return Line(what, median(over) / median(under), low, high, len(over), budget)


def seconds(what: str, values: Sequence[float], budget: float, seed: int) -> Line:
    low, high = bootstrap(len(values), lambda i: median(values[k] for k in i), seed)
    return Line(what, median(values), low, high, len(values), budget, unit="s")


def bootstrap(n: int, statistic: Callable[[list[int]], float], seed: int, draws: int = 2000) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic over indices 0..n-1 drawn with replacement."""
    rng = random.Random(seed)
    values = sorted(statistic(rng.choices(range(n), k=n)) for _ in range(draws))
    return values[int(0.025 * draws)], values[int(0.975 * draws) - 1]


@contextmanager
def _one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _command(arguments: list[str]) -> float:
    """Processor seconds of a Python process, its start included."""
    begin = os.times()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, stdin=subprocess.DEVNULL)
    end = os.times()
    return end.children_user + end.children_system - begin.children_user - begin.children_system


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


# -- what is measured -------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A random model that looks, stock Qwen2-VL with the same weights, one image, and the same tokens for both.

    vlm        relook's loop around the model
    plain      transformers' Qwen2VLForConditionalGeneration
    image      PIL, SIDE x SIDE
    sequence   (L,) ids of a finished conversation with a look, its pads of both looks as <|image_pad|>
    batch      a training batch for relook; `plain_batch` the same tokens for `plain`
    """

    vlm: Any
    plain: Any
    image: Any
    sequence: Any
    batch: dict[str, Any]
    plain_batch: dict[str, Any]

    @classmethod
    def build(cls, seed: int) -> Subject:
        import torch

        from relook.perceive import VLM

        torch.manual_seed(seed)
        model, processor, plain = _models()
        vlm, image = VLM(model, processor, "bench"), _image(seed)
        chat = vlm.chat(image)
        chat.ask(QUESTION, look="clip", max_new_tokens=ANSWER_TOKENS)
        sequence = _as_first_looks(model, torch.tensor(chat._conversation.ids))
        batch = _batch(processor, image)
        return cls(vlm, plain, image, sequence, batch, _plain_batch(model, batch))

    def answer(self, look: str) -> Any:
        """One answer of exactly ANSWER_TOKENS tokens."""
        return self.vlm.ask(self.image, QUESTION, look=look, max_new_tokens=ANSWER_TOKENS)

    def plain_answer(self) -> int:
        """The same final sequence, read once: image encoded once, its tokens put into both places."""
        import torch
        from transformers import DynamicCache

        model, core = self.plain.eval(), self.plain.model
        with torch.inference_mode():
            view = self.vlm.processor.view(self.image, "first")
            tensors = self.vlm.processor.encode_images([view], "image")
            grid = tensors["image_grid_thw"]
            features = core.get_image_features(tensors["pixel_values"], grid, return_dict=True).pooler_output[0]
            ids = self.sequence[None]
            kinds = (ids == model.config.image_token_id).int()
            positions, _ = core.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid.repeat(2, 1))
            embeds = core.get_input_embeddings()(ids)
            embeds[kinds.bool()] = features.repeat(2, 1)
            cache, end = DynamicCache(), ids.shape[1]
            answer = end - ANSWER_TOKENS - 1  # where the answer begins; it ends with <|im_end|>
            spans = [(0, answer), *((k, k + 1) for k in range(answer, end))]
            for a, b in spans:
                states = core.language_model(
                    inputs_embeds=embeds[:, a:b],
                    position_ids=positions[:, :, a:b],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
                model.lm_head(states[:, -1]).argmax(-1).item()
        return cache.get_seq_length()

    def step(self, mask: int) -> float:
        """Forward and backward; `mask` is `para_mask_id` (0 none, 1 the first user turn), applied to every row."""
        model = self.vlm.model
        model.config.para_mask_id, model.config.para_mask_ratio = mask, 1.0
        try:
            return _step(model, self.batch)
        finally:
            model.config.para_mask_id = 0
            model.eval()

    def plain_step(self) -> float:
        return _step(self.plain, self.plain_batch)


def _models() -> tuple[Any, Any, Any]:
    """The model, its processor, and transformers' Qwen2-VL with the same weights."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    from relook.model import VPTQwen2VLForConditionalGeneration
    from relook.model.new import Size, build_config, build_processor, build_tokenizer

    view = {"longest_side": SIDE}
    size = Size(
        phrases=(QUESTION,),
        vit={"embed_dim": 256, "depth": 4, "num_heads": 4, "patch_size": 14},
        lm={"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
            "intermediate_size": 1408},
        first=view, crop=view, reencode=view,
    )  # fmt: skip
    tokenizer = build_tokenizer(size)
    config = build_config(size, tokenizer)
    model = VPTQwen2VLForConditionalGeneration(config).eval()
    model.lm_head.weight.data[config.para_end_id] = 0  # no answer ends early: its logit is 0, the largest is above
    shared = {key: config.to_dict()[key] for key in ("text_config", "vision_config", "image_token_id", "video_token_id",
                                                     "vision_start_token_id", "vision_end_token_id")}  # fmt: skip
    plain = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**shared, tie_word_embeddings=True))
    weights = {name: value for name, value in model.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(weights)
    return model, build_processor(size, tokenizer), plain


def _image(seed: int) -> Any:
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def _batch(processor: Any, image: Any) -> dict[str, Any]:
    """BATCH rows with a clip look, as the collator makes them."""
    from relook.data.collate import Collator
    from relook.looks import LOOKS, write_call

    spec = LOOKS["clip"]
    turns = [("user", f"<image>\n{QUESTION} {spec.trigger}"), ("assistant", write_call("clip")),
             ("user", spec.placeholder), ("assistant", "042")]  # fmt: skip
    messages = [{"role": role, "content": content} for role, content in turns]
    return Collator(processor)([{"messages": messages, "images": [image], spec.item_key: [image]}] * BATCH)


def _plain_batch(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokens for transformers' model: every look's image is one more image. Grids interleave row by row."""
    import torch

    ids = _as_first_looks(model, batch["input_ids"])
    rows = len(ids)
    pixels = [batch[key].chunk(rows) for key in ("pixel_values", "clip_pixel_values")]
    grids = [batch[key].chunk(rows) for key in ("image_grid_thw", "clip_images_grid_thw")]
    return {
        "input_ids": ids,
        "attention_mask": batch["attention_mask"],
        "labels": batch["labels"],
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
        "pixel_values": torch.cat([part[i] for i in range(rows) for part in pixels]),
        "image_grid_thw": torch.cat([part[i] for i in range(rows) for part in grids]),
    }


def _as_first_looks(model: Any, ids: Any) -> Any:
    """Ids with the pads of clip looks turned into <|image_pad|>."""
    return ids.where(ids != model.config.clip_image_token_id, model.config.image_token_id)


def _step(model: Any, batch: Mapping[str, Any]) -> float:
    model.train()
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return float(loss.detach())
