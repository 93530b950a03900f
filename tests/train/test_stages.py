"""The paper's two stages on tiny models, alignment then instruction tuning, lower the validation loss."""

import json
from pathlib import Path

import pytest
from PIL import Image
from support.own_items import conversation
from support.start_folders import parts

from relook.model.loading import load_model
from relook.train.recipe import Recipe
from relook.train.runner import run

COLORS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, str]:
    return parts(tmp_path_factory.mktemp("starts"))


def write_items(path: Path, look: str, align: bool, count: int) -> None:
    """Plain pictures and the names of their colors; alignment shows the re-encoded view alone, as published."""
    items = []
    for number in range(count):
        name, rgb = list(COLORS.items())[number % len(COLORS)]
        picture = f"{path.stem}-{number}.png"
        Image.new("RGB", (32, 32), tuple(max(0, v - number) for v in rgb)).save(path.parent / picture)
        item = conversation([look], answer=name, image=picture)
        if align:
            said = [("user", f"<{look}_image>\nWhich color?"), ("assistant", name)]
            item["messages"] = [{"role": role, "content": content} for role, content in said]
            item["images"] = []
        items.append(item)
    path.write_text(json.dumps(items))


@pytest.mark.parametrize("look", ["detection", pytest.param("seg", marks=pytest.mark.slow)])  # SAM: 1024 x 1024 pixels
def test_alignment_then_instruction_lowers_the_validation_loss(look: str, made, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_items(Path("align.json"), look, True, 20)
    write_items(Path("instruct.json"), look, False, 20)
    common = {"objective": "instruct", "batch": 4, "schedule": "cosine", "weight_decay": 0.0, "betas": [0.9, 0.999]}
    rests = {"detection": "detection_model", "seg": "seg_model"}[look]
    recipe = Recipe.model_validate(
        {
            "name": "stages",
            "model": {"start": made["start"], "looks": ["region", look], look: made[look]},
            "data": {"path": "align.json"},
            "evaluate_every": 5,
            "save_every": 5,
            "keep_last": 5,
            "validation": {"items": 4, "questions": 0},
            "save_dtype": "float32",
            "stages": [
                {**common, "name": "align", "steps": 15, "lr": 2e-2, "train": [f"{look}_projector"], "passes": 1},
                {
                    **common,
                    **{"name": "instruct", "steps": 15, "lr": 3e-3, "freeze": ["visual", rests], "passes": 2},
                    **{"mask": 1, "mask_ratio": 0.5, "data": {"path": "instruct.json"}},
                },
            ],
        }
    )
    final = run(recipe, out="run")
    logged = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    for stage in ("align", "instruct"):
        losses = [line["eval_loss"] for line in logged if line["stage"] == stage and "eval_loss" in line]
        assert len(losses) == 3 and losses[0] > losses[1] > losses[2], (stage, losses)
    after = load_model(final, device="cpu")
    assert after.config.num_inner_forward_run == 2 and not after.config.alignment
    done = json.loads(Path("run/stages/01-instruct/done.json").read_text())
    assert done["best"]["step"] == 15
