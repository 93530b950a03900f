"""forward and generate against `support.oracle`, over drawn conversations, keyword arguments and caches.

The oracle is the stock base with one uncached full forward a call, written from the paper. Whatever way a conversation
goes in, its logits are the oracle's, or the model says in one sentence why it cannot.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.oracle import Oracle
from support.tiny_model import LOOK_MIXES, conversation, grads, stack, tiny_model
from transformers import DynamicCache

from relook.bases import BASES
from relook.errors import UserError

CLOSE = 2e-4  # logits are of order 1 to 10
QUICK = dict(
    deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)

EVERY = pytest.mark.parametrize("base", BASES)


@cache
def pair(base="qwen2_vl_vpt"):
    model = tiny_model(3, base=base)
    return model, Oracle(model)


STRAY = ("clip_action", "detection_action_start", "detection_action")
SIDES = st.sampled_from([2, 4, 6, 8])
GRIDS = st.tuples(st.just(1), SIDES, SIDES)


def rows(*looks):
    """What a conversation is drawn from: `build` makes it."""
    return st.fixed_dictionaries(
        {
            "looks": st.lists(st.sampled_from(["region", "clip", "detection", *looks]), max_size=3),
            "seed": st.integers(0, 99),
            "grid": GRIDS,
            "second": GRIDS,
            "answer": st.integers(2, 6),
            "stray": st.lists(
                st.sampled_from(["clip_action", "detection_action_start", "detection_action"]), max_size=2
            ),
        }
    )


def build(drawn, base="qwen2_vl_vpt"):
    """The conversation, with pieces of calls that no call needs before its end."""
    config = pair(base)[0].config
    pieces = [getattr(config, f"{name}_id") for name in drawn["stray"]]
    row = conversation(**{name: value for name, value in drawn.items() if name != "stray"})
    for name, filler in (("input_ids", pieces), ("labels", [-100] * len(pieces))):
        row[name] = torch.cat([row[name][:, :-2], torch.tensor([filler], dtype=torch.long), row[name][:, -2:]], dim=1)
    return row


def pads(model):
    return [model.config.image_token_id, *(model.config.reencode_ids(look).pad for look in model.config.reencodings)]


def images(row):
    return {name: value for name, value in row.items() if name not in ("input_ids", "labels", "attention_mask")}


def check_whole(batch, side, keep, use_cache, base):
    """A padded batch of conversations in one forward."""
    model, oracle = pair(base)
    batch = [build(drawn, base) for drawn in batch]
    whole = stack(batch, side)
    keep = keep if side == "left" else 0
    if keep:
        whole.pop("labels")
    with torch.no_grad():
        expected = [oracle.logits(row) for row in batch]
        out = model(**whole, use_cache=use_cache, logits_to_keep=keep)
    for number, want in enumerate(expected):
        real = whole["attention_mask"][number].bool()
        found = out.logits[number][real[-out.logits.shape[1] :]]
        torch.testing.assert_close(found, want[-len(found) :], atol=CLOSE, rtol=1e-4)
    losses = [
        torch.nn.functional.cross_entropy(want[:-1], row["labels"][0, 1:], ignore_index=-100, reduction="sum")
        for want, row in zip(expected, batch, strict=True)
    ]
    learnt = sum(int((row["labels"][0, 1:] != -100).sum()) for row in batch)
    if out.loss is not None:
        torch.testing.assert_close(out.loss, sum(losses) / learnt, atol=CLOSE, rtol=1e-4)


def check_continued(row, cuts, base):
    """A conversation in pieces over one cache, each piece with the images whose pads begin in it."""
    model, oracle = pair(base)
    row = build(row, base)
    with torch.no_grad():
        expected = oracle.logits(row)
        for begin, out in continued(model, row, cuts):
            logits = out.logits[0]
            torch.testing.assert_close(logits, expected[begin : begin + len(logits)], atol=CLOSE, rtol=1e-4)


def continued(model, row, cuts):
    """(begin, output) of every piece. Cuts inside an image's pads are moved before it."""
    ids = row["input_ids"]
    edges = [0]
    for cut in sorted({cut % ids.shape[1] for cut in cuts}):
        while int(ids[0, cut]) in pads(model):
            cut -= 1
        edges += [cut] if cut > edges[-1] else []
    positions = model._positions(ids, None, row.get("image_grid_thw"), None)
    past, state = DynamicCache(), None
    for begin, end in zip(edges, [*edges[1:], ids.shape[1]], strict=True):
        out = model(
            input_ids=ids[:, begin:end],
            position_ids=positions[..., begin:end],
            past_key_values=past,
            use_cache=True,
            look_states=state,
            **shown(model, row, begin, end),
        )
        state = out.look_states
        yield begin, out


