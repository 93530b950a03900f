"""Cost of a look, as ratios within one run on one machine: `relook bench`.

All cases use one random model (8 layers, width 512, images of 324 tokens, one thread, float32) and are compared with
stock transformers on the same weights and tokens, which leaves only the cost of the look. Weights do not affect time;
answers have a fixed length.

    answer with a look   from the image to the last token, with a forced `clip` look
    plain, read once     transformers' model on the same final sequence: encode the image once, prefill everything
                         before the answer, then decode the answer token by token; a lower bound for any loop
    direct answer        `ask` with look="none" and the same number of answer tokens
    training step        forward and backward of a batch in which every row looks again; plain: the same tokens with a
                         second image in place of the look

Times are CPU time of the one thread, which depends less on other programs than wall-clock time. Repeats are
interleaved, so that a slow minute affects all cases alike. A ratio is one of medians over the repeats, with a bootstrap
interval.
"""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

ANSWER_TOKENS = 8  # short: long answers cost the same on both sides and would hide the look
SIDE = 504  # pixels: 36 x 36 patches, 324 tokens
BATCH = 1  # rows of a training step
QUESTION = "What is the code in the red box?"

# label -> (measured case, reference case, budget of the ratio)
RATIOS: dict[str, tuple[str, str, float]] = {
    "answer with a clip look / plain, same sequence read once": ("look", "plain", 1.10),
    "answer with a clip look / direct answer": ("look", "direct", 1.5),
    "training step with a look / plain step, same tokens": ("step", "plain step", 1.05),
    "training step with mask modelling / plain step": ("masked step", "plain step", 1.5),
}
COMMANDS = {"import relook": (["-c", "import relook"], 0.5), "relook --help": (["-m", "relook.cli", "--help"], 1.0)}


@dataclass(frozen=True)
class Line:
    """One row of the table: a ratio or seconds, its 95 % interval over n repeats, and its upper limit."""

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
    """Results of a benchmark and the machine and versions they were measured with."""

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
            digits = 3 if line.unit == "s" else 2
            value, low, high = (f"{v:.{digits}f}" for v in (line.value, line.low, line.high))
            budget = f"<= {line.budget:g} {line.unit}{'' if line.ok else '  OVER'}"
            rows.append(f"{line.what:{width}}  {value:>6} {line.unit}  {f'{low} .. {high}':>17}  {line.n:3}  {budget}")
        rows.append("medians: " + ", ".join(f"{case} {seconds:.3f} s" for case, seconds in self.seconds.items()))
        return "\n".join(rows)


def run(repeats: int = 7, seed: int = 0, status: Callable[[str], None] = lambda text: None) -> Bench:
    """Measure all cases, which takes some minutes on one core.

    Args:
        repeats: rounds; each measures every case once.
        seed: of the random weights, the image and the bootstrap.
        status: called with a short text about what is being measured.
    """
    import torch
    import transformers

    from relook.evaluate.environment import cpu_name

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        status("building a random model (8 layers, width 512)")
        subject = Subject(seed)
        times = measure(subject.cases(), repeats, status)
        usage = subject.answer("clip").usage
    finally:
        torch.set_num_threads(threads)
    lines = [_line(what, times[a], budget, seed, over=times[b]) for what, (a, b, budget) in RATIOS.items()]
    positions = usage.lm_positions / usage.sequence_length
    lines.insert(2, Line("LM positions / length of the final sequence", positions, positions, positions, 1, 1.0))
    for what, (arguments, budget) in COMMANDS.items():
        status(what)
        lines.append(_line(what, [_command_seconds(arguments) for _ in range(repeats)], budget, seed))
    return Bench(
        machine=f"{platform.system()} {platform.machine()}, {cpu_name()}",
        versions=f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        seed=seed,
        lines=lines,
        seconds={case: median(values) for case, values in times.items()},
    )


