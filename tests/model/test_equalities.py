"""Without looks the model equals the stock one of its base; batching, padding and caching never change its numbers."""

from __future__ import annotations

import pytest
import torch
from support.oracle import stock_model
from support.tiny_model import LOOK_MIXES, conversation, grads, image, stack, tiny_config, tiny_model
from transformers import DynamicCache

from relook.errors import UserError
from relook.model.classes import model_class
from relook.model.projector import ConditionedProjector
from relook.model.segments import find_calls, find_image_spans

CLOSE = dict(atol=4e-5, rtol=1e-4)  # under one thread, sums in another order differ by 2.7e-5


pytestmark = pytest.mark.usefixtures("base")


@pytest.fixture(scope="module")
def model(base):
    return tiny_model()


def logits(model, batch):
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


@pytest.mark.parametrize("side", ["right", "left"])
def test_without_a_look_equals_the_base_bit_for_bit(model, side):
    batch = stack([conversation((), 1), conversation(("region",), 2), conversation((), 3, grid=(1, 2, 8))], side)
    kinds = (batch["input_ids"] == model.config.image_token_id).int()
    theirs = stock_model(model)(**batch, mm_token_type_ids=kinds)
    ours = model(**batch)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)


@pytest.mark.parametrize("side", ["right", "left"])
def test_batch_equals_rows_one_by_one(model, side):
    """Every kind of row in one batch, several looks in a row, either padding."""
    rows = [conversation(looks, seed) for seed, looks in enumerate(LOOK_MIXES)]
    batch = stack(rows, side)
    together = logits(model, batch)
    for row, mask, ours in zip(rows, batch["attention_mask"].bool(), together, strict=True):
        torch.testing.assert_close(ours[mask], logits(model, row)[0], **CLOSE)


def test_condition_matters(model):
    """Another question before the call, same images: the tokens of the second look differ."""
    one = conversation(("clip",), 1)
    other = {**one, "input_ids": one["input_ids"].clone()}
    place = (one["input_ids"][0] == model.config.vision_end_token_id).nonzero()[0, 0] + 1
    other["input_ids"][0, place] = (other["input_ids"][0, place] + 1) % 100
    call = (one["input_ids"][0] == model.config.clip_action_id).nonzero()[0, 0]
    states = []
    for batch in (one, other):
        caught = []
        hook = model.projectors["clip"].register_forward_hook(lambda _m, _i, out, caught=caught: caught.append(out[0]))
        logits(model, batch)
        hook.remove()
        states.append(caught[0])
    assert call > place
    assert not torch.allclose(states[0], states[1], atol=1e-3)


def positions_pushed(model, batch, **kwargs):
    """Real token positions that go through the language model during one call."""
    pushed = []

    def count(_module, _args, given):
        width = given["inputs_embeds"].shape[1]
        pushed.append(int(given["attention_mask"][:, -width:].sum()))

    hook = model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
    out = model(**batch, **kwargs)
    hook.remove()
    return sum(pushed), out


@pytest.mark.parametrize("looks", [("clip",), ("detection", "clip")])
def test_one_pass_runs_every_position_once_and_a_mask_only_repeats_the_prefix(model, looks):
    batch = stack([conversation(looks, 4)])
    length = batch["input_ids"].shape[1]
    assert positions_pushed(model, batch)[0] == length
    prefix = (
        max((batch["input_ids"][0] == model.config.reencode_ids(n).start).nonzero()[-1, 0].item() for n in looks) + 1
    )
    masked = tiny_model(para_mask_id=1, para_mask_ratio=1.0).train()
    assert positions_pushed(masked, batch)[0] == prefix + length


def test_one_pass_gradients_equal_two_passes():
    """Gradient checkpointing drops the cache; the model then runs the prefix as a pass of its own: the same numbers."""
    batch = stack([conversation(looks, seed) for seed, looks in enumerate(LOOK_MIXES)])
    one, two = tiny_model().train(), tiny_model().train()
    two.gradient_checkpointing_enable()
    loss, gradients = grads(one, batch)
    again, expected = grads(two, batch)
    assert loss == pytest.approx(again, abs=1e-6)
    assert gradients.keys() == expected.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mode", [1, 2])
