"""What a model is opened from: settings that do not go together and folders that are something else are refused."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from support import start_folders
from support.qwen2vl_folder import plain_qwen2_vl
from typer.testing import CliRunner

from relook.cli.app import app
from relook.errors import CheckpointError, UserError
from relook.model.loading import stored_dtype
from relook.model.start import Start, open_model, open_start


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "exactly one of size"),
        ({"size": "cards-tiny", "start": "cards-tiny"}, "exactly one of size"),
        ({"start": "cards-tiny", "visual": "receipts-tiny"}, "visual: goes with size"),
        ({"size": "cards-tiny", "looks": ["region"]}, "go with start"),
    ],
)
def test_settings_that_do_not_go_together(values, words):
    with pytest.raises(ValidationError, match=words):
        Start(**values)


def test_a_folder_whose_config_cannot_be_read(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not a readable JSON file"):
        open_start(Start(start=str(tmp_path)))


def test_a_look_whose_encoder_is_not_there(tmp_path):
    plain = tmp_path / "plain"
    plain_qwen2_vl(plain)
    with pytest.raises(UserError, match="no encoder could be read there"):
        open_start(Start(start=str(plain), looks=["detection"], detection=str(tmp_path / "nowhere")))


def test_looks_of_a_model_that_is_not_plain():
    with pytest.raises(UserError, match="start from a plain Qwen2-VL"):
        open_start(Start(start="cards-tiny", looks=["seg"]))


@pytest.fixture
def parts(tmp_path, base):
    return start_folders.parts(tmp_path / "parts")


def new(*words):
    return CliRunner().invoke(app, ["models", "new", *map(str, words)])


def test_models_new_writes_what_a_recipe_starts_from(base, parts, tmp_path):
    """`relook models new` is `model.looks` of a recipe, for the shell; the base's numbers stay, in its dtype."""
    looks = ["region", "clip", "detection"]
    given = ["--looks", ",".join(looks), "--detection", parts["detection"], "--seed", "3"]
    result = new(parts["start"], *given, "--out", tmp_path / "new")
    assert result.exit_code == 0 and result.stdout == f"written: {tmp_path / 'new'}\n", result.stderr
    found, processor = open_model(tmp_path / "new")
    wanted, _ = open_start(Start(start=parts["start"], looks=looks, detection=parts["detection"]), seed=3)
    assert found.config.model_type == base and found.config.looks == processor.looks == looks
    assert found.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in wanted.state_dict().items())
    assert new(parts["start"], "--dtype", "bfloat16", "--out", tmp_path / "half").exit_code == 0
    assert stored_dtype(tmp_path / "half") == torch.bfloat16 and not list((tmp_path / "half").glob(".*"))


def test_models_new_says_what_it_lacks(parts, tmp_path):
    for words, said in [
        ((parts["start"], "--looks", "region,clipp"), "look 'clipp' is unknown; expected some of region, clip"),
        ((parts["start"], "--looks", "detection"), "look 'detection' needs its encoder"),
        ((parts["start"], "--looks", ","), "say which looks it is given"),
        (("cards-tiny",), "no plain base: it has the looks region, clip"),
        ((tmp_path / "nowhere",), "nowhere"),
    ]:
        result = new(*words, "--out", tmp_path / "new")
        assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1, result.stderr
        assert not (tmp_path / "new").exists()
    assert "already there" in new(parts["start"], "--out", parts["start"]).stderr