def shown(model, row, begin, end):
    """The images of `row` whose pads lie in columns [begin, end)."""
    ids, kept = row["input_ids"][0].tolist(), {}
    grids = [("image", "pixel_values", "image_grid_thw"), ("clip", "clip_pixel_values", "clip_images_grid_thw")]
    for kind, pixels, grid in grids:
        pad = model.config.image_token_id if kind == "image" else model.config.reencode_ids(kind).pad
        if grid not in row:
            continue
        sizes = row[grid].prod(1).tolist()
        found = [i for i, at in enumerate(starts(ids, pad, [n // 4 for n in sizes])) if begin <= at < end]
        if found:
            split = row[pixels].split(sizes)
            kept |= {pixels: torch.cat([split[i] for i in found]), grid: row[grid][found]}
    for kind in ("detection", "seg"):
        if f"{kind}_images" in row:
            pad, images = model.config.reencode_ids(kind).pad, row[f"{kind}_images"]
            found = [i for i, at in enumerate(starts(ids, pad, [256] * len(images))) if begin <= at < end]
            kept |= {f"{kind}_images": images[found]} if found else {}
    return kept


def starts(ids, pad, lengths):
    """Column of the first pad of each image, `lengths` in pads."""
    columns = [i for i, token in enumerate(ids) if token == pad]
    return [columns[sum(lengths[:n])] for n in range(len(lengths))]


WHOLE = dict(
    batch=st.lists(rows(), min_size=1, max_size=3),
    side=st.sampled_from(["left", "right"]),
    keep=st.sampled_from([0, 0, 1, 3]),
    use_cache=st.sampled_from([None, True, False]),
)
CONTINUED = dict(row=rows(), cuts=st.lists(st.integers(1, 500), min_size=1, max_size=4))


@EVERY
@settings(max_examples=25, **QUICK)
@given(**WHOLE)
def test_forward_equals_the_oracle(base, batch, side, keep, use_cache):
    check_whole(batch, side, keep, use_cache, base)


@EVERY
@settings(max_examples=25, **QUICK)
@given(**CONTINUED)
def test_a_continued_cache_equals_the_oracle(base, row, cuts):
    try:
        check_continued(row, cuts, base)
    except UserError:
        return  # refused, in a sentence


@EVERY
@settings(max_examples=8, **QUICK)
@given(row=rows(), start=st.sampled_from([None, "clip", "detection"]))
def test_generate_equals_the_oracle(base, row, start):
    """Greedy tokens after a prompt, with a call begun at its end or not."""
    model, oracle = pair(base)
    row = build(row, base)
    prompt = images(row) | {"input_ids": row["input_ids"][:, :-4]}
    if start:
        prompt["input_ids"][:, -1] = model.config.reencode_ids(start).start
    with torch.no_grad():
        kwargs = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, suppress_tokens=pads(model))
        found = model.generate(**prompt, **kwargs)[0, -5:].tolist()
        assert found == oracle.generate(prompt, 5, (*pads(model), model.config.para_end_id))


@EVERY
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_the_oracle(base, checkpointing):
    """One pass over a batch against the literal procedure row by row, through every condition and encoder."""
    model = tiny_model(3, base=base).train()
    oracle = Oracle(model)
    rows = [conversation(looks, seed) for seed, looks in enumerate(LOOK_MIXES)]
    for weight in oracle.weights.values():
        weight.requires_grad_()
    learnt = sum(int((row["labels"][0, 1:] != -100).sum()) for row in rows)
    for row in rows:
        logits, labels = oracle.logits(row)[:-1], row["labels"][0, 1:]
        (torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / learnt).backward()
    shared = [*oracle.stock.named_parameters(), *model.named_parameters()]  # of the latter its encoders have one
    expected = {name: p.grad.clone() for name, p in shared if p.grad is not None}
    expected |= {f"projectors.{name}": w.grad for name, w in oracle.weights.items() if w.grad is not None}
    if checkpointing:
        model.gradient_checkpointing_enable()
    found = grads(model, stack(rows))[1]
    assert found.keys() == expected.keys() and {name.split(".")[0] for name in found} > {"encoders", "projectors"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@EVERY
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(**{**WHOLE, "batch": st.lists(rows("seg"), min_size=1, max_size=4)})
def test_forward_equals_the_oracle_long(base, batch, side, keep, use_cache):
    check_whole(batch, side, keep, use_cache, base)


@pytest.mark.slow
@EVERY
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(**{**CONTINUED, "row": rows("seg")})
def test_a_continued_cache_equals_the_oracle_long(base, row, cuts):
    try:
        check_continued(row, cuts, base)
    except UserError:
        return