def test_mask_hides_the_turns_it_names(mode):
    """Pass 2 sees zeros strictly between the turn's <|im_start|> and <|im_end|>, and everything else."""
    model = tiny_model(para_mask_id=mode, para_mask_ratio=1.0).train()
    batch = stack([conversation(("clip",), 5)])
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _m, _a, given: seen.append(given["inputs_embeds"]), with_kwargs=True
    )
    model(**batch)
    hook.remove()
    ids, zero = batch["input_ids"][0].tolist(), (seen[-1][0] == 0).all(-1)
    starts = [i for i, t in enumerate(ids) if t == model.config.para_start_id]
    ends = [i for i, t in enumerate(ids) if t == model.config.para_end_id]
    expected = torch.zeros(len(ids), dtype=torch.bool)
    for turn in (1,) if mode == 1 else (1, 3):
        expected[starts[turn] + 1 : ends[turn]] = True
    assert torch.equal(zero, expected)


def test_rows_without_a_call_are_never_masked():
    batch = stack([conversation((), 1), conversation(("region",), 2)])
    plain, masked = tiny_model().train(), tiny_model(para_mask_id=2, para_mask_ratio=1.0).train()
    assert torch.equal(logits(plain, batch), logits(masked, batch))
    mixed = stack([conversation(("clip",), 3), conversation((), 1)])  # beside a row that is masked
    real = mixed["attention_mask"].bool()
    expected, found = logits(plain, mixed), logits(masked, mixed)
    torch.testing.assert_close(found[1, real[1]], expected[1, real[1]], **CLOSE)
    assert not torch.allclose(found[0, real[0]], expected[0, real[0]], **CLOSE)


def test_an_image_answers_the_latest_call_of_its_kind_before_it(model):
    ids = {look: model.config.reencode_ids(look) for look in ("clip", "detection")}
    row = conversation(("clip", "detection", "clip"))["input_ids"].reshape(1, -1)
    calls = find_calls(row, ids)
    assert [(call.look, call.order) for call in calls] == [("clip", 0), ("detection", 1), ("clip", 2)]
    spans = find_image_spans(row, "clip", ids["clip"].pad, [6, 6], calls)
    assert [span.call for span in spans] == [calls[0], calls[2]]
    assert find_image_spans(row, "clip", ids["clip"].pad, [6, 6], calls[2:])[0].call is None  # its call comes later


def test_input_grads_published_cuts_embeddings_and_vision():
    batch = stack([conversation(("clip", "detection"), 3)])
    untied = dict(tie_word_embeddings=False)
    _, full = grads(tiny_model(**untied).train(), batch)
    _, published = grads(tiny_model(input_grads="published", **untied).train(), batch)
    cut = ("model.visual.", "model.language_model.embed_tokens", "encoders.")
    assert all(any(n.startswith(c) for n in full) for c in cut)
    assert not [n for n in published if n.startswith(cut)]
    assert [n for n in published if n.startswith("projectors.")]


def test_cache_continues_where_the_full_forward_would_be(model):
    """Prefill a batch with looks, then token by token: the logits of one full forward."""
    rows = [
        conversation(looks, seed, answer=6)
        for seed, looks in enumerate([("clip",), (), ("detection", "region"), ("seg",)])
    ]
    batch = stack(rows, "left")
    full = logits(model, batch)
    length, tail = batch["input_ids"].shape[1], 5
    positions = model._positions(batch["input_ids"], batch["attention_mask"], batch["image_grid_thw"], None)
    cache = DynamicCache()
    images = {k: v for k, v in batch.items() if k not in ("input_ids", "labels", "attention_mask")}
    with torch.no_grad():
        for begin, end in [(0, length - tail), *((i, i + 1) for i in range(length - tail, length))]:
            out = model(
                input_ids=batch["input_ids"][:, begin:end],
                attention_mask=batch["attention_mask"][:, :end],
                position_ids=positions[..., begin:end],
                past_key_values=cache,
                use_cache=True,
                **images,
            )
            images = {}
            torch.testing.assert_close(out.logits[:, -1], full[:, end - 1], **CLOSE)
    assert cache.get_seq_length() == length


