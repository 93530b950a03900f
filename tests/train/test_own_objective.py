"""An objective of a user's own, named by dotted path, with an auxiliary head and a figure of its own."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from support.synthetic import Page
from torch import nn

from relook.data.collate import join_rows
from relook.train.objective import AuxiliaryHeads, Examples, Objective
from relook.train.recipe import Recipe
from relook.train.runner import run


class Codes(Objective):
    """The code in a box in words, and beside it its color from the last hidden state."""

    class Options(Objective.Options):
        weight: float = 1.0

    def __init__(self, setup) -> None:
        super().__init__(setup)
        self.train = Examples(self.example)

    def example(self, index: int) -> dict:
        page: Page = self.source.sample(index)
        turns = [("user", f"<image>\n{page.qas[0].question}"), ("assistant", page.qas[0].answer)]
        messages = [{"role": role, "content": text} for role, text in turns]
        row = dict(self.processor.encode_item({"messages": messages, "images": [page.image]}))
        return {k: v for k, v in row.items() if k != "prompt_ids"}

    def collate(self, examples) -> dict:
        return join_rows(examples, self.processor.tokenizer.pad_token_id) | {"use_cache": False}

    def wrap(self, model: nn.Module) -> nn.Module:
        return Head(model, self.setup.heads, self.options.weight)


class Head(AuxiliaryHeads):
    def __init__(self, model, saved, weight: float) -> None:
        super().__init__(model, saved)
        self.weight = weight
        self.add_head("length", nn.Linear(model.config.text_config.vocab_size, 1))

    def forward(self, **batch):
        outputs = self.model(**batch)
        guess = self.heads["length"](outputs["logits"].mean(1)).squeeze(-1)
        error = (guess - batch["input_ids"].shape[1] / 100).square().mean()
        loss = outputs["loss"] + self.weight * error
        return {"loss": loss, "logits": outputs["logits"], "metrics": {"error": error.item()}}


def test_it_trains_logs_its_figure_and_hands_its_head_on(tmp_path: Path) -> None:
    stage = {"objective": f"{__name__}:Codes", "samples": 4, "batch": 2, "options": {"weight": 0.5}}
    raw = {
        "name": "own",
        "model": {"size": "support.synthetic:TINY"},
        "data": {"world": "support.synthetic:Pages"},
        "stages": [stage | {"name": "one", "lr": 1e-2}, stage | {"name": "two", "lr": 1e-12, "warmup": 0}],
        "log_every": 1,
    }
    run(Recipe.model_validate(raw), out=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(line["error"] > 0 for line in lines)
    heads = [load_file(tmp_path / "stages" / name / "heads.safetensors") for name in ("00-one", "01-two")]
    assert heads[0].keys() == {"heads.length.weight", "heads.length.bias"}
    assert torch.allclose(heads[0]["heads.length.weight"], heads[1]["heads.length.weight"], atol=1e-9)
