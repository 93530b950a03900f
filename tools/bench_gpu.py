"""Training steps of the 2B shape (random weights) with each look, beside stock Qwen2-VL on the same tokens.

    python tools/bench_gpu.py --out out/bench-gpu     # one GPU of 80 GB, under ten minutes
    python tools/bench_gpu.py --tiny --device cpu     # the same code on a small shape

Every row of a batch is a conversation of `--length` tokens: an image (324), a question, the call, what comes back (324
of a crop or of the tower, 256 of DINOv2 or SAM), text up to the length. As in the 2B recipes the vision tower and the
encoders rest, weights are float32 and products bfloat16, AdamW steps. Stock Qwen2-VL reads as many tokens, with
ordinary images in place of what comes back, and learns the same parts.

Model FLOPs are counted by torch (`FlopCounterMode`: matrix products, convolutions and attention, forward and backward;
2 for a multiplication and an addition; attention in full, though half of it is masked) in a step of one row without
checkpointing, times the batch. The number is the same with checkpointing: layers that run again are work, not use.
Utilisation is that number over the seconds of a step (median of `--steps`) and the GPU's dense bfloat16 peak (`PEAKS`,
or --peak). It holds what resting towers cost, and the time of AdamW. On a CPU torch counts no attention, and there is
no peak.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from relook.bases import HUB
from relook.looks import LOOKS
from relook.model import VPTQwen2VLConfig, VPTQwen2VLForConditionalGeneration
from relook.model.encoders import encoder_config
from relook.model.published import look_token_ids
from relook.train.optim import set_trainable

BASE = "Qwen/Qwen2-VL-2B-Instruct"
WAYS = ("none", "region", "clip", "detection", "seg")
PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}  # dense bfloat16 FLOP/s, from data sheets (SXM)
GRIDS = {"none": (36, 36), "region": (36, 36), "clip": (36, 36), "detection": (32, 32), "seg": (32, 32)}  # patches
WORD = 1000  # some token that means nothing here
FIRST = {True: 1100, False: 151657}  # id of the first control token; in small, or not
TINY = {
    "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                           "mrope_section": [2, 3, 3]}},
    "vision": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2},
    "detection": {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2},
    "seg": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 32, "output_channels": 12,
            "global_attn_indexes": []},
}  # fmt: skip


def shape(tiny: bool) -> dict[str, Any]:
    """Config values of the plain 2B model; `tiny`: of the same in small."""
    values = HUB[BASE].config()
    if tiny:
        values["text_config"] |= {**TINY["text"], "vocab_size": 2048, "max_window_layers": 2}
        values["vision_config"] |= TINY["vision"]
        values["text_config"] |= {f"{name}_token_id": 1010 + n for n, name in enumerate(("bos", "eos", "pad"))}
        ids = ("image", "video", "vision_start", "vision_end")
        values |= {f"{name}_token_id": 1013 + number for number, name in enumerate(ids)}
    return values


def config(tiny: bool) -> VPTQwen2VLConfig:
    """The 2B shape with all looks."""
    looks = ("clip", "detection", "seg")
    values: dict[str, Any] = {"vision_encoder_ls": [LOOKS[look].encoder for look in looks], "region": True}
    for number, look in enumerate(looks):
        values |= look_token_ids(look, first=FIRST[tiny] + 25 * number)
    encoders = {look: encoder_config(look, None).to_diff_dict() for look in ("detection", "seg")}
    if tiny:
        encoders = {look: TINY[look] for look in encoders}
    return VPTQwen2VLConfig.from_dict({**shape(tiny), **values, "encoders": encoders, "num_inner_forward_run": 2})


def build(device: str, tiny: bool, stock: bool) -> Any:
    """A model of random weights, float32, of which all learns but towers and encoders."""
    with torch.device(device):
        if stock:
            model: Any = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_dict(shape(tiny)))
        else:
            model = VPTQwen2VLForConditionalGeneration(config(tiny))
    set_trainable(model, ["visual"] if stock else ["visual", "encoders"])
    return model.train()


def row(made: VPTQwen2VLConfig, way: str, length: int, stock: bool) -> list[int]:
    """Token ids of one conversation; `stock`: with image pads for everything that is seen."""
    image, second = made.image_token_id, GRIDS[way][0] * GRIDS[way][1] // 4
    ids = [WORD] * 8 + [image] * 324 + [WORD] * 16
    if way == "region":
        ids += [WORD] * 6 + [image] * second
    elif way != "none":
        call = made.reencode_ids(way)
        assert call is not None
        told = [WORD, WORD, WORD] if stock else [call.start, call.action, call.action + 1]
        ids += told + [image if stock else call.pad] * second
    if len(ids) >= length:
        raise SystemExit(f"--length {length} is too short: what is seen takes {len(ids)} tokens")
    return ids + [WORD] * (length - len(ids))


def batch(made: VPTQwen2VLConfig, way: str, rows: int, length: int, device: str, stock: bool) -> dict[str, Any]:
    """The forward pass's arguments; every look sees what the first look saw, at its own resolution."""
    vision = made.vision_config
    channels = 3 * vision.temporal_patch_size * vision.patch_size**2
    ids = torch.tensor([row(made, way, length, stock)] * rows, device=device)
    images = torch.rand(1296, channels, device=device)
    grids, pixels = [(1, 36, 36)], [images]
    if way == "region" or (stock and way != "none"):
        grids.append((1, *GRIDS[way]))
        pixels.append(torch.rand(GRIDS[way][0] * GRIDS[way][1], channels, device=device))
    found = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.where(ids == WORD, ids, -100),
        "pixel_values": torch.cat(pixels).repeat(rows, 1),
        "image_grid_thw": torch.tensor(grids * rows, device=device),
    }
    if stock:
        return found | {"mm_token_type_ids": (ids == made.image_token_id).int()}
    if way == "clip":
        found |= {"clip_pixel_values": images.repeat(rows, 1),
                  "clip_images_grid_thw": torch.tensor([(1, 36, 36)] * rows, device=device)}  # fmt: skip
    if way in ("detection", "seg"):
        side = 224 if way == "detection" else 1024
        found[LOOKS[way].item_key] = torch.rand(rows, 3, side, side, device=device)
    return found


