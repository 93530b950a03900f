"""Collator: batches equal the recorded ids and labels, and equal their rows collated one by one."""

from __future__ import annotations

import logging

import pytest
from support.published_items import PIPELINE, needs_pipeline, recorded_samples
from support.synthetic import Pages

from relook.data import BuildOptions, Collator, Item, build_item, from_page
from relook.errors import RelookError


@pytest.fixture(scope="module")
def published() -> dict[str, dict]:
    return recorded_samples()


# ---- rows, without a processor


class Rows:
    """A stand-in processor: items are rows already."""

    class tokenizer:
        pad_token_id = 9


def test_rows_are_padded_right_and_pixels_joined_in_row_order():
    import torch

    first = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "prompt_ids": [1], "pixel_values": torch.ones(4, 6)}
    first["image_grid_thw"] = torch.tensor([[1, 2, 2]])
    second = {"input_ids": [5], "labels": [5], "prompt_ids": []}
    third = {"input_ids": [6, 7], "labels": [-100, 7], "pixel_values": torch.zeros(8, 6)}
    third |= {"image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]]), "seg_images": torch.full((1, 3, 2, 2), 3.0)}
    batch = Collator(Rows(), pad_to_multiple_of=4)([first, second, third])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [5, 9, 9, 9], [6, 7, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100], [5, -100, -100, -100], [-100, 7, -100, -100]]
    assert batch["pixel_values"].sum(1).tolist() == [6.0] * 4 + [0.0] * 8
    assert batch["image_grid_thw"].shape == (3, 3) and batch["seg_images"].shape == (1, 3, 2, 2)
    assert "prompt_ids" not in batch and "clip_pixel_values" not in batch


def test_items_over_the_cutoff_are_left_out_and_said(caplog):
    short, long = {"input_ids": [1], "labels": [1]}, {"input_ids": [1] * 5, "labels": [1] * 5}
    collate = Collator(Rows(), max_length=4)
    with caplog.at_level(logging.WARNING):
        assert collate([short, long])["input_ids"].shape == (1, 1)
    assert "5 tokens, over the cutoff of 4" in caplog.text
    with pytest.raises(RelookError, match=r"all 1 items of a batch are too long .*5 tokens, over the cutoff of 4"):
        collate([long])


# ---- the real vocabulary, and a model


@needs_pipeline
def test_published_items_of_one_model_make_one_batch_with_the_recorded_ids_and_labels(qwen_folder, published):
    """All items of the CLIP model's tokenizer, whose lengths run from 51 to 456: real padding, mixed looks."""
    import torch

    from relook.model import VPTQwen2VLProcessor

    processor = VPTQwen2VLProcessor.from_pretrained(qwen_folder, looks=["region", "clip"])
    processor.add_look_tokens()
    processor = processor.with_settings("published")
    samples = [sample for sample in published.values() if sample["tokenizer"] == "clip"]
    assert len({len(sample["input_ids"]) for sample in samples}) == len(samples) == 4
    batch = Collator(processor, image_root=PIPELINE)([Item.from_dict(sample["sample"]) for sample in samples])
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == sample["input_ids"]
        assert batch["labels"][row, :length].tolist() == sample["labels"]
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (456 - length)
        assert set(batch["labels"][row, length:].tolist()) <= {-100}
        assert set(batch["input_ids"][row, length:].tolist()) <= {processor.tokenizer.pad_token_id}
    for key in ("image_grid_thw", "clip_images_grid_thw"):
        recorded = [grid for sample in samples for grid in sample["vision"].get(key, [])]
        assert batch[key].tolist() == recorded
    for key in ("pixel_values", "clip_pixel_values"):
        rows = [processor.encode_item(sample["sample"], image_root=PIPELINE) for sample in samples]
        assert torch.equal(batch[key], torch.cat([row[key] for row in rows if key in row]))


def test_a_batch_of_mixed_looks_equals_its_rows_one_by_one(tiny_vlm):
    """Logits of every real position, and the loss as the mean over learnt positions, with looks and without."""
    import torch

    vlm = tiny_vlm()
    page = Pages(5).sample(0)
    question = from_page(page, 0)
    looks = ["region", "none", "clip", "detection"]
    items = [build_item(question, BuildOptions(look=look)) for look in looks]
    items.append(build_item(from_page(page, 1), BuildOptions(look="region", free_choice=True)))
    collate = Collator(vlm.processor)
    batch = collate(items)
    assert len({int(n) for n in batch["attention_mask"].sum(1)}) > 1
    with torch.no_grad():
        together = vlm.model(**batch)
        alone = [(row, vlm.model(**row)) for row in (collate([item]) for item in items)]
    weights = []
    for number, (row, out) in enumerate(alone):
        length = row["input_ids"].shape[1]
        assert torch.allclose(together.logits[number, :length], out.logits[0], atol=1e-4)
        weights.append(int((row["labels"][0, 1:] != -100).sum()))
    mean = sum(w * float(out.loss) for w, (_, out) in zip(weights, alone, strict=True)) / sum(weights)
    assert float(together.loss) == pytest.approx(mean, abs=1e-4)
