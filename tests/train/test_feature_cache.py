"""Feature caching of a frozen encoder: cached features equal computed ones, and are used only while it is frozen."""

import pytest
import torch
from support import tiny_model as tiny
from support.interrupted_run import recipe
from support.synthetic import OBJECTIVE

from relook.model.encoders import image_encoder
from relook.model.loading import load_model
from relook.train.runner import run
from relook.train.trainer import FeatureCache

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
