"""`relook train --dry-run`: what a recipe would do, said before it does it. Nothing is written and nothing is learnt.

The recipe is checked as a run checks it, and its model is built on the meta device, so that a recipe for a large
machine can be tried on a small one. Every item is read: its images must be there, as many as it has placeholders, and
its control tokens must be the model's. Tokens of a sample are counted, from headers of images. Memory of weights,
gradients and optimizer states follows from shapes. Where the weights are here (and there is room), a small batch is
run and thrown away: it tells the time of a step and what a forward pass keeps for the backward one. Each part of the
report is said as soon as it is known.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from relook.data.collate import item_length
from relook.data.dataset import SampledItems, open_items
from relook.data.items import Item, LeftOut
from relook.data.reader import Unreadable
from relook.errors import UserError
from relook.files import split_page
from relook.model.encoders import image_encoder
from relook.model.start import StartInfo, open_start
from relook.train.checkpoints import StageModel
from relook.train.feature_cache import BOUND, FeatureCache, feature_cache
from relook.train.objective import Objective, run_batch
from relook.train.optim import build_optimizer, by_part
from relook.train.recipe import Recipe, Stage, load_recipe
from relook.train.runner import check, prepare_stage, steps_of
from relook.train.units import counted, gib, span
from relook.views import existing_ref

SAMPLE = 1000  # items whose tokens are counted
PAGES = 32  # of a synthetic dataset
MEASURED = 4  # examples of the batch that is run on a processor; a GPU runs a whole batch
PATIENCE = 4.0  # seconds: where one example takes longer, no more are run at once
SHOWN = 3  # problems of a kind that are shown in full
FLOAT = 4  # bytes: weights, gradients and optimizer states are float32
Note = Callable[[str], None]


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
        ranked, count = sorted(lengths), len(lengths)
        over = sum(cutoff is not None and n > cutoff for n in ranked) / count
        return cls(count, statistics.fmean(ranked), ranked[(99 * count - 1) // 100], ranked[-1], cutoff, over)

    def __str__(self) -> str:
        over = f"{100 * self.cut:.1f} % over the cutoff of {self.cutoff}, which are left out"
        text = f"mean {self.mean:.0f}, 99 % at most {self.p99}, longest {self.most} (of {self.examples} examples)"
        return f"{text}; {'no cutoff' if self.cutoff is None else over}"


@dataclass
class Items:
    """What was found in the items of a stage: how many (and held out), files of images, lengths, problems by kind."""

    items: int = 0
    held: int = 0
    taught: int = 0
    beside: str = ""  # the files they are held out in, where `data build --val` wrote some
    images: int = 0
    views: int = 0  # images and crops
    lengths: list[int] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)
    shown: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, where: str) -> None:
        self.problems[kind] += 1
        if self.problems[kind] <= SHOWN:
            self.shown.setdefault(kind, []).append(where)

    def lines(self) -> list[str]:
        """The items as people read them."""
        kept = f" ({self.taught:,} to learn from, {self.held:,} held out)" if self.held else ""
        kept = f", {self.held:,} more held out in {self.beside}" if self.beside else kept
        lines = [f"  items    {self.items:,}{kept}, {counted(self.images, 'image file')}"]
        if not self.problems:
            lines[0] += "; every image is there, every token is known"
        for kind, count in self.problems.most_common():
            lines += [f"           {count:,} x {kind}", *(f"             {where}" for where in self.shown[kind])]
        return lines


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
    seconds_a_step: float | None = None
    peak: int | None = None  # bytes on the GPU, measured
    unmeasured: str = ""
    measured: int = 0  # examples of the batch that was run
    features: str = ""  # of a frozen vision encoder, where they are kept

    def lines(self) -> list[str]:
        """The stage as people read it."""
        return [*self.shape(), *self.data(), *self.cost()]

    def shape(self) -> list[str]:
        """What learns, and how long: what is known at once."""
        lines = [f"stage {self.name} ({self.objective}): {counted(self.steps, 'step')}, {self.samples:,} samples"]
        rows = [*self.learns.items(), ("all", tuple(map(sum, zip(*self.learns.values(), strict=True))))]
        width = max(len(part) for part, _ in rows)
        lines.append(f"  {'learns':{width}}  {'parameters':>15}  {'of':>15}")
        lines += [f"  {part:{width}}  {learns:>15,}  {total:>15,}" for part, (learns, total) in rows]
        return lines

    def data(self) -> list[str]:
        """What it learns from."""
        lines = self.items.lines() if self.items is not None else []
        uncounted = "not counted: the examples are no text, the tokenizer is not here, or the data will not do"
        return [*lines, f"  tokens   {self.lengths or uncounted}"]

    def cost(self) -> list[str]:
        """Memory and time."""
        parts = ", ".join(f"{name} {gib(size)}" for name, size in self.memory.items())
        lines = [f"  memory   about {gib(sum(self.memory.values()))} a device: {parts}"]
        if self.peak is not None:
            lines.append(f"           measured: {gib(self.peak)} at most")
        lines += [f"  features {self.features}"] if self.features else []
        spent = self.unmeasured
        if self.seconds_a_step is not None:
            whole = span(self.seconds_a_step * self.steps)
            spent = f"about {whole}: {self.seconds_a_step:.3g} s a step (from a batch of {self.measured})"
        return [*lines, f"  time     {spent}"]


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

    def head(self) -> str:
        """The first line."""
        reason = self.missing.partition(" (")[0]  # without what the hub's library said about it
        weights = f"its weights are not here: {reason}" if reason else "its weights are here"
        return f"{self.recipe}: from {self.start}; {weights}"

    def __str__(self) -> str:
        return "\n".join([self.head(), *(line for stage in self.stages for line in ("", *stage.lines()))])


def dry_run(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    note: Note = lambda text: None,
    say: Note = lambda text: None,
) -> DryRun:
    """Try a recipe out.

    Args:
        note: called with a line on how far it is.
        say: called with each part of the report as soon as it is known.

    Raises:
        UserError: the recipe does not hold together: a key, a part, an option, a file that is not there.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, [o for o in overrides if not o.startswith("out=")])
    torch.set_num_threads(recipe.threads)
    info = check(recipe)
    found = DryRun(recipe.name, recipe.model.start or f"a fresh {recipe.model.size}", info.missing, [])
    say(found.head())
    known: dict[str, tuple[SampledItems, Items]] = {}
    for stage in recipe.stages:
        data, seed = recipe.data_of(stage), recipe.seed_of(stage)
        key, reads = repr((data, seed)), data.source == "json"
        if reads and key not in known:
            known[key] = open_items(data, seed, recipe.validation.items, info.processor), Items()
        sampled, items = known.get(key, (None, None))
        dry, objective = _describe(recipe, stage, info, sampled)
        found.stages.append(dry)
        say("\n".join(["", *dry.shape()]))
        if sampled is not None and items is not None and not items.items:
            read_items(sampled, info, note, items)
        dry.items, dry.lengths = items, _lengths(stage, objective, items)
        say("\n".join(dry.data()))
        needed, room = sum(dry.memory.values()), _room()
        reason = "not measured: its weights are not here" if info.missing else ""
        reason = "not measured: the data will not do" if items is not None and items.problems else reason
        dry.unmeasured = reason or (f"not measured: there is room for {gib(room)} here" if needed > room else "")
        if not dry.unmeasured:
            note(f"{stage.name}: measuring a batch")
            _measure(recipe, stage, sampled, dry)
            note("")
        say("\n".join(dry.cost()))
    return found


