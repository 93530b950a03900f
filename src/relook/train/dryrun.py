"""`relook train --dry-run`: what a recipe would do, said before it does it. Nothing is written and nothing is learnt.

The model is built without numbers (on the meta device), so that a recipe for a large machine can be tried on a small
one. Every item is read: its images must be there, its placeholders must have their images, its control tokens must be
the model's. Of a sample the tokens are counted, from headers of images. Where the weights are here (and there is room),
three steps are really taken and thrown away, to tell how long the whole will be.

Knows recipes and feeds; what memory costs is `memory`'s business.
"""

from __future__ import annotations

import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from relook.data.collate import SkippedSample, item_length
from relook.data.dataset import SampledItems, open_items
from relook.data.images import split_ref
from relook.data.items import PLACEHOLDERS, Item
from relook.data.reader import Unreadable
from relook.errors import UserError
from relook.looks import LOOKS
from relook.model.start import StartInfo, describe_start, open_start
from relook.train import lora, memory
from relook.train.learnable import by_part, check_parts, let_learn, set_forward
from relook.train.objective import make_objective
from relook.train.optimiser import build_optimiser
from relook.train.recipe import Recipe, Stage, load_recipe
from relook.train.runner import source_of, steps_of

SAMPLE = 1000  # items whose tokens are counted
PAGES = 32  # of a world
STEPS = 3  # measured
SHOWN = 3  # problems of a kind that are told in full
_TOKEN = re.compile(r"<\|[^|<>\s]+\|>")


@dataclass
class Lengths:
    """Tokens of a sample: how many examples, their mean, what 99 % stay under, and the share over the cutoff."""

    examples: int
    mean: float
    p99: int
    most: int
    cutoff: int | None = None
    cut: float = 0.0

    @classmethod
    def of(cls, lengths: Sequence[int], cutoff: int | None) -> Lengths:
        ranked = sorted(lengths)
        over = sum(n > cutoff for n in ranked) / len(ranked) if cutoff is not None else 0.0
        return cls(
            len(ranked), statistics.fmean(ranked), ranked[(99 * len(ranked) - 1) // 100], ranked[-1], cutoff, over
        )

    def __str__(self) -> str:
        text = f"mean {self.mean:.0f}, 99 % at most {self.p99}, longest {self.most} (of {self.examples} examples)"
        if self.cutoff is None:
            return f"{text}; no cutoff"
        return f"{text}; {100 * self.cut:.1f} % over the cutoff of {self.cutoff}, which are left out"


@dataclass
class Items:
    """What was found in the items of a stage: how many (and held out), files of images, lengths, problems by kind."""

    items: int = 0
    held: int = 0
    images: int = 0
    lengths: list[int] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)
    told: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, where: str) -> None:
        self.problems[kind] += 1
        if self.problems[kind] <= SHOWN:
            self.told.setdefault(kind, []).append(where)


Looked = dict[str, tuple[SampledItems, Items]]  # sets that were looked through, by their key


@dataclass
class StageDry:
    """One stage: what learns, how long, how much."""

    name: str
    objective: str
    steps: int
    samples: int
    learns: dict[str, tuple[int, int]]
    items: Items | None
    lengths: Lengths | None
    memory: dict[str, int]
    towers: list[str]
    seconds_a_step: float | None = None
    peak: int | None = None  # bytes on the GPU, measured
    unmeasured: str = ""

    @property
    def seconds(self) -> float | None:
        return None if self.seconds_a_step is None else self.seconds_a_step * self.steps


