"""Packed rows and looks in training: loss and gradients do not depend on how a batch is laid out or run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_model import LOOK_MIXES, PAD, conversation, grads, image, stack, tiny_config, tiny_model

from relook.data.collate import fill, join_packed
from relook.errors import UserError
from relook.model.packed import Packed

pytestmark = pytest.mark.usefixtures("base")
EQUAL = dict(atol=1e-5, rtol=1e-3)
CHEAP = [(), ("region",), ("clip",), ("detection",), ("clip", "region"), ("region", "detection", "clip"), ("clip",)]


def rows_of(kinds):
    """Conversations of these looks, as forward inputs of one row each and as encoded rows for `join_packed`."""
    forward = [conversation(looks, seed) for seed, looks in enumerate(kinds)]
    encoded = [{k: v[0].tolist() if k in ("input_ids", "labels") else v for k, v in row.items()} for row in forward]
    return forward, encoded


def same(model, one, two, **again):
    """Loss and every gradient of two batches, on the same model."""
    model.train()
    torch.manual_seed(0)
    loss, gradients = grads(model, one)
    torch.manual_seed(0)
    other, expected = grads(model, {**two, **again})
    assert loss == pytest.approx(other, abs=2e-6)
    assert gradients.keys() == expected.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(value, expected[name], **EQUAL, msg=lambda m, n=name: f"{n}: {m}")


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 60))
def test_every_conversation_has_one_place_and_rows_keep_the_limit(lengths, limit) -> None:
    rows = fill(lengths, limit)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= limit or len(row) == 1 for row in rows)
    if all(n <= limit for n in lengths) and len(rows) > 1:  # first fit: no two rows could be one
        held = sorted(sum(lengths[i] for i in row) for row in rows)
        assert held[0] + held[1] > limit


# -- packed equals unpacked


@pytest.mark.parametrize("limit", [200, 10**6], ids=["two rows or more", "one row"])
def test_packed_loss_and_gradients_equal_the_unpacked_batch(limit) -> None:
    """Every kind of conversation, those without a look too."""
    forward, encoded = rows_of(CHEAP)
    packed = join_packed(encoded, PAD, limit)
    assert (len(packed["input_ids"]) == 1) == (limit > 10**5)
    assert len(packed["input_ids"]) < len(forward)
    same(tiny_model(), stack(forward), packed)


def test_packed_seg_looks_and_packs_without_any_look() -> None:
    for kinds in ([("seg",), (), ("seg", "clip")], [(), ("region",), ()]):
        forward, encoded = rows_of(kinds)
        same(tiny_model(), stack(forward), join_packed(encoded, PAD, 10**6))


@pytest.mark.parametrize("mode", [1, 2])
def test_packed_with_mask_modelling(mode) -> None:
    forward, encoded = rows_of(CHEAP)
    same(tiny_model(para_mask_id=mode, para_mask_ratio=1.0), stack(forward), join_packed(encoded, PAD, 10**6))


@pytest.mark.parametrize("changes", [{}, {"position_mode": "sequential"}, {"num_inner_forward_run": 1}], ids=str)
def test_packed_under_checkpointing_and_other_configs(changes) -> None:
    forward, encoded = rows_of(CHEAP)
    model = tiny_model(**changes)
    if not changes:
        model.gradient_checkpointing_enable()
    same(model, stack(forward), join_packed(encoded, PAD, 300))


def test_packed_under_eager_attention() -> None:
    forward, encoded = rows_of(CHEAP[:5])
    model = tiny_model()
    model.set_attn_implementation("eager")
    same(model, stack(forward), join_packed(encoded, PAD, 250))


def test_packed_under_bfloat16_autocast() -> None:
    """Products in bfloat16 round differently in another layout, and no more than that."""
    forward, encoded = rows_of(CHEAP)
    model = tiny_model().train()
    losses = []
    for batch in (stack(forward), join_packed(encoded, PAD, 10**6)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(**batch)
        out.loss.backward()
        losses.append(out.loss.item())
    assert out.logits.dtype == torch.bfloat16
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_packed_neighbors_do_not_affect_each_other() -> None:
    """Isolation in itself: other words and other images in the first conversation, the same logits in the second."""
    model = tiny_model()
    _, (first, other, second) = rows_of([("clip",), ("clip", "region"), ("clip", "clip")])
    logits = []
    for neighbour in (first, other):
        batch = join_packed([neighbour, second], PAD, 10**6)
        with torch.no_grad():
            out = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        logits.append(out[0, batch["conversation_ids"][0] == 1])
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-4)


def test_positions_for_varlen_kernels_start_anew_and_hold_no_padding() -> None:
    """What flash attention would be given. (The kernels themselves need a GPU and are not run here.)"""
    from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

    numbers = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    given = Packed(numbers, "flash_attention_2").full_inputs(torch.zeros(3, 1, 7, dtype=torch.long), torch.float32)
    assert given["attention_mask"] is None
    assert given["position_ids"][0].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    (starts, _), _ = prepare_fa_kwargs_from_position_ids(given["position_ids"][0])
    assert starts.tolist() == [0, 3, 7]
    for wrong, said in (([[0, 1, 0]], "one piece"), ([[0, 0], [0, 1]], "one row")):
        with pytest.raises(UserError, match=said):
            Packed(torch.tensor(wrong), "flash_attention_2")


# -- looks in training


def test_checkpointing_changes_no_gradient_with_any_mix_of_looks_and_a_mask() -> None:
    batch = stack([conversation(looks, seed) for seed, looks in enumerate(LOOK_MIXES)])
    for mode in (0, 2):
        plain, checkpointed = (tiny_model(para_mask_id=mode, para_mask_ratio=1.0).train() for _ in range(2))
        checkpointed.gradient_checkpointing_enable()
        loss, gradients = grads(plain, batch)
        again, expected = grads(checkpointed, batch)
        assert loss == pytest.approx(again, abs=1e-6)
        for name, value in gradients.items():
            torch.testing.assert_close(value, expected[name], **EQUAL, msg=lambda m, n=name: f"{n}: {m}")


def loss_of(model, batch, **more):
    with torch.no_grad():
        return model.train()(**batch, **more).loss.item()


def test_each_conversation_of_a_batch_may_have_its_own_mask_mode() -> None:
    """Against the config's mode on each conversation alone."""
    forward, encoded = rows_of([("clip",), ("clip",), ("clip", "clip"), ()])
    labels = [int((row["labels"][0, 1:] >= 0).sum()) for row in forward]
    modes = [0, 1, 2, 2]
    alone = [loss_of(tiny_model(para_mask_id=m, para_mask_ratio=1.0), r) for m, r in zip(modes, forward, strict=True)]
    expected = sum(n * loss for n, loss in zip(labels, alone, strict=True)) / sum(labels)
    for batch in (stack(forward), join_packed(encoded, PAD, 10**6)):
        assert loss_of(tiny_model(), batch, para_mask_modes=torch.tensor(modes)) == pytest.approx(expected, abs=2e-6)