def _describe(
    recipe: Recipe, stage: Stage, info: StartInfo, sampled: SampledItems | None
) -> tuple[StageDry, Objective | None]:
    """A stage by its shapes, on the meta device."""
    plan = stage.lora and stage.lora.model_copy(update={"bits": None})  # few bits are for real weights only
    trained = StageModel(info.meta_model(), info.processor)
    objective = prepare_stage(recipe, stage.model_copy(update={"lora": plan}), trained, sampled)
    module = trained.model if trained.outer is None else trained.outer
    steps = steps_of(stage, sampled)
    about = stage.name, stage.objective, steps, steps * stage.batch * stage.accumulate, by_part(module)
    return StageDry(*about, None, None, standing_memory(module, stage)), objective


def _lengths(stage: Stage, objective: Objective | None, items: Items | None) -> Lengths | None:
    lengths = items.lengths if items is not None else []
    if items is None and objective is not None:
        rows = [objective.train[i] for i in range(PAGES)]
        lengths = [len(row["input_ids"]) for row in rows if isinstance(row, dict) and "input_ids" in row]
    return Lengths.of(lengths, stage.options.get("max_length")) if lengths else None


# -- items ------------------------------------------------------------------------------------------------------------


def read_items(
    sampled: SampledItems, info: StartInfo, note: Note = lambda text: None, found: Items | None = None
) -> Items:
    """Every item of a stage's sources; lengths of `SAMPLE` of them, chosen at random, where the tokenizer is here."""
    found, files, draw = found or Items(), dict[str, bool](), random.Random(sampled.seed)
    found.held, views = len(sampled.validation), set[str]()
    sample: list[tuple[str, Item]] = []
    sampled.context.looks = info.config.looks  # known without the processor, too
    for source, record in ((source, record) for source, records in enumerate(sampled.records) for record in records):
        found.items += 1
        if found.items % 1000 == 0:
            note(f"{found.items} items")
        if isinstance(record, Unreadable):
            found.add("not readable", f"{record.where}: {record.why}")
            continue
        try:
            item = sampled.item(source, record)
        except UserError as error:
            found.add(error.rule if isinstance(error, LeftOut) else "not an item", str(error))
            continue
        views |= {ref for refs in item.images.values() for ref in refs if isinstance(ref, str)}
        for name in _missing(item, files):
            found.add("missing image", f"{record.where}: {name}")
        at = len(sample) if len(sample) < SAMPLE else draw.randrange(found.items)
        if at < SAMPLE:
            sample[at : at + 1] = [(record.where, item)]
    found.images, found.views, found.taught = len(files), len(views), sum(len(numbers) for numbers in sampled.numbers)
    found.beside = ", ".join(source.val for source in sampled.sources if found.held and source.val)
    note(f"{found.items} items: counting tokens")
    for where, item in sample if info.processor is not None and not found.problems else ():
        try:
            found.lengths.append(item_length(info.processor, item))
        except UserError as error:
            found.add("image not readable", f"{where}: {error}")
    return found


