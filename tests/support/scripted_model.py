"""Images, a model that generates scripted texts, and a full forward to compare the loop with."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from relook.looks import IM_END, LOOKS
from relook.options import AskOptions
from relook.perceive.loop import run
from relook.perceive.vlm import opened_images
from relook.trace import Finished

QUESTION = "What is the code in the RED box ?"
ALL = tuple(LOOKS)


def picture(seed=0, size=(130, 90)):
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 255, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


@contextmanager
def writing(vlm, *texts):
    """Make the model prefer these texts, one turn after the other, and then end its turns."""
    tokenizer = vlm.processor.tokenizer
    wanted = [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False)]
    end = tokenizer.convert_tokens_to_ids(IM_END)

    def want(module, inputs, logits):
        if logits.ndim == 1:  # the recorder's: unmodified logits
            return logits
        logits = logits.clone()
        logits[..., wanted.pop(0) if wanted else end] += 1e4
        return logits

    handle = vlm.model.lm_head.register_forward_hook(want)
    try:
        yield
    finally:
        handle.remove()


def recorded(vlm, requests):
    """Run (image, question, options) as one batch; returns answers, conversations and per row {index: next logits}."""
    rows = [
        vlm._row(vlm._begin(), opened_images(image), question, AskOptions.of(options))
        for image, question, options in requests
    ]
    logits = [{} for _ in rows]
    answers = {}
    for row, event in run(vlm, rows, lambda row, index, values: logits[row].__setitem__(index, values)):
        if isinstance(event, Finished):
            answers[row] = event.answer
    return [answers[i] for i in range(len(rows))], [row.conversation for row in rows], logits


def one_forward(vlm, ids, answers):
    """Logits (L, V) of one full forward over a conversation's ids, with images from its transcript."""
    item = {"messages": [{"role": t.role, "content": t.text} for t in answers[-1].transcript]}
    for spec in LOOKS.values():
        item[spec.item_key] = []
    # images in placeholder order: per question its own, then those of its looks
    for answer, images in answers_with_images(answers):
        item["images"] += images
        for look in answer.looks:
            if look.problem is None:
                crop = (answer.image, look.box) if look.kind == "region" else answer.image
                item[LOOKS[look.kind].item_key].append(crop)
    encoded = vlm.processor.encode_item(item, labels=False)
    tensors = {k: v for k, v in encoded.items() if isinstance(v, torch.Tensor)}
    with torch.no_grad():
        out = vlm.model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), **tensors)
    return out.logits[0], encoded["input_ids"]


def answers_with_images(answers):
    return [(a, getattr(a, "given", [a.image])) for a in answers]


def largest_difference(vlm, conversation, logits, answers):
    full, ids = one_forward(vlm, conversation.ids, answers)
    assert len(ids) == len(conversation.ids) or any("\ufffd" in t.text for t in answers[-1].transcript)
    return max(float((full[i] - values).abs().max()) for i, values in logits.items())


MIX = [
    {"look": "none"},
    {"region": (1, 2, 3, 4)},
    {"look": "clip", "max_new_tokens": 3},
    {"look": "seg"},
    {"look": "detection", "max_looks": 2},
    {"look": "auto"},
    {"look": "region", "max_new_tokens": 9},
    {"look": "clip", "condition": False},
    {"region": (4, 1, 6, 3), "blank": True},
]


def mixed_requests():
    return [
        (picture(i, (60 + 20 * i, 150 - 15 * i)), QUESTION + " again" * (i % 3), {"max_new_tokens": 6, **options})
        for i, options in enumerate(MIX)
    ]