def test_generate_forces_the_action_and_keeps_no_state(model):
    """Two conversations, in either order: the same tokens. (The base model would keep offsets of the last one.)"""
    one, two = conversation(("clip",), 1), conversation(("region",), 2, grid=(1, 8, 8))
    start = torch.tensor([[model.config.clip_action_start_id]])
    asks = []
    for row in (one, two):
        row = {k: v for k, v in row.items() if k != "labels"}
        row["input_ids"] = torch.cat([row["input_ids"][:, :-6], start], dim=1)
        asks.append(row)
    run = lambda row: model.generate(**row, max_new_tokens=6, min_new_tokens=6, do_sample=False)  # noqa: E731
    alone = [run(row) for row in asks]
    again = [run(row) for row in reversed(asks)][::-1]
    for before, after, row in zip(alone, again, asks, strict=True):
        assert torch.equal(before, after)
        assert before[0, row["input_ids"].shape[1]] == model.config.clip_action_id
    assert model.model.rope_deltas is None


def test_num_return_sequences_repeats_each_rows_images(model):
    rows = stack([conversation(("clip",), 1, answer=1), conversation(("detection", "clip"), 2, answer=1)], "left")
    rows.pop("labels")
    once = model.generate(**rows, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    torch.manual_seed(0)
    twice = model.generate(**rows, max_new_tokens=4, min_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(twice, once.repeat_interleave(2, 0))


def test_alignment_run_is_unconditioned():
    """num_inner_forward_run 1: the control token changes nothing but its own text."""
    model = tiny_model(num_inner_forward_run=1)
    calls = []
    model.projectors["clip"].register_forward_hook(lambda _m, given, _o: calls.append(given))
    logits(model, conversation(("clip",), 1))
    assert len(calls) == 1 and (len(calls[0]) == 1 or calls[0][1] is None)


def test_fresh_projectors_start_xavier_uniform_also_when_the_base_is_loaded(tmp_path):
    """Uniform in +-sqrt(6 / (in + out)), zero biases, unit norms: the published start, not the base model's normal."""
    torch.manual_seed(0)
    config = tiny_config()
    made = model_class(config)(config)
    state = {k: v for k, v in made.state_dict().items() if not k.startswith("projectors")}
    made.save_pretrained(tmp_path, state_dict=state)
    loaded = type(made).from_pretrained(tmp_path)
    for model in (made, loaded):
        for projector in model.projectors.values():
            for name, parameter in projector.named_parameters():
                if name.startswith("layernorm") or name.endswith("bias"):
                    assert torch.all(parameter == float(name.startswith("layernorm") and name.endswith("weight"))), name
                else:
                    fans = parameter.shape[0] + parameter.shape[1]
                    bound = (6 / (fans * parameter[0, 0].numel())) ** 0.5
                    assert 0.9 * bound < parameter.abs().max() <= bound, name
                    assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name


def test_errors_state_the_offending_values(model):
    row = conversation(("clip",), 1)
    small = image((1, 4, 4), 0)
    too_few = {"clip_pixel_values": small["pixel_values"], "clip_images_grid_thw": small["image_grid_thw"]}
    with pytest.raises(UserError, match=r"clip: the text holds 6 image tokens but the images make 4 features"):
        model(**{**row, **too_few})
    with pytest.raises(UserError, match="no 'seg' look; it has region, clip"):
        tiny_model(looks=("clip",)).encode("seg", seg_images=torch.zeros(1, 3, 1024, 1024))
    with pytest.raises(UserError, match="position_ids"):
        cache = DynamicCache()
        model(input_ids=row["input_ids"][:, :3], past_key_values=cache, use_cache=True)
        model(input_ids=row["input_ids"][:, 3:5], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="position_mode"):
        tiny_config(position_mode="alibi")


def test_rope_positions_of_blocks_equal_the_whole(model):
    row = conversation(("region", "clip"), 3)
    ids = row["input_ids"][0]
    whole = model._positions(row["input_ids"], None, row["image_grid_thw"], None)[:, 0]
    cut = (ids == model.config.para_start_id).nonzero()[3, 0].item()  # before the crop's turn
    first, start = model.rope_positions(ids[:cut], row["image_grid_thw"][:1])
    second, _ = model.rope_positions(ids[cut:], row["image_grid_thw"][1:], start)
    assert torch.equal(torch.cat([first, second], dim=1), whole)


def test_a_map_is_normalized_over_its_channels_before_the_convolution():
    """F of a SAM map (c, h, w): LayerNorm over channels, then kernel 4, stride 4, row by row."""
    torch.manual_seed(0)
    projector = ConditionedProjector(6, 8, "conv")
    x = 3 * torch.randn(6, 8, 12) + 1
    normed = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    expected = projector.conv_feature(normed[None])[0].flatten(1).T
    torch.testing.assert_close(projector.project_features(x), expected, atol=1e-5, rtol=1e-4)
