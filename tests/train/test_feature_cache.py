"""Feature caching of a frozen encoder: cached features equal computed ones, and are used only while it is frozen."""

from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_model as tiny
from support.interrupted_run import recipe
from support.own_items import write_items_of
from support.start_folders import parts, start
from support.synthetic import OBJECTIVE

from relook.model.encoders import image_encoder
from relook.model.loading import load_model
from relook.train.feature_cache import FeatureCache, feature_cache
from relook.train.recipe import Recipe, Stage
from relook.train.runner import run

pytestmark = pytest.mark.usefixtures("base")
GRIDS = torch.tensor([[1, 4, 6], [1, 2, 4]])


@pytest.fixture
def model():
    return tiny.tiny_model().requires_grad_(False)


def pixels(seed: int, grids=GRIDS) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(int(grids.prod(-1).sum()), 3 * 2 * tiny.PATCH**2)


def look(model, values, grids=GRIDS):
    return model.encode("image", pixel_values=values, image_grid_thw=grids)


def count_images(model) -> list[int]:
    """Grows by the number of images of every run of the vision tower."""
    seen: list[int] = []
    model.model.visual.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(len(kwargs.get("grid_thw", args[-1]))), with_kwargs=True
    )
    return seen


def test_features_are_the_towers_own_and_made_once(model):
    expected, seen = look(model, pixels(0)), count_images(model)
    with image_encoder(FeatureCache(model.model, 8)):
        for _ in range(3):
            for ours, theirs in zip(look(model, pixels(0)), expected, strict=True):
                torch.testing.assert_close(ours, theirs)
    assert sum(seen) == 2  # each image once, though shown three times
    look(model, pixels(0))
    assert sum(seen) == 4  # outside, nothing is remembered


def test_the_same_pixels_in_another_shape_are_another_image(model):
    values = pixels(0)[:24]
    with image_encoder(FeatureCache(model.model, 8)):
        wide = look(model, values, GRIDS[:1])[0]
        tall = look(model, values, torch.tensor([[1, 6, 4]]))[0]
    assert not torch.allclose(wide, tall)


def test_old_images_are_forgotten(model):
    seen = count_images(model)
    with image_encoder(FeatureCache(model.model, 2)):
        for seed in (0, 1, 0):  # two images each
            look(model, pixels(seed))
    assert sum(seen) == 6


def test_a_tower_that_learns_is_not_remembered(model):
    model.model.visual.requires_grad_(True)
    seen = count_images(model)
    with image_encoder(FeatureCache(model.model, 8)):
        for _ in range(2):
            assert look(model, pixels(0))[0].requires_grad
    assert sum(seen) == 4


def trained(folder, **changes):
    whole = recipe()
    stage = {"freeze": ["visual"], "name": "conversations", "objective": OBJECTIVE, "samples": 6, "batch": 2} | changes
    stage["options"] = {"looks": {"clip": 1.0}}
    whole = type(whole).model_validate(whole.model_dump() | {"stages": [stage]})
    return load_model(run(whole, out=folder), dtype=torch.float32)


def apart(ours, theirs) -> float:
    others = dict(theirs.named_parameters())
    return max((p - others[name]).abs().max().item() for name, p in ours.named_parameters())


def test_training_learns_the_same_with_and_without(tmp_path):
    plain, kept = (trained(tmp_path / str(n), remember=n) for n in (0, 16))
    assert apart(plain, kept) < 2e-4  # batched and single images round differently


def test_bfloat16_products_leave_the_weights_in_float32(tmp_path):
    plain, half = (trained(tmp_path / p, precision=p) for p in ("float32", "bfloat16"))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert 0 < apart(plain, half) < 0.05


def features(model, cache, seed: int = 0):
    with image_encoder(cache):
        return look(model, pixels(seed))


def test_kept_features_are_those_of_the_encoder_to_the_bit(model, tmp_path):
    """From memory, from the disk, after being forgotten: the same bits as an image encoded by itself."""
    pairs = zip(pixels(0).split(GRIDS.prod(-1).tolist()), GRIDS, strict=True)
    alone = [look(model, p, g[None])[0] for p, g in pairs]
    small, on_disk = FeatureCache(model.model, bound=1), FeatureCache(model.model, folder=tmp_path)
    features(model, on_disk)
    seen = count_images(model)
    again = FeatureCache(model.model, folder=tmp_path)
    for cache in (small, small, on_disk, again):
        for ours, theirs in zip(features(model, cache), alone, strict=True):
            assert torch.equal(ours, theirs)
    assert sum(seen) == 4  # by the one that has no room, twice two; what lies on the disk is read
    assert len(small.found) == 1