def _missing(item: Item, files: dict[str, bool]) -> Iterator[str]:
    """The image files of an item that are not there. `files` keeps which are."""
    for ref in (ref for refs in item.images.values() for ref in refs if isinstance(ref, str)):
        name = existing_ref(ref)[0]
        if name not in files:
            files[name] = name.startswith("data:") or Path(split_page(name)[0]).is_file()
        if not files[name]:
            yield name


# -- a batch ----------------------------------------------------------------------------------------------------------


def _measure(recipe: Recipe, stage: Stage, items: SampledItems | None, dry: StageDry) -> None:
    """Run a small batch from the recipe's start, and throw it away; examples are drawn in this process.

    Its time is scaled by tokens to a step, and what it keeps for the backward pass to a batch of the longest examples
    (99 % are shorter). Inputs of layers that run again (`checkpointing`) are not counted; a GPU's peak is measured.
    """
    from accelerate.utils import send_to_device

    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = StageModel(*open_start(recipe.model, seed=recipe.seed, domain=recipe.domain))
    objective = prepare_stage(recipe, stage, trained, items)
    assert objective is not None
    if stage.checkpointing:
        trained.model.activation_checkpointing_enable({"use_reentrant": False})
    trained.module.to(device).train()
    optimizer = build_optimizer(trained.module, stage)
    cache = feature_cache(trained.model.model, stage, dry.samples, items)
    size, passed, step, kept = 1, 0.0, 0.0, 0.0
    for warm in (False, True):  # what a first one takes tells little of the others
        if warm and passed < PATIENCE:
            size = stage.batch if device == "cuda" else min(MEASURED, stage.batch)
        begun = time.perf_counter()
        batch = objective.collate([objective.train[i] for i in range(size)])
        reduced = torch.autocast(device, torch.bfloat16, enabled=stage.precision == "bfloat16")
        with _kept(trained.module) as storages, reduced, image_encoder(cache) if cache else nullcontext():
            loss, _ = run_batch(objective, trained.module, send_to_device(batch, device))
        kept = sum(one.nbytes() for one in storages.values())
        loss.backward()
        passed, begun = time.perf_counter() - begun, time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        step = time.perf_counter() - begun
    longest, mean = (dry.lengths.p99, dry.lengths.mean) if dry.lengths and "input_ids" in batch else (0, 0.0)
    tokens = float(batch["attention_mask"].sum()) if longest and "attention_mask" in batch else 0.0
    per_batch = stage.batch * mean / tokens if tokens else stage.batch / size
    room = stage.batch * longest / batch["input_ids"].numel() if longest else stage.batch / size
    dry.measured, dry.seconds_a_step = size, stage.accumulate * per_batch * passed + step
    dry.memory["activations"] = int(kept * max(1.0, room))
    if isinstance(cache, FeatureCache) and cache.found and dry.items is not None:
        each, times = cache.bytes / len(cache.found), dry.samples / max(1, dry.items.taught)
        dry.features = f"of {counted(dry.items.views, 'view')} kept, each encoded once, not {times:.1f} times: about "
        dry.features += f"{gib(each * dry.items.views)} (at most {gib(BOUND)} in memory)"
    dry.peak = torch.cuda.max_memory_allocated() if device == "cuda" else None


@contextmanager
def _kept(model: nn.Module) -> Iterator[dict[int, torch.UntypedStorage]]:
    """What autograd keeps of a forward pass within, weights apart, by address."""
    weights, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, dict[int, torch.UntypedStorage]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def _room() -> int:
    """Free bytes where a step would run."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available


# -- memory -----------------------------------------------------------------------------------------------------------


def standing_memory(model: nn.Module, stage: Stage) -> dict[str, int]:
    """Bytes that are held through a stage: "weights", "gradients", "optimiser"."""
    weights, learns = 0.0, 0
    bits = stage.lora.bits if stage.lora is not None else None
    for name, parameter in model.named_parameters():
        small = bits is not None and parameter.ndim == 2 and ".base_layer." in name
        weights += parameter.numel() * (bits / 8 if small and bits is not None else FLOAT)
        learns += parameter.numel() * parameter.requires_grad
    states = 2 if stage.optimizer == "adamw" else 1.5  # muon keeps one for matrices, AdamW two for the rest
    return {"weights": int(weights), "gradients": FLOAT * learns, "optimiser": int(FLOAT * states * learns)}