@dataclass
class DryRun:
    """What a recipe would do. `ok` where no item has a problem."""

    recipe: str
    start: str
    missing: str
    stages: list[StageDry]

    @property
    def ok(self) -> bool:
        return not any(stage.items is not None and stage.items.problems for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        from relook.train.dryprint import table

        return table(self)


def dry_run(
    recipe: str | Path | Recipe, overrides: Sequence[str] = (), note: Callable[[str], None] = lambda text: None
) -> DryRun:
    """Try a recipe out; `note` is told how far it is.

    Raises:
        UserError: the recipe does not hold together: a key, a part, an option, a file that is not there.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, [o for o in overrides if not o.startswith("out=")])
    torch.set_num_threads(recipe.threads)
    plan = describe_start(recipe.model, seed=recipe.seed, domain=recipe.domain)
    source = recipe.model
    found = DryRun(recipe.name, source.start or f"a fresh {source.size}", plan.missing, [])
    check_parts(plan.meta_model(), recipe.stages)
    seen: Looked = {}
    for stage in recipe.stages:
        found.stages.append(_stage(recipe, stage, plan, seen, note))
    reason = "not measured: its weights are not here" if plan.missing else ""
    reason = reason if found.ok else "not measured: the data will not do"
    for stage, dry in zip(recipe.stages, found.stages, strict=True):
        dry.unmeasured = reason
        if not reason:
            note(f"{stage.name}: measuring {STEPS} steps")
            _measure(recipe, stage, dry, seen)
    return found


def _stage(recipe: Recipe, stage: Stage, plan: StartInfo, seen: Looked, note: Callable[[str], None]) -> StageDry:
    data, seed = stage.data or recipe.data, recipe.seed if stage.seed is None else stage.seed
    model = plan.meta_model()
    set_forward(model.config, stage)
    items = None
    if data.source == "json":
        key = repr((data, seed))
        if key not in seen:
            fed = open_items(data, seed, recipe.validation.items, plan.processor)
            seen[key] = fed, look_through(fed, plan, note)
        fed, items = seen[key]
    objective: Any = model
    if plan.processor is not None:  # also checks the stage's options
        objective = make_objective(
            *(model, plan.processor, source_of(data, seed), stage, seed),
            *((fed, fed.validation) if items else (None, ())),
        )
    let_learn(model, stage.freeze, stage.train)
    if stage.lora is not None:
        lora.adapt(model, stage.lora.model_copy(update={"bits": None}))
    cutoff = stage.options.get("max_length")
    lengths = items.lengths if items is not None else _drawn(objective) if plan.processor is not None else []
    known = Lengths.of(lengths, cutoff) if lengths else None
    steps = steps_of(stage, fed if items is not None else None)
    sizes = memory.standing(objective, stage)
    longest = min(n for n in (known.p99 if known else None, cutoff) if n is not None) if known or cutoff else None
    if longest is not None:
        sizes["activations"] = memory.activations(plan.config, stage, stage.batch * longest, memory.layers_learn(model))
    samples = steps * stage.batch * stage.accumulate
    learns = by_part(objective)
    return StageDry(stage.name, stage.objective, steps, samples, learns, items, known, sizes, memory.towers(model))


def _drawn(objective: Any) -> list[int]:
    """Tokens of the first examples of a world; none where examples are no text."""
    rows = [objective.example(i) for i in range(PAGES)]
    return [len(row["input_ids"]) for row in rows if isinstance(row, dict) and "input_ids" in row]


# -- items ------------------------------------------------------------------------------------------------------------


def look_through(fed: SampledItems, plan: StartInfo, note: Callable[[str], None] = lambda text: None) -> Items:
    """Every item of a feed's sources; lengths of `SAMPLE` of them, chosen at random, where the tokenizer is here."""
    found, files, draw = Items(held=len(fed.validation)), dict[str, bool](), random.Random(fed.seed)
    sample: list[tuple[str, Item]] = []
    vocabulary = plan.processor.tokenizer.get_vocab() if plan.processor is not None else None
    for source, records in enumerate(fed.records):
        for row in records:
            found.items += 1
            if found.items % 1000 == 0:
                note(f"{found.items} items")
            if isinstance(row, Unreadable):
                found.add("not readable", f"{row.where}: {row.why}")
                continue
            try:
                item = fed.item(source, row)
            except UserError as error:
                found.add("not an item", str(error))
                continue
            for kind, what in _problems(item, plan, vocabulary, files):
                found.add(kind, f"{row.where}: {what}")
            at = len(sample) if len(sample) < SAMPLE else draw.randrange(found.items)
            if at < SAMPLE:
                sample[at : at + 1] = [(row.where, item)]
    found.images = len(files)
    if plan.processor is not None and not found.problems:
        for where, item in sample:
            try:
                found.lengths.append(item_length(plan.processor, item))
            except UserError as error:
                found.add("image not readable", f"{where}: {error}")
    return found


def _problems(item: Item, plan: StartInfo, vocabulary: Any, files: dict[str, bool]) -> list[tuple[str, str]]:
    """(kind, what was seen) of one item. `files` remembers which image files are there."""
    found = []
    for key, count in item.placeholder_counts().items():
        given = len(item.images.get(key, ()))
        if count != given:
            found.append(("placeholders and images differ", f"{count} {PLACEHOLDERS[key]}, {given} in {key!r}"))
    for look, spec in LOOKS.items():
        if look not in plan.config.looks and look != "region" and item.images.get(spec.item_key):
            found.append(("a look that the model lacks", f"{look}; it has {', '.join(plan.config.looks)}"))
    if vocabulary is not None:
        said = {token for turn in item.messages for token in _TOKEN.findall(turn.content)}
        found += [("a token that the model lacks", token) for token in sorted(said) if token not in vocabulary]
    for refs in item.images.values():
        for ref in refs:
            if isinstance(ref, str):
                name, box = split_ref(ref)
                if name not in files:
                    files[name] = Path(name).is_file() or (box is not None and Path(ref).is_file())
                if not files[name]:
                    found.append(("missing image", name))
    return found


# -- three steps ------------------------------------------------------------------------------------------------------


def _measure(recipe: Recipe, stage: Stage, dry: StageDry, seen: Looked) -> None:
    """Take three steps of a stage from the recipe's start, and throw them away."""
    needed, room = sum(dry.memory.values()), _room()
    if needed > room:
        dry.unmeasured = f"not measured: there is room for {memory.gib(room)} here"
        return
    data, seed = stage.data or recipe.data, recipe.seed if stage.seed is None else stage.seed
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = open_start(recipe.model, seed=recipe.seed, domain=recipe.domain)
    fed = seen[repr((data, seed))][0] if data.source == "json" else None
    objective: Any = make_objective(
        model, processor, source_of(data, seed), stage, seed, fed, fed.validation if fed is not None else ()
    )
    set_forward(model.config, stage)
    let_learn(model, stage.freeze, stage.train)
    if stage.lora is not None:
        objective.adapter = lora.adapt(model, stage.lora)
    if stage.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    objective.to(device).train()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    optimiser = build_optimiser(objective.named_parameters(remove_duplicate=False), stage)
    taken = [_step(objective, stage, optimiser, number, device) for number in range(STEPS)]
    dry.seconds_a_step = statistics.median(taken)
    dry.peak = torch.cuda.max_memory_allocated() if device == "cuda" else None


def _step(objective: Any, stage: Stage, optimiser: Any, number: int, device: str) -> float:
    """Seconds of one optimiser step; examples are drawn in this process, as with workers: 0."""
    begun = time.perf_counter()
    for part in range(stage.accumulate):
        first = (number * stage.accumulate + part) * stage.batch
        examples = [objective.example(first + i) for i in range(stage.batch)]
        if all(isinstance(example, SkippedSample) for example in examples):
            continue
        batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in objective.collate(examples).items()}
        with torch.autocast(device, torch.bfloat16, enabled=stage.precision == "bfloat16"):
            loss = objective(**batch)["loss"]
        (loss / stage.accumulate).backward()
    optimiser.step()
    optimiser.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _room() -> int:
    """Free bytes where a step would run."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available
