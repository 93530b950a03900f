"""Objectives on pages of cards: targets lie where the page says, examples repeat, what is held out is not taught."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT
from support.objectives import loss_of, objective_of
from typer.testing import CliRunner

from relook.cli import app
from relook.looks import LOOKS, parse_calls
from relook.model import new as tiny
from relook.regions import cells_to_box
from relook.train.recipe import Stage, load_recipe
from zoo.objectives.conversation import KINDS, shaken
from zoo.objectives.pages import coverage, first_held_out, merge_order, patch_truth
from zoo.sizes import CARDS_TINY
from zoo.worlds import make_world

SIZE = CARDS_TINY


@pytest.fixture(scope="module")
def built():
    return tiny.build("cards-tiny", seed=0)


def objective(built, name: str, **options):
    stage = Stage(name="s", objective=name, samples=8, batch=2, options=options)
    return objective_of(built, stage, make_world("cards", 5))


# -- the tiny model


@given(st.text(max_size=60))
def test_any_text_can_be_written(text: str) -> None:
    import unicodedata

    tokenizer = _tokenizer()
    text = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_words_of_the_world_are_whole_and_answers_are_spelt() -> None:
    tokenizer = _tokenizer()
    question = "What is the code in the red box?"
    assert len(tokenizer.tokenize(question)) == len(question.split()) + 1
    for answer in ("407", "SIN THYE & COMPANY", "28/02/2016"):
        assert len(tokenizer.tokenize(answer)) == len(answer)
    for spec in (LOOKS["region"], LOOKS["clip"]):
        assert all(len(tokenizer.tokenize(t)) == 1 for t in (spec.start, spec.end, spec.pad))


def _tokenizer(cache=[]):  # noqa: B006  (built once)
    if not cache:
        cache.append(tiny.build_tokenizer(SIZE))
    return cache[0]


def test_size_and_views(built) -> None:
    model, processor = built
    assert 2.0e6 < sum(p.numel() for p in model.parameters()) < 2.5e6
    page = make_world("cards", 1).sample(0).image
    assert processor.view(page, "first").size == (64, 64)
    assert processor.view(page.crop((64, 0, 320, 192)), "crop").size == (128, 96)
    assert processor.view(page, "reencode").size == (256, 256)
    assert len(processor.tokenizer) == model.get_input_embeddings().num_embeddings


# -- the truth that stages teach


@given(st.tuples(*[st.integers(0, 63)] * 4), st.tuples(*[st.integers(0, 40)] * 4))
def test_coverage_against_counted_pixels(corners, window_corners) -> None:
    x1, x2, y1, y2 = min(corners[:2]), max(corners[:2]) + 1, min(corners[2:]), max(corners[2:]) + 1
    wx, wy = window_corners[0], window_corners[1]
    window = (wx, wy, wx + 24, wy + 16)
    painted = np.zeros((64, 64))
    painted[y1:y2, x1:x2] = 1
    seen = painted[wy : wy + 16, wx : wx + 24].reshape(2, 8, 4, 6).mean((1, 3))
    assert np.allclose(coverage([(x1, y1, x2, y2)], window, (2, 4)), seen)


def test_merge_order_is_the_vision_towers(built) -> None:
    """Number the patches of an image by their place; the image processor's order, merged, must be `merge_order`'s."""
    _, processor = built
    rows, columns, side = 4, 6, 8
    numbers = np.arange(rows * columns).reshape(rows, columns)
    pixels = np.repeat(np.repeat(numbers, side, 0), side, 1).astype(np.uint8)
    from PIL import Image

    encoded = processor.encode_images([Image.fromarray(np.stack([pixels] * 3, -1))], "image")
    values = encoded["pixel_values"].reshape(rows * columns, -1)[:, 0].numpy()
    assert (np.argsort(np.argsort(values)).reshape(-1, 4) == merge_order(numbers)).all()


def test_patch_truth_spells_the_page() -> None:
    page = make_world("cards", 2).sample(4)
    glyph, area = patch_truth(page, (0, 0, 512, 512), (32, 32), "0123456789", tuple(a.label for a in page.areas))
    assert (glyph > 0).sum() == len(page.glyphs)
    for i, part in enumerate(page.areas):
        x1, y1, x2, y2 = part.box
        assert area[..., i].sum() == pytest.approx((x2 - x1) * (y2 - y1) / 16**2)


def test_conversations_are_true(built) -> None:
    """Read back from the ids alone: the call names cells that hold the box, and the crop shows it."""
    _, processor = built
    teller = objective(built, "pages").teller
    page = make_world("cards", 5).sample(0)
    random = np.random.default_rng(0)
    for qa in page.qas:
        item, windows = KINDS["region"](teller, page, qa, random)
        call = parse_calls(item["messages"][1]["content"])[0]
        box = cells_to_box(call.cells, page.image.size)
        (x1, y1, x2, y2), crop = qa.boxes[0], windows[1]
        assert box[0] <= x1 and box[1] <= y1 and box[2] >= x2 and box[3] >= y2
        assert crop[0] <= x1 and crop[1] <= y1 and crop[2] >= x2 and crop[3] >= y2
        assert item["messages"][-1]["content"] == qa.answer
        row = processor.encode_item(item)
        learnt = [i for i in row["labels"] if i >= 0]
        assert processor.tokenizer.decode(learnt) == f"{item['messages'][1]['content']}<|im_end|>{qa.answer}<|im_end|>"


@given(st.integers(0, 10**6))
def test_shaken_cells_stay_cells(seed: int) -> None:
    x0, y0, x1, y1 = shaken((0, 3, 1, 7), np.random.default_rng(seed), 0.5, 8)
    assert 0 <= x0 <= x1 <= 7 and 0 <= y0 <= y1 <= 7
    assert abs(x0) <= 1 and abs(y1 - 7) <= 1


def test_reading_learns_the_answer_only(built) -> None:
    row = objective(built, "read").example(0)
    learnt = [i for i in row["labels"] if i >= 0]
    assert len(learnt) == 4  # three digits and the end of the turn
    assert LOOKS["region"].start in built[1].tokenizer.decode(row["input_ids"])


def test_the_head_is_shown_the_digit_to_be_written(built) -> None:
    """From the positions back to page pixels: the token to look at holds the glyph that the next token spells."""
    model, processor = built
    learner = objective(built, "read", heed=3)
    for index in range(6):
        page, random = learner.page(index), learner.random(index)
        qa = page.qas[int(random.integers(len(page.qas)))]
        _, (window,) = KINDS["read"](learner.teller, page, qa, random)
        row = learner.example(index)
        ids = row["input_ids"]
        pads = [i for i, t in enumerate(ids) if t == model.config.image_token_id]
        columns = int(row["image_grid_thw"][0][2]) // 2
        side = (window[2] - window[0]) // columns  # of a token, page pixels
        assert len(row["heed"]) == len(qa.answer)
        for at, token, *others in row["heed"].tolist():
            assert set(others) == {-1}
            y, x = divmod(pads.index(token), columns)
            left, top = window[0] + x * side, window[1] + y * side
            here = [g.char for g in page.glyphs if left <= g.box[0] < left + side and top <= g.box[1] < top + side]
            assert processor.tokenizer.decode([ids[at + 1]]) in here


# -- objectives and runs


@pytest.mark.parametrize("name", ["dense", "align", "read", "locate", "pages"])
def test_examples_repeat_and_losses_are_finite(built, name: str) -> None:
    first, second = objective(built, name), objective(built, name)
    a, b = first.example(3), second.example(3)
    for x, y in zip(_tensors(a), _tensors(b), strict=True):
        assert torch.equal(x, y)
    loss = loss_of(first, first.wrap(built[0]), [first.example(0), first.example(1)])
    assert torch.isfinite(loss)
    loss.backward()


def _tensors(tree):
    if torch.is_tensor(tree):
        yield tree
    elif isinstance(tree, dict):
        for key in sorted(tree):
            yield from _tensors(tree[key])


def test_clip_and_direct_turns_learn_too(built) -> None:
    for kind in ("clip", "direct"):
        learner = objective(built, "pages", mix={kind: 1.0})
        model = built[0]
        model.zero_grad()
        loss_of(learner, learner.wrap(model), [learner.example(0), learner.example(1)]).backward()
        condition = model.projectors["clip"].linear_condition.weight.grad
        assert (condition is not None and condition.abs().sum() > 0) == (kind == "clip")


def test_pages_for_validation_are_not_taught() -> None:
    """Not even with pages that serve several examples, and whole batches are of one kind."""
    stage = Stage(name="s", objective="pages", samples=2**23 - 1, batch=48, options={"mix": {"region": 1, "clip": 1}})
    first = first_held_out(stage)
    assert first >= stage.samples and first % stage.batch == 0

    class World:
        charset, labels, asked = "", (), []

        def sample(self, index):
            self.asked.append(index)
            raise LookupError

    world = World()
    learner = objective_of(tiny.build("cards-tiny", 0), stage, world, 1)
    for draw, index in ((learner.example, stage.samples - 1), (learner.held_out, 0)):
        with pytest.raises(LookupError):
            draw(index)
    taught, held = world.asked
    assert held > taught
    assert len({learner.kind(first + i) for i in range(48)}) == 1


def test_a_world_is_drawn_and_measured() -> None:
    names = [stage.name for stage in load_recipe(ROOT / "zoo/recipes/cards-tiny.yaml").stages]
    more = [f"stages.{name}.{key}" for name in names for key in ("samples=16", "batch=2")]
    result = CliRunner().invoke(app, ["train", str(ROOT / "zoo/recipes/cards-tiny.yaml"), *more, "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    stages = {stage["name"]: stage for stage in json.loads(result.stdout)["stages"]}
    assert stages["dense"]["lengths"] is None and stages["instruct"]["lengths"]["mean"] > 50
    assert all(stage["seconds_a_step"] > 0 for stage in stages.values())
    assert stages["locate"]["learns"]["visual"][0] == stages["locate"]["learns"]["embed_tokens"][0] == 0