def test_damaged_files_are_made_again(model, tmp_path):
    expected = features(model, FeatureCache(model.model, folder=tmp_path))
    for path in tmp_path.glob("*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:20])
    for ours, theirs in zip(features(model, FeatureCache(model.model, folder=tmp_path)), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_features_of_another_encoder_are_not_taken(model, tmp_path):
    features(model, FeatureCache(model.model, folder=tmp_path))
    with torch.no_grad():
        next(model.model.visual.parameters()).add_(0.5)
    expected = features(model, FeatureCache(model.model))
    for ours, theirs in zip(features(model, FeatureCache(model.model, folder=tmp_path)), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_bytes_are_bounded(model):
    whole = FeatureCache(model.model)
    for seed in range(4):
        features(model, whole, seed)
    bounded = FeatureCache(model.model, bound=whole.bytes // 2)
    for seed in range(4):
        features(model, bounded, seed)
    assert 0 < bounded.bytes <= whole.bytes // 2
    assert bounded.bytes == sum(tensor.nbytes for tensor in bounded.found.values())


def test_by_default_a_frozen_encoder_that_sees_items_again(model):
    stage, items = Stage(name="s", objective="instruct", samples=8), list(range(4))
    kept = lambda *about, **more: isinstance(feature_cache(model.model, *about, **more), FeatureCache)  # noqa: E731
    assert kept(stage, 8, items)
    assert not kept(stage, 4, items)  # each comes once
    assert not kept(stage, 8, None)  # pages are drawn anew
    assert not kept(stage, 8, items, sharded=True)
    assert not kept(stage.model_copy(update={"remember": 0}), 8, items)
    model.model.visual.requires_grad_(True)
    assert feature_cache(model.model, stage, 8, items) is None


def test_a_frozen_encoder_is_not_run_again_for_the_backward_pass(model):
    """Under checkpointing, too; and the gradients of the others are the same bits."""
    model.requires_grad_(True)
    model.model.visual.requires_grad_(False)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    encoder = feature_cache(model.model, Stage(name="s", objective="instruct", samples=1), 1, [0])
    found = []
    for encode in (None, encoder):
        model.zero_grad()
        with image_encoder(encode) if encode else nullcontext():
            asks = [features.requires_grad for features in look(model, pixels(0))]
            model(**tiny.stack([tiny.conversation(["clip"])])).loss.backward()
        # Of transformers' checkpointing alone, and not in every base: for a pass back through nothing.
        assert encode is None or asks == [False] * 2
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and not any(".visual." in name for name in found[0])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_run_has_the_same_weights_whatever_is_kept(tmp_path, monkeypatch):
    """The default, a bound that keeps nothing, and features that another run left on the disk."""
    monkeypatch.chdir(tmp_path)
    folder = start(tmp_path / "start", parts(tmp_path), ("region", "clip"))
    write_items_of(tmp_path / "items.json", ["clip", "region"], count=3)
    stage = {"name": "s", "objective": "instruct", "samples": 6, "batch": 2, "freeze": ["visual"]}
    base = {"name": "r", "model": {"start": folder}, "data": {"path": "items.json"}, "save_dtype": "float32"}
    seen = []
    for name, bound, more in (("kept", 2**30, {}), ("none", 1, {}), *(("disk", 2**30, {"cache": "features"}),) * 2):
        monkeypatch.setattr(FeatureCache.__init__, "__defaults__", (None, bound, None))
        run(Recipe.model_validate(base | {"stages": [stage | more]}), out=f"{name}-{len(seen)}")
        seen.append(load_file(f"{name}-{len(seen)}/final/model.safetensors"))
    for other in seen[1:]:
        assert all(torch.equal(seen[0][key], other[key]) for key in seen[0])
    assert len([*tmp_path.glob("features/*/*.safetensors")]) == 4  # three images, and a crop of one
