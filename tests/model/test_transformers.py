"""The model in other tools: transformers' pipeline and Trainer, and peft."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from support.synthetic import TINY
from support.tiny_model import conversation, stack, tiny_model

import relook
from relook.model.new import build


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model, processor = build(replace(TINY, base=base), seed=1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_pipeline_image_text_to_text(saved):
    from transformers import pipeline

    assert relook.__version__
    pipe = pipeline("image-text-to-text", model=str(saved))
    picture = Image.radial_gradient("L").convert("RGB")
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]}]
    out = pipe(text=chat, max_new_tokens=5, return_full_text=False, generate_kwargs={"do_sample": False})
    assert isinstance(out[0]["generated_text"], str)
    again = pipe(text=chat, max_new_tokens=5, return_full_text=False, generate_kwargs={"do_sample": False})
    assert out == again


def test_generate_from_the_processor_equals_a_forward(saved):
    """processor -> generate, checked against teacher forcing over the generated sequence."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(saved), AutoProcessor.from_pretrained(saved)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.linear_gradient("L").convert("RGB")], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    with torch.no_grad():
        forced = model(input_ids=ids, pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
    prompt = inputs["input_ids"].shape[1]
    after_start = ids[0, prompt - 1 : -1] == model.config.reencode_ids("clip").start  # what follows a start is forced
    assert (~after_start).sum() >= 4
    assert torch.equal(forced.logits[0, prompt - 1 : -1].argmax(-1)[~after_start], ids[0, prompt:][~after_start])


class Rows(torch.utils.data.Dataset):
    looks = [("clip",), (), ("clip", "region"), ("region",)]

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return conversation(self.looks[index % 4], index)


def test_trainer_lowers_the_loss_on_a_mix_of_looks(base, tmp_path):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        seed=0,
    )
    trainer = Trainer(model=tiny_model(looks=("clip",)), args=arguments, train_dataset=Rows(), data_collator=stack)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_peft_lora_learns_and_reloads(base, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    targets = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    settings = LoraConfig(r=4, target_modules=targets, modules_to_save=["projectors.clip"])
    model = get_peft_model(tiny_model(looks=("clip",)), settings)
    batch = stack([conversation(("clip",), 1), conversation((), 2)])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = model(**batch).loss
    for _ in range(4):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        after = model(**batch)
    assert after.loss < before
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(looks=("clip",)), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, after.logits)


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_weights_put_aside_by_accelerate_answer_the_same(saved, place, tmp_path):
    """forward, generate and ask of a model that is read weight by weight while it runs."""
    from accelerate import cpu_offload

    from relook.perceive import VLM

    model, processor = relook.load(saved, device="cpu").model, relook.load(saved, device="cpu").processor
    if place == "disk":
        other = type(model).from_pretrained(saved, device_map={"": "disk"}, offload_folder=tmp_path)
    else:
        other = cpu_offload(type(model).from_pretrained(saved), execution_device="cpu")
    assert next(other.parameters()).device.type == "meta"
    picture = Image.radial_gradient("L").convert("RGB")
    for look in ("none", "region", "clip"):
        ask = lambda one, look=look: VLM(one, processor).ask(picture, "What?", look=look, max_new_tokens=4).transcript  # noqa: E731
        assert ask(other) == ask(model)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    inputs = processor(
        text=[processor.apply_chat_template(chat, add_generation_prompt=True)], images=[picture], return_tensors="pt"
    )
    run = lambda one: one.generate(**inputs, max_new_tokens=4, do_sample=False)  # noqa: E731
    assert torch.equal(run(other), run(model))
