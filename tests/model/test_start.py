"""What a model is opened from: settings that do not go together and folders that are something else are refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from support.qwen2vl_folder import plain_qwen2_vl

from relook.errors import CheckpointError, UserError
from relook.model.start import Start, open_start


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