def test_the_mask_is_drawn_once_a_batch_or_for_each_sample() -> None:
    """At one half: a batch is all masked or not at all, as published; samples are so one by one, about every other."""
    rows = [conversation(("clip",), 5) for _ in range(4)]
    batch = stack(rows)
    hidden = {"batch": [], "sample": []}
    for draw, shares in hidden.items():
        model = tiny_model(para_mask_id=1, para_mask_ratio=0.5, para_mask_draw=draw).train()
        seen: list = []
        model.model.language_model.register_forward_pre_hook(
            lambda _m, _a, given, seen=seen: seen.append(given["inputs_embeds"]), with_kwargs=True
        )
        torch.manual_seed(0)
        for _ in range(12):
            seen.clear()
            with torch.no_grad():
                model(**batch, use_cache=False)
            zero = (seen[-1] == 0).all(-1).any(1)
            shares.append(int(zero.sum()))
    assert set(hidden["batch"]) == {0, 4}
    assert not set(hidden["sample"]) <= {0, 4} and 12 <= sum(hidden["sample"]) <= 36
    with pytest.raises(ValueError, match="para_mask_draw"):
        tiny_config(para_mask_draw="row")


def tower_patches(model, batch):
    """Patches that go through the vision tower in one step with gradients, and the step's gradients."""
    pushed = []
    hook = model.model.visual.register_forward_pre_hook(lambda _m, args: pushed.append(len(args[0])))
    out = grads(model, batch)
    hook.remove()
    return sum(pushed), out


def test_a_clip_look_takes_the_first_looks_features_when_the_view_is_the_same() -> None:
    grid = (1, 4, 6)
    row = conversation(("clip",), 3, grid=grid, second=grid)
    shown = image(grid, 3)["pixel_values"]
    again = {**row, "clip_pixel_values": shown}
    other = conversation(("clip", "region"), 4)
    batch = stack([again, other, conversation(("clip",), 5)])
    patches = sum(len(batch[name]) for name in ("pixel_values", "clip_pixel_values"))
    count, (loss, gradients) = tower_patches(tiny_model().train(), batch)
    assert count == patches - len(shown)
    # the same with features of their own: a difference in the first look that no one can see
    apart = {**batch, "pixel_values": batch["pixel_values"].clone()}
    apart["pixel_values"][0, 0] *= 1 + 1e-6
    count, (expected, theirs) = tower_patches(tiny_model().train(), apart)
    assert count == patches
    assert loss == pytest.approx(expected, abs=1e-6)
    for name, value in gradients.items():
        torch.testing.assert_close(value, theirs[name], **EQUAL, msg=lambda m, n=name: f"{n}: {m}")


def test_the_control_token_is_no_target_but_its_start_and_end_are(tiny_vlm) -> None:
    """From the ids of a real item with two looks, not from the code that makes them."""
    from PIL import Image

    from relook.looks import LOOKS as TABLE
    from relook.looks import write_call

    processor = tiny_vlm(("region", "clip", "detection")).processor
    page = Image.new("RGB", (60, 60), "white")
    says = [write_call("clip"), write_call("detection"), "9.30"]
    turns = [("user", "<image>\nHow much?"), ("assistant", says[0]), ("user", "<clip_image>"), ("assistant", says[1])]
    turns += [("user", "<detection_image>"), ("assistant", says[2])]
    item = {
        "messages": [{"role": role, "content": content} for role, content in turns],
        **{key: [page] for key in ("images", "clip_images", "detection_images")},
    }
    row = processor.encode_item(item)
    tokens = processor.tokenizer.convert_ids_to_tokens(row["input_ids"])
    learnt = {token for token, label in zip(tokens, row["labels"], strict=True) if label >= 0}
    for look in ("clip", "detection"):
        spec = TABLE[look]
        assert {spec.start, spec.end} <= learnt and spec.action in tokens and spec.action not in learnt