def step(model: Any, inputs: dict[str, Any], optimiser: torch.optim.Optimizer | None) -> float:
    """One step of training; returns its seconds. Without an optimiser, gradients are thrown away."""
    device = inputs["input_ids"].device
    _settle(device)
    begun = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16):
        loss = model(**inputs, use_cache=False).loss
    loss.backward()
    if optimiser is not None:
        optimiser.step()
    model.zero_grad(set_to_none=True)
    _settle(device)
    return time.perf_counter() - begun


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def flops(model: Any, inputs: dict[str, Any]) -> int:
    """Of a forward and a backward pass, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        step(model, inputs, None)
    return counter.get_total_flops()


def fits(model: Any, optimiser: Any, inputs: Any) -> bool:
    """Whether a step of this batch finds room."""
    try:
        step(model, inputs(), optimiser)
    except torch.cuda.OutOfMemoryError:
        model.zero_grad(set_to_none=True)
        _forget()
        return False
    return True


def largest(try_out: Any, most: int) -> int:
    """The largest batch that fits, up to `most`: doubled while it does, then halved in between."""
    good, bad = 0, most + 1
    size = 1
    while size <= most and try_out(size):
        good, size = size, 2 * size
    bad = min(size, bad)
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if try_out(middle) else (good, middle)
    return good


def measure(options: argparse.Namespace, peak: float | None) -> list[dict[str, Any]]:
    """An entry for stock and relook, each look, with and without checkpointing."""
    entries = []
    for stock in (True, False):
        model = build(options.device, options.tiny, stock)
        learning = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(learning, lr=1e-5, fused=options.device == "cuda")
        for way in options.looks:
            work = flops(model, batch(config(options.tiny), way, 1, options.length, options.device, stock))
            for checkpointing in (False, True):
                if checkpointing:
                    model.activation_checkpointing_enable({"use_reentrant": False})
                told = {"model": "stock" if stock else "relook", "look": way, "checkpointing": checkpointing}
                entries.append(told | timed(model, optimiser, way, stock, work * options.batch, options, peak))
                print(json.dumps(entries[-1]), flush=True)
                if checkpointing:
                    model.activation_checkpointing_disable()
        del model, optimiser, learning
        _forget()
    return entries


def timed(
    model: Any, optimiser: Any, way: str, stock: bool, work: int, options: argparse.Namespace, peak: float | None
) -> dict[str, Any]:
    """Seconds of a step and what follows from them (None where the batch does not fit); the largest batch that fits."""

    def inputs(rows: int) -> dict[str, Any]:
        return batch(config(options.tiny), way, rows, options.length, options.device, stock)

    seconds = memory = None
    if fits(model, optimiser, lambda: inputs(options.batch)):
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        given = inputs(options.batch)
        times = [step(model, given, optimiser) for _ in range(options.warmup + options.steps)]
        seconds = statistics.median(times[options.warmup :])
        memory = torch.cuda.max_memory_allocated() if options.device == "cuda" else None
    return {
        "batch": options.batch,
        "length": options.length,
        "flops": work,
        "seconds": seconds,
        "steps_per_s": 1 / seconds if seconds else None,
        "utilisation": work / seconds / peak if seconds and peak else None,
        "memory": memory,
        "largest_batch": largest(lambda rows: fits(model, optimiser, lambda: inputs(rows)), options.most),
    }


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown: a line for each look, with and without checkpointing, and how long stock takes for the same tokens."""
    stock = {(e["look"], e["checkpointing"]): e for e in entries if e["model"] == "stock"}
    heads = ("look", "checkpointing", "steps/s", "MFU", "TFLOPs a step", "GiB", "largest batch")
    heads += ("stock steps/s", "MFU", "over stock")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for e in (e for e in entries if e["model"] == "relook"):
        plain = stock[e["look"], e["checkpointing"]]
        over = e["seconds"] / plain["seconds"] if e["seconds"] and plain["seconds"] else None
        cells = [e["look"], "yes" if e["checkpointing"] else "no", _n(e["steps_per_s"]), _share(e["utilisation"]),
                 _n(e["flops"] / 1e12), _n(e["memory"] and e["memory"] / 2**30), str(e["largest_batch"]),
                 _n(plain["steps_per_s"]), _share(plain["utilisation"]), f"{over:.2f}x" if over else "-"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _n(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a shape of a few thousand parameters")
    parser.add_argument("--looks", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a conversation")
    parser.add_argument("--steps", type=int, default=5, help="that are measured")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--most", type=int, default=64, help="no larger batch is tried")
    parser.add_argument("--peak", type=float, help="TFLOP/s in bfloat16, dense; known for " + ", ".join(PEAKS))
    parser.add_argument("--out", type=Path, help="folder for bench.json and bench.md")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here; give --tiny --device cpu to try the script out")
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    peak = options.peak * 1e12 if options.peak else next((p for n, p in PEAKS.items() if n in name), None)
    torch.manual_seed(0)
    entries = measure(options, peak)
    told = f"{name}, torch {torch.__version__}, batch {options.batch} x {options.length} tokens\n\n{table(entries)}\n"
    print(told)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "bench.json").write_text(
            json.dumps({"device": name, "peak": peak, "entries": entries}, indent=1)
        )
        (options.out / "bench.md").write_text(told)


if __name__ == "__main__":
    main()
