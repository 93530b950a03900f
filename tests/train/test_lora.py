"""LoRA stages: only adapters and named parts train, runs resume, and a merged model gives the adapter's logits."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from support.own_items import write_items_of
from support.qwen2vl_folder import plain_qwen2_vl
from typer.testing import CliRunner

from relook.cli.app import app
from relook.errors import UserError
from relook.model.loading import load_model, load_processor
from relook.model.start import Start, load_adapted, open_model, open_start
from relook.train import lora
from relook.train.recipe import Lora, Recipe
from relook.train.runner import run

SMALL = {"r": 4, "targets": "all"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    plain_qwen2_vl(folder)
    return folder


def with_looks(plain: Path, seed: int = 0):
    return open_start(Start(start=str(plain), looks=["region", "clip"]), seed=seed)


def plan(start: Path, items: Path, **changes) -> Recipe:
    stage = {
        "name": "tune", "objective": "instruct", "steps": 2, "batch": 2, "lr": 1e-2, "warmup": 0, "lora": SMALL,
    }  # fmt: skip
    model = {"start": str(start), "looks": ["region", "clip"]}
    data = {"source": "json", "path": str(items)}
    base = {"name": "r", "model": model, "data": data, "stages": [stage | changes.pop("stage", {})]}
    return Recipe.model_validate(base | changes)


@pytest.fixture(scope="module")
def trained(plain, tmp_path_factory) -> Path:
    """A run of two LoRA steps on clip and region looks."""
    import os

    place = tmp_path_factory.mktemp("run")
    before = Path.cwd()
    os.chdir(place)
    try:
        write_items_of(Path("items.json"), ["clip", "region"], count=4)
        run(plan(plain, Path("items.json"), save_dtype="float32"), out="out")
    finally:
        os.chdir(before)
    return place / "out"


def batch_of(processor) -> dict:
    from support.own_items import conversation

    from relook.data.collate import Collator

    return Collator(processor)([conversation(["clip"]), conversation(["region"])])


def test_merge_gives_the_logits_of_peft_itself(plain, trained, tmp_path) -> None:
    """peft runs base and adapter side by side; our merged folder must say the same."""
    from peft import PeftModel

    adapter = trained / "stages" / "00-tune" / "adapter"
    base, _ = with_looks(plain, seed=1)
    unmerged = PeftModel.from_pretrained(base, str(adapter)).eval()
    result = CliRunner().invoke(app, ["models", "merge", str(adapter), "--out", str(tmp_path / "whole")])
    assert result.exit_code == 0, result.output
    merged = load_model(tmp_path / "whole", device="cpu")
    batch = batch_of(load_processor(tmp_path / "whole"))
    plain_logits = with_looks(plain, seed=1)[0](**batch).logits
    with torch.no_grad():
        ours, theirs = merged(**batch).logits, unmerged(**batch).logits
    assert (theirs - plain_logits).abs().max() > 1e-3  # it did learn
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        load_model(trained / "final", device="cpu")(**batch).logits, theirs, atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(open_model(adapter, device="cpu")[0](**batch).logits, theirs, atol=1e-5, rtol=1e-4)


def test_only_updates_and_named_parts_move(plain, trained) -> None:
    base, _ = with_looks(plain, seed=1)
    after = load_model(trained / "final", device="cpu").state_dict()
    moved = {name for name, value in base.state_dict().items() if not torch.equal(value, after[name])}
    assert not [name for name in moved if ".visual." in name or "norm.weight" in name]
    for part in (
        "q_proj.weight",
        "down_proj.weight",
        "embed_tokens.weight",
        "lm_head.weight",
        "linear_condition.weight",
    ):
        assert any(name.endswith(part) for name in moved), part
    assert not [name for name in moved if "linear_feature" in name]
    assert torch.equal(after["lm_head.weight"], after["model.language_model.embed_tokens.weight"])  # still tied


def test_a_cut_run_goes_on_exactly(plain, trained, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(trained.parent)
    whole = load_model(trained / "final", device="cpu").state_dict()
    recipe = plan(plain, Path("items.json"), save_dtype="float32", save_every=1)

    from relook.train import trainer

    learn = trainer.StageTrainer.training_step

    def cut(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return learn(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.StageTrainer, "training_step", cut)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, out=tmp_path / "cut")
    step = tmp_path / "cut" / "stages" / "00-tune" / "checkpoints" / "step-1"
    assert (step / "adapter_model.safetensors").is_file() and not (step / "model.safetensors").exists()
    assert load_adapted(step)[1].tokens  # a checkpoint inside the stage can be asked
    again = load_model(run(recipe, out=tmp_path / "cut"), device="cpu").state_dict()
    assert all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"targets": ["q_prj"]}, ["q_prj", "did you mean 'q_proj'"]),
        ({"modules_to_save": ["clip_proj"]}, ["clip_proj", "'clip_projector'"]),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(plain, trained, tmp_path, monkeypatch, said, words) -> None:
    monkeypatch.chdir(trained.parent)
    with pytest.raises(UserError) as caught:
        run(plan(plain, Path("items.json"), stage={"lora": SMALL | said}), out=tmp_path)
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_adapter_that_has_no_base_or_another(plain, trained, tmp_path) -> None:
    import shutil

    adapter = tmp_path / "adapter"
    shutil.copytree(trained / "stages" / "00-tune" / "adapter", adapter)
    (adapter / "base.json").unlink()
    said = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(said | {"base_model_name_or_path": ""}))
    with pytest.raises(UserError, match="--base"):
        load_adapted(adapter)
    with pytest.raises(UserError, match="does not fit"):
        load_adapted(adapter, base="cards-tiny")
    refused = CliRunner().invoke(app, ["models", "merge", str(plain), "--out", str(tmp_path / "x")])
    assert refused.exit_code == 2 and not (tmp_path / "x").exists()


def test_a_later_stage_does_not_name_a_base(plain, tmp_path) -> None:
    model, _ = with_looks(plain)
    lora.adapt(model, Lora.model_validate(SMALL)).save(tmp_path)
    with pytest.raises(UserError, match="--base"):
        load_adapted(tmp_path)


def test_untied_weights_stay_apart(plain, tmp_path) -> None:
    """As in the 7B: lm_head and embed_tokens are trained each by itself."""
    model, _ = with_looks(plain)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    adapter = lora.adapt(model, Lora.model_validate(SMALL))
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert [n for n in learns if "lm_head" in n] and [n for n in learns if "embed_tokens" in n]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lm_head" in name:
                parameter.add_(1.0)
    adapter.merge()
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_few_bits_without_the_package(plain, monkeypatch) -> None:
    model, _ = with_looks(plain)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(UserError, match="relook\\[qlora\\]"):
        lora.adapt(model, Lora.model_validate(SMALL | {"bits": 4}))


@pytest.mark.parametrize("bits", [4, 8])
def test_few_bits_rest_and_the_exact_weights_come_back(plain, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    model, processor = with_looks(plain)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = lora.adapt(model, Lora.model_validate(SMALL | {"bits": bits}))
    held = {type(m).__name__ for m in model.modules() if "4bit" in type(m).__name__ or "8bit" in type(m).__name__}
    assert held
    model(**batch_of(processor)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if "lora_" in n)
    adapter.merge()  # updates that learnt nothing are zero
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
