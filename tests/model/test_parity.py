"""Parity with the published implementation's recorded logits, loss, gradients and generations (float32, CPU)."""

from __future__ import annotations

import re

import pytest
import torch
from support.parity import MODELS, folder, fresh, our_name, recorded, set_mode, tensors

LOGITS = LOSS = 1e-4  # absolute; SAM's own encoder differs by 1.2e-5 between transformers 4.45 and 5.23
GRADIENT = 1e-3  # relative to the norm


@pytest.fixture(scope="module")
def models():
    return {name: fresh(name) for name in MODELS}


@pytest.mark.parametrize("path", recorded("out_*"), ids=lambda p: f"{p.parent.name}-{p.stem[4:]}")
def test_forward_matches_published(models, path):
    side, runs, mask, positions = re.fullmatch(r"out_(\w+)_runs(\d)_mask(\d)_(\w+)", path.stem).groups()
    model = set_mode(models[path.parent.name], int(runs), int(mask), positions).train()
    model.zero_grad()
    truth = tensors(path)
    out = model(**tensors(path.parent / f"batch_{side}.safetensors"))
    rows, columns = truth["positions"].T
    assert (out.logits[rows, columns] - truth["logits"]).abs().max() < LOGITS
    assert abs(out.loss.item() - truth["loss"].item()) < LOSS
    gradients = {k.removeprefix("grad."): v for k, v in truth.items() if k.startswith("grad.")}
    assert bool(gradients) == (side == "right")
    if gradients:
        out.loss.backward()
        parameters = dict(model.named_parameters())
        for name, expected in gradients.items():
            error = (parameters[our_name(name)].grad - expected).norm() / expected.norm()
            assert error < GRADIENT, name


@pytest.mark.parametrize(
    "path", [p for p in recorded("out_*") if "mrope" in p.stem], ids=lambda p: f"{p.parent.name}-{p.stem[4:]}"
)
def test_positions_match_published(models, path):
    side = path.stem.split("_")[1]
    batch, truth = tensors(path.parent / f"batch_{side}.safetensors"), tensors(path)
    model = set_mode(models[path.parent.name])
    ours = model._positions(batch["input_ids"], batch["attention_mask"], batch["image_grid_thw"], None)
    real = batch["attention_mask"].bool()
    assert torch.equal(ours[:, real], truth["position_ids"][:, real])


@pytest.mark.parametrize("part", ["answer", "action"])
@pytest.mark.parametrize("path", recorded("generate"), ids=lambda p: p.parent.name)
def test_generate_matches_published(models, path, part):
    """`answer`: a left-padded batch continued after the second look. `action`: the control token is forced."""
    model = set_mode(models[path.parent.name]).eval()
    inputs = {k.removeprefix(f"{part}."): v for k, v in tensors(path).items() if k.startswith(f"{part}.")}
    sequences, logits = inputs.pop("sequences"), inputs.pop("logits")
    steps = logits.shape[1]
    out = model.generate(
        **inputs,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences, sequences)
    assert (torch.stack(out.logits, 1) - logits).abs().max() < LOGITS


def test_masks_are_for_training_only(models):
    """The published code drew the mask in eval mode too; relook does not."""
    model = models["clip"]
    batch = tensors(folder("clip") / "batch_right.safetensors")
    with torch.no_grad():
        plain = set_mode(model, mask=0).eval()(**batch).logits
        masked = set_mode(model, mask=1).eval()(**batch).logits
        assert torch.equal(plain, masked)
        assert not torch.allclose(plain, model.train()(**batch).logits, atol=1e-3)
