"""A dry run as people read it: one block a stage. Knows text; all numbers are `dryrun`'s."""

from __future__ import annotations

from relook.train.dryrun import DryRun, Items, StageDry
from relook.train.memory import gib


def table(found: DryRun) -> str:
    """The whole report."""
    weights = "its weights are here" if not found.missing else f"its weights are not here: {_short(found.missing)}"
    lines = [f"{found.recipe}: from {found.start}; {weights}"]
    for stage in found.stages:
        lines += ["", *_stage(stage)]
    return "\n".join(lines)


def _stage(stage: StageDry) -> list[str]:
    lines = [f"stage {stage.name} ({stage.objective}): {_counted(stage.steps, 'step')}, {stage.samples:,} samples"]
    rows = [*stage.learns.items(), ("all", tuple(map(sum, zip(*stage.learns.values(), strict=True))))]
    width = max(len(part) for part, _ in rows)
    lines.append(f"  {'learns':{width}}  {'parameters':>15}  {'of':>15}")
    lines += [f"  {part:{width}}  {learns:>15,}  {total:>15,}" for part, (learns, total) in rows]
    if stage.items is not None:
        lines += _items(stage.items)
    untold = "not counted: the examples are no text, the tokenizer is not here, or the data will not do"
    lines.append(f"  tokens   {stage.lengths or untold}")
    parts = ", ".join(f"{name} {gib(size)}" for name, size in stage.memory.items())
    lines.append(f"  memory   about {gib(sum(stage.memory.values()))} a device: {parts}")
    if stage.towers:
        lines.append(f"           and what the towers that learn keep of their images: {', '.join(stage.towers)}")
    if stage.peak is not None:
        lines.append(f"           measured: {gib(stage.peak)} at most")
    if stage.seconds is not None and stage.seconds_a_step is not None:
        lines.append(f"  time     about {_span(stage.seconds)}: {stage.seconds_a_step:.3g} s a step (median of three)")
    else:
        lines.append(f"  time     {stage.unmeasured}")
    return lines


def _items(found: Items) -> list[str]:
    kept = f" ({found.items - found.held:,} to learn from, {found.held:,} held out)" if found.held else ""
    lines = [f"  items    {found.items:,}{kept}, {_counted(found.images, 'image file')}"]
    if not found.problems:
        lines[0] += "; every image is there, every token is known"
    for kind, count in found.problems.most_common():
        lines.append(f"           {count:,} x {kind}")
        lines += [f"             {where}" for where in found.told[kind]]
    return lines


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _short(reason: str) -> str:
    """A reason without what the hub's library said about it."""
    return reason.partition(" (")[0]


def _span(seconds: float) -> str:
    """Example: _span(4000) is "1.1 hours"."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size or (unit == "hours" and seconds >= size):
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
