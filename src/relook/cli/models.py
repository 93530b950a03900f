"""`relook models`: list, inspect, new, convert, merge, export and assemble checkpoints."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from relook.bases import BASES
from relook.cli.common import AsJson, ListOptions, ModelArgument
from relook.plugins import find

NAMES = ", ".join(row.name for row in BASES.values())
app = typer.Typer(help="Models: what ships, what is inside, conversion.")


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the models that ship with relook."""
    from relook.model.loading import inspect, shipped_models

    found = [inspect(name) for name in shipped_models()]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for each in found:
        million = sum(each["parameters"].values()) / 1e6
        print(f"{each['model']:16} {million:6.2f} M parameters   looks: {', '.join(each['looks'])}")
    if not found:
        print("no model ships with this installation; give --model a folder or a hub id")


@app.command("inspect")
def inspect_model(
    model: ModelArgument,
    as_json: AsJson = False,
) -> None:
    """Show a model's parts, parameters, dtype, looks and token ids, without loading its weights."""
    from relook.model.loading import inspect

    found = inspect(model)
    print(json.dumps(found, indent=2) if as_json else describe(found))


@app.command("convert")
def convert_model(
    source: Annotated[str, Argument(metavar="SOURCE", help="A folder or hub id, in either layout.")],
    target: Annotated[Path, Argument(metavar="TARGET", help="A new or empty folder.")],
    to: Annotated[str, Option(metavar="LAYOUT", help="relook or published.")] = "relook",
    encoder_config: Annotated[
        Path | None, Option(metavar="JSON", help="Encoder configs of a published folder with encoders of its own.")
    ] = None,
) -> None:
    """Write a checkpoint in the other layout: relook's own (safetensors, complete) or the published one."""
    from relook.model.loading import read_json
    from relook.model.published import convert

    encoders = read_json(encoder_config) if encoder_config is not None else None
    print(f"written: {convert(source, target, to=to, encoder_config=encoders)}")


@app.command("new", cls=ListOptions)
def new_model(
    base: Annotated[str, Argument(metavar="BASE", help=f"A plain base ({NAMES}): folder or hub id.")],
    out: Annotated[Path, Option("--out", metavar="FOLDER", help="A new or empty folder.")],
    looks: Annotated[
        list[str] | None, Option(metavar="LOOKS", help="region, clip, detection, seg: any; default: region clip.")
    ] = None,
    detection: Annotated[
        str | None, Option(metavar="FOLDER", help="For the look detection: a DINOv2, folder or hub id.")
    ] = None,
    seg: Annotated[str | None, Option(metavar="FOLDER", help="For the look seg: a SAM, folder or hub id.")] = None,
    seed: Annotated[int, Option(metavar="N", help="Seed of new weights: the projectors.")] = 0,
    dtype: Annotated[
        str | None, Option(metavar="DTYPE", help="Of the written weights: float32, bfloat16, float16; else the base's.")
    ] = None,
) -> None:
    """Give a plain base model looks: control tokens, encoders, and projectors that are to be trained."""
    from relook.model.start import Start
    from relook.model.writing import create

    given = [look for words in looks or ["region,clip"] for look in words.split(",") if look]
    start = Start(start=base, looks=given, detection=detection, seg=seg)  # type: ignore[call-arg]  # pydantic's defaults
    print(f"written: {create(start, out, seed=seed, dtype=dtype)}")


@app.command("merge")
def merge_adapter(
    adapter: Annotated[Path, Argument(metavar="ADAPTER", help="A LoRA adapter's folder, as relook train writes it.")],
    out: Annotated[Path, Option("--out", metavar="FOLDER", help="A new or empty folder.")],
    base: Annotated[
        str | None,
        Option(metavar="MODEL", help="Its base model, if no longer at the recorded place: folder or hub id."),
    ] = None,
    dtype: Annotated[
        str, Option(metavar="DTYPE", help="Of the written weights: float32, bfloat16, float16.")
    ] = "float32",
) -> None:
    """Merge a LoRA adapter into its base model and write the result as an ordinary checkpoint."""
    from relook.model.writing import merge

    print(f"written: {merge(adapter, out, base=base, dtype=dtype)}")


@app.command("export")
def export_model(
    model: ModelArgument,
    out: Annotated[Path, Option("--out", metavar="FOLDER", help="A new or empty folder.")],
    engine: Annotated[str, Option("--for", metavar="ENGINE", help="vllm (or transformers: the same folder).")] = "vllm",
) -> None:
    """Write a model as its plain base, which other engines serve; relook ask --base-url then takes region looks."""
    from relook.model.export import export, vllm_command

    written = export(model, out, engine)
    print(f"written: {written}")
    if engine == "vllm":
        print(f"serve:   {vllm_command(written)}")


@app.command("assemble")
def assemble_model(
    text: Annotated[str, Argument(metavar="TEXT", help="A Llama or Qwen2: a folder, a hub id, or a .gguf file.")],
    target: Annotated[Path, Argument(metavar="TARGET", help="A new or empty folder.")],
    vision: Annotated[
        str | None, Option(metavar="MODEL", help="Take vision encoder, views and looks of this relook model.")
    ] = None,
    size: Annotated[
        str | None, Option(metavar="SIZE", help="Or use this tiny size, with an untrained vision encoder.")
    ] = None,
    seed: Annotated[int, Option(metavar="N", help="Seed of new weights.")] = 0,
) -> None:
    """Build a model to train from a text model and a vision encoder (the connection between them is untrained)."""
    find("command", "assemble", {})(text, target, vision=vision, size=size, seed=seed)
    print(f"written: {target}")


def describe(found: dict[str, Any]) -> str:
    """Format what `inspect` returns: a table of parameters per part, then the other fields, one per line."""
    parameters = found["parameters"]
    rows = [*parameters.items(), ("all", sum(parameters.values()))]
    width = max(len(part) for part, _ in rows)
    lines = [f"{part:{width}}  {count:>15,}" for part, count in rows]
    for look, ids in found["token_ids"].items():
        lines.append(f"{look} tokens: " + ", ".join(f"{name} {number}" for name, number in ids.items()))
    for key, value in found.items():
        if key not in ("parameters", "token_ids") and value is not None:
            lines.append(f"{key.replace('_', ' ')}: {_plain(value)}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