def measure(
    cases: Mapping[str, Callable[[], Any]], repeats: int, status: Callable[[str], None]
) -> dict[str, list[float]]:
    """CPU seconds of each case, round by round, after one warm-up round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        status(f"round {turn} of {repeats}" if turn else "warming up")
        for name, case in cases.items():
            begin = time.process_time()
            case()
            if turn:
                times[name].append(time.process_time() - begin)
    return times


def _line(what: str, values: Sequence[float], budget: float, seed: int, over: Sequence[float] | None = None) -> Line:
    """Median of `values` in seconds, or its ratio to the median of `over`, with a 95 % percentile bootstrap interval.

    Rounds are resampled whole, since both cases of a round ran under the same conditions.
    """

    def statistic(rounds: Sequence[int]) -> float:
        return median(values[k] for k in rounds) / (median(over[k] for k in rounds) if over else 1)

    n, draws, rng = len(values), 2000, random.Random(seed)
    samples = sorted(statistic(rng.choices(range(n), k=n)) for _ in range(draws))
    low, high = samples[int(0.025 * draws)], samples[int(0.975 * draws) - 1]
    return Line(what, statistic(range(n)), low, high, n, budget, unit="x" if over else "s")


def _command_seconds(arguments: list[str]) -> float:
    """CPU seconds of a Python process, including its start."""
    begin = os.times()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, stdin=subprocess.DEVNULL)
    end = os.times()
    return end.children_user + end.children_system - begin.children_user - begin.children_system


class Subject:
    """A random relook model and the stock one with the same weights, and the same inputs for both."""

    def __init__(self, seed: int) -> None:
        import numpy as np
        import torch
        from PIL import Image

        from relook.model.export import plain_model
        from relook.perceive import VLM

        torch.manual_seed(seed)
        model, processor = random_model()
        self.plain = plain_model(model)
        self.vlm = VLM(model, processor, "bench")
        self.image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        chat = self.vlm.chat(self.image)
        chat.ask(QUESTION, look="clip", max_new_tokens=ANSWER_TOKENS)
        # (L,) ids of a finished conversation with a look; the pads of both looks are <|image_pad|>
        self.sequence = _as_first_looks(model, torch.tensor(chat._conversation.ids))
        self.batch = _batch(processor, self.image)
        self.plain_batch = _plain_batch(model, self.batch)

    def cases(self) -> dict[str, Callable[[], Any]]:
        return {
            "look": lambda: self.answer("clip"),
            "direct": lambda: self.answer("none"),
            "plain": self.plain_answer,
            "step": lambda: self.step(mask=0),
            "masked step": lambda: self.step(mask=1),
            "plain step": lambda: _step(self.plain, self.plain_batch),
        }

    def answer(self, look: str) -> Any:
        """Generate exactly ANSWER_TOKENS tokens with a forced look."""
        return self.vlm.ask(self.image, QUESTION, look=look, max_new_tokens=ANSWER_TOKENS)

    def plain_answer(self) -> None:
        """Process the same final sequence once, with the image encoded once and its features used twice."""
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
            answer = end - ANSWER_TOKENS - 1  # start of the answer, which ends with <|im_end|>
            for a, b in [(0, answer), *((k, k + 1) for k in range(answer, end))]:
                states = core.language_model(
                    inputs_embeds=embeds[:, a:b],
                    position_ids=positions[:, :, a:b],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
                model.lm_head(states[:, -1]).argmax(-1).item()

    def step(self, mask: int) -> None:
        """Forward and backward with `para_mask_id` = mask (0 none, 1 the first user turn) on every row."""
        model = self.vlm.model
        model.config.para_mask_id, model.config.para_mask_ratio = mask, 1.0
        try:
            _step(model, self.batch)
        finally:
            model.config.para_mask_id = 0
            model.eval()


def random_model() -> tuple[Any, Any]:
    """A relook model (8 layers, width 512) whose answers do not end early, and its processor."""
    from relook.model.classes import model_class
    from relook.model.new import Size, build_config, build_processor

    view = {"longest_side": SIDE}
    size = Size(
        phrases=(QUESTION,),
        vit={"embed_dim": 256, "depth": 4, "num_heads": 4, "patch_size": 14},
        lm={"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
            "intermediate_size": 1408},
        first=view, crop=view, reencode=view,
    )  # fmt: skip
    processor = build_processor(size)
    config = build_config(size, processor)
    model = model_class(config)(config).eval()
    model.lm_head.weight.data[config.para_end_id] = 0  # logit 0, below the maximum: no answer ends early
    return model, processor


def _batch(processor: Any, image: Any) -> dict[str, Any]:
    """Collate BATCH rows with a clip look."""
    from relook.data.collate import Collator
    from relook.looks import LOOKS, write_call

    spec = LOOKS["clip"]
    turns = [("user", f"<image>\n{QUESTION} {spec.trigger}"), ("assistant", write_call("clip")),
             ("user", spec.placeholder), ("assistant", "042")]  # fmt: skip
    messages = [{"role": role, "content": content} for role, content in turns]
    return Collator(processor)([{"messages": messages, "images": [image], spec.item_key: [image]}] * BATCH)


def _plain_batch(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokens for transformers' model, with each look as one more image; images are row-major."""
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
    """Replace the pads of clip looks in `ids` with <|image_pad|>."""
    return ids.where(ids != model.config.clip_image_token_id, model.config.image_token_id)


def _step(model: Any, batch: Mapping[str, Any]) -> None:
    model.train()
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
