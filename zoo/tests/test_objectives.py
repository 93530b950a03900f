"""Reading: where truth lies in a piece, how rows are pooled, what a fresh tower looks at, where attention is led."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.objectives import objective_of

from relook.errors import UserError
from relook.model import new as tiny
from relook.train.objective import find_objective, run_batch
from relook.train.optim import CombinedOptimizer, build_optimizer
from relook.train.recipe import Recipe, Stage
from relook.train.runner import run
from zoo import sizes
from zoo.objectives import documents, lines, pieces
from zoo.scans import Scan
from zoo.worlds import QA, make_world


def test_letters_under_agrees_with_the_boxes_of_the_page():
    """Every cell that is said to lie on a letter has its centre inside a box of that letter's line and columns."""
    page = make_world("receipts", 5).sample(1)
    classes = {c: i + 1 for i, c in enumerate(type(make_world("receipts", 5)).charset)}
    window = (0, 0, page.image.width, page.image.height)
    grid = (page.image.height // 6, page.image.width // 6)
    found = pieces.letters_under(page.meta["lines"], window, grid, classes)
    assert (found > 0).sum() > 200
    for row, column in np.argwhere(found > 0)[::17]:
        x, y = (column + 0.5) * window[2] / grid[1], (row + 0.5) * window[3] / grid[0]
        near = [g for g in page.glyphs if g.box[0] - 3 <= x <= g.box[2] + 3 and g.box[1] - 25 <= y <= g.box[3] + 25]
        assert any(classes[g.char] == found[row, column] for g in near)


def test_pooled_rows_hold_what_any_row_holds():
    """Two rows, each sure of one letter at another step: the pooled line spells both."""
    grid = torch.full((2, 4, 3), -8.0)
    grid[..., 0] = 0.0  # empty
    grid[0, 0] = torch.tensor([-8.0, 8.0, -8.0])
    grid[1, 2] = torch.tensor([-8.0, -8.0, 8.0])
    steps = lines.pool_rows(grid)
    assert torch.allclose(steps.exp().sum(-1), torch.ones(4), atol=1e-5)
    assert lines.spell(steps) == [1, 2]


@pytest.mark.parametrize(("seen", "truth", "rate"), [([], [1], 1.0), ([1, 2], [1, 2], 0.0), ([1, 3], [1, 2], 0.5)])
def test_error_rate(seen, truth, rate):
    assert lines.error_rate(seen, truth) == rate


def test_fresh_heads_look_at_their_neighbour(monkeypatch):
    """On noise, most inner patches look where `NEIGHBORS` says: judged on the library's own q and k."""
    from transformers.models.qwen2_vl import modeling_qwen2_vl as library

    model, processor = tiny.build("receipts-tiny", 3)
    turned = []
    original = library.apply_rotary_pos_emb_vision
    monkeypatch.setattr(
        library, "apply_rotary_pos_emb_vision", lambda *a, **k: turned.append(original(*a, **k)) or turned[-1]
    )
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    with torch.no_grad():
        model.encode("image", **processor.encode_images([Image.fromarray(noise)], "image"))
    order = np.arange(256).reshape(8, 2, 8, 2).swapaxes(1, 2).reshape(-1)  # patches in the order of merged tokens
    places = np.stack(np.divmod(order, 16), -1)
    inner = np.flatnonzero(((places > 2) & (places < 13)).all(-1))
    for layer, (q, k) in enumerate(turned):
        q, k = q.reshape(256, 4, 32), k.reshape(256, 4, 32)
        seen = torch.einsum("qhd,khd->hqk", q[inner], k).argmax(-1).numpy()
        for head in range(4):
            steps = places[seen[head]] - places[inner]
            assert (steps == sizes.NEIGHBORS[layer][head]).all(-1).mean() > 0.6


# -- pieces of pages and scans


@pytest.fixture(scope="module")
def built():
    return tiny.build("receipts-tiny", 1)


def reader(built, **options):
    stage = Stage(name="reading", objective="lines", samples=100, batch=4, options=options)
    return objective_of(built, stage, make_world("receipts", 5))


def as_scan(page, path="page.png") -> Scan:
    """A synthetic page with what is known of a real one: boxes and texts of lines, boxes of answers."""
    scan = Scan(path, [(line.box, line.text) for line in page.meta["lines"]], list(page.qas))
    scan._image = page.image.convert("L")
    return scan


@pytest.mark.parametrize("kind", pieces.PIECES)
def test_every_piece_shows_part_of_the_page_and_knows_its_letters(built, kind):
    """The slots of a piece hold the letters printed inside it, each once: counted from the page's own letter boxes."""
    page = make_world("receipts", 5).sample(2)
    learner = reader(built)
    sheet = pieces.Sheet.of_page(page, tuple(learner.fields))
    random = np.random.default_rng(3)
    for _ in range(8):
        box, size = pieces.PIECES[kind](sheet, learner.options, random)
        assert 0 <= box[0] < box[2] <= page.image.width and 0 <= box[1] < box[3] <= page.image.height
        assert size[0] <= pieces.LONGEST + 1
        grid = (max(1, round(size[1] / 12)), max(1, round(size[0] / 12)))
        slots = pieces.letters_in_slots(page.meta["lines"], box, grid, learner.classes)
        inside = sum(
            centre is not None and box[0] <= centre[0] < box[2] and box[1] <= centre[1] < box[3]
            for line in page.meta["lines"]
            for centre in line.centres
        )
        found = int((slots > 0).sum())
        assert found <= inside and found >= (0.9 if kind != "small" else 0.6) * inside  # two may share a slot


def test_lines_of_a_scan_are_spelled_where_they_stand(built):
    """Logits that say what is printed (from the letters' own places) cost next to nothing against a scan's lines."""
    page = make_world("receipts", 5).sample(2)
    learner = reader(built)
    box, size = pieces.crop(
        pieces.Sheet.of_page(page, tuple(learner.fields)), learner.options, np.random.default_rng(1)
    )
    grid = (round(size[1] / 12), round(size[0] / 12))
    slots = torch.tensor(pieces.letters_in_slots(page.meta["lines"], box, grid, learner.classes))
    sure = torch.nn.functional.one_hot(slots, len(learner.classes) + 1).float() * 30
    spelled = pieces.lines_in(as_scan(page).lines, box, grid, learner.classes)
    assert len(spelled) >= 3
    rates = [
        lines.error_rate(lines.spell(lines.pool_rows(sure[rows, columns])), text.tolist())
        for rows, columns, text in spelled
        if columns.stop - columns.start > 1.4 * len(text)  # double letters need an empty slot between them
    ]
    assert rates and np.mean(rates) < 0.15


def test_synthetic_pages_and_scans_teach_in_one_batch(built, monkeypatch):
    scans = [as_scan(make_world("receipts", 6).sample(i)) for i in range(2)]
    monkeypatch.setattr(lines, "read_scans", lambda folder: scans)
    mix = {"strip": 0.3, "window": 0.2, "small": 0.1, "crop": 0.2, "first": 0.2}
    learner = reader(built, share=[0.5, 0.5], pieces=mix, digits=0.5)
    batch = learner.collate([learner.example(i) for i in range(12)])
    loss, figures = run_batch(learner, learner.wrap(built[0]), batch)
    assert torch.isfinite(loss)
    assert {"letters", "under", "cer", "in_field"} <= figures.keys()
    again = learner.collate([learner.example(i) for i in range(12)])
    assert torch.equal(again["pixel_values"], batch["pixel_values"])  # an example is a function of its number


def test_heads_and_tower_go_on_where_a_run_was_left(tmp_path):
    """A run cut between two reading stages ends in the weights of the straight run: auxiliary heads are kept too."""
    stage = {"objective": "lines", "samples": 4, "batch": 2, "optimizer": "muon", "lr": 1e-3, "options": {"uses": 2}}
    stages = [{**stage, "name": "first"}, {**stage, "name": "second"}]
    base = {"name": "r", "model": {"size": "receipts-tiny"}, "data": {"world": "receipts"}, "save_dtype": "float32"}
    whole = run(Recipe.model_validate({**base, "stages": stages}), out=tmp_path / "whole")
    run(Recipe.model_validate({**base, "stages": stages[:1]}), out=tmp_path / "cut")
    resumed = run(Recipe.model_validate({**base, "stages": stages}), out=tmp_path / "cut")
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()


def test_a_tower_moves_into_another_model_or_says_why_not(tmp_path):
    from relook.errors import UserError

    stage = {"name": "s", "objective": "lines", "samples": 2, "batch": 2, "freeze": ["visual"], "options": {"uses": 2}}
    base = {"name": "r", "data": {"world": "receipts"}, "save_dtype": "float32", "stages": [stage]}
    first = run(Recipe.model_validate({**base, "model": {"size": "receipts-tiny"}}), out=tmp_path / "a")
    model = {"size": "receipts-large", "visual": str(first)}
    second = run(Recipe.model_validate({**base, "seed": 2, "model": model}), out=tmp_path / "b")
    from safetensors.torch import load_file

    old, new = (load_file(folder / "model.safetensors") for folder in (first, second))
    visual = [name for name in old if "visual" in name]
    assert visual and all(torch.equal(old[name], new[name]) for name in visual)
    with pytest.raises(UserError, match="does not fit"):
        run(Recipe.model_validate({**base, "model": {**model, "size": "cards-tiny"}}), out=tmp_path / "c")


@pytest.mark.parametrize(
    "options", [{"mix": {"foo": 1}}, {"mix": {"region": -1}}, {"mix": {}}, {"jitter": 3}, {"place": -1}]
)
def test_options_out_of_bounds_are_one_sentence(options):
    stage = Stage(name="talk", objective="pages", samples=4, options=options)
    with pytest.raises(UserError, match=rf"stage talk: options: {next(iter(options))}"):
        find_objective(stage).check(stage, from_items=False)


# -- the optimiser


def test_muon_and_adamw_share_the_work_and_a_saved_state_goes_on_alike():
    torch.manual_seed(0)

    def network():
        net = torch.nn.Module()
        net.blocks = torch.nn.ModuleList([torch.nn.Linear(6, 6)])
        net.head = torch.nn.Linear(6, 3)
        return net

    def step(net, optimiser, x):
        optimiser.zero_grad()
        net.head(net.blocks[0](x)).square().sum().backward()
        optimiser.step()

    stage = Stage(name="s", objective="lines", samples=1, optimizer="muon", lr=0.01, lr_rest=0.001)
    first, second = network(), network()
    second.load_state_dict(first.state_dict())
    ours, theirs = (build_optimizer(torch.nn.ModuleDict({"x": n}), stage) for n in (first, second))
    assert isinstance(ours, CombinedOptimizer)
    rates = {len(p.shape) * 10 + p.numel(): g["lr"] for g in ours.param_groups for p in g["params"]}
    assert rates[20 + 36] == 0.01 and rates[20 + 18] == 0.001 and rates[10 + 6] == 0.001  # inner matrix; head; biases
    scheduler = torch.optim.lr_scheduler.LambdaLR(ours, lambda n: 0.5)
    assert all(g["lr"] in (0.005, 0.0005) for part in ours.parts for g in part.param_groups)
    del scheduler
    for group in ours.param_groups:
        group["lr"] *= 2
    batches = torch.randn(4, 5, 6)
    for x in batches[:2]:
        step(first, ours, x)
    second.load_state_dict(first.state_dict())
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for x in batches[2:]:
        step(first, ours, x)
        step(second, theirs, x)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# -- where attention is led


def talker(built, kind, **options):
    stage = Stage(name="talk", objective="documents", samples=100, batch=1, options={"mix": {kind: 1.0}, **options})
    return objective_of(built, stage, make_world("receipts", 5))


@pytest.mark.parametrize("kind", ["region", "clip", "snip", "line"])
def test_the_eye_is_led_to_the_letter_that_is_written(built, kind):
    """Places are those of the answer's letters, and the tokens aimed at are image tokens on which they are printed."""
    learner = talker(built, kind)
    model, processor = built
    row = next(row for row in map(learner.example, range(40)) if len(row.get("aim", ())) > 3)
    ids = row["input_ids"]
    start = 0
    pad = model.config.image_token_id
    if kind == "clip":
        start = ids.index(model.config.clip_action_start_id) + 1
        pad = model.config.clip_image_token_id
    answer = processor.tokenizer.decode(ids[row["answer_from"] :], skip_special_tokens=True).strip()
    written = [processor.tokenizer.decode([ids[start + int(place)]]).strip() for place in row["aim"][:, 0]]
    assert "".join(written) in answer.replace(" ", "")
    tokens = row["aim"][:, 1:]
    assert all(ids[start + int(t)] == pad for t in tokens[tokens >= 0])
    if kind in ("snip", "line"):  # one line, so the eye moves to the right
        firsts = tokens[:, 0]
        columns = int(row["image_grid_thw"][-1][2]) // 2
        place = (firsts - ids.index(pad)) % columns
        assert (place[1:] >= place[:-1]).float().mean() > 0.9


def test_a_region_is_taught_with_what_stands_beside_the_answer(built):
    from relook.looks import parse_calls
    from relook.regions import box_to_cells, cells_to_box

    page = make_world("receipts", 5).sample(0)
    grid = built[1].grid_size
    teller = documents.RowTeller(built[1], jitter=0.0)
    total = next(qa for qa in page.qas if qa.field == "total")
    item, _ = teller.region(page, total, np.random.default_rng(0))
    (call,) = parse_calls(item["messages"][1]["content"], grid)
    named = cells_to_box(call.cells, page.image.size, grid)
    for box in total.boxes:
        assert named[0] <= box[0] and named[1] <= box[1] and named[2] >= box[2] and named[3] >= box[3]
    mates = [
        line.box
        for line in page.meta["lines"]
        for box in total.boxes
        if abs((line.box[1] + line.box[3]) - (box[1] + box[3])) < 6
    ]
    assert len(mates) >= 2  # the amount and its label
    assert all(named[0] <= mate[0] and mate[2] <= named[2] for mate in mates)
    assert call.cells != box_to_cells(total.boxes[0], page.image.size, grid)
    teller = documents.RowTeller(built[1], jitter=0.0, rows=False)
    item, _ = teller.region(page, total, np.random.default_rng(0))
    (call,) = parse_calls(item["messages"][1]["content"], grid)
    assert call.cells == box_to_cells(total.boxes[0], page.image.size, grid)


def test_a_region_that_drifts_is_taught_as_before_and_still_shows_the_answer(built):
    page = make_world("receipts", 5).sample(0)
    still, drifting = (documents.RowTeller(built[1], jitter=0.0, drift=drift) for drift in (0.0, 1.0))
    for qa in page.qas:
        if qa.field == "address":
            continue
        tops = set()
        for seed in range(12):
            item, (_, seen) = drifting.region(page, qa, np.random.default_rng(seed))
            plain, _ = still.region(page, qa, np.random.default_rng(seed))
            assert item["messages"][1] == plain["messages"][1]  # what is taught
            for box in qa.boxes:
                assert seen[0] <= box[0] and seen[1] <= box[1] and seen[2] >= box[2] and seen[3] >= box[3], qa.field
            tops.add(seen[1])
        if page.image.height / 4 < min(box[1] for box in qa.boxes) < page.image.height * 3 / 4:
            assert len(tops) > 1, f"{qa.field}: the crop never moved"


def test_a_scan_of_another_size_keeps_its_boxes_on_the_print():
    """Ink drawn where the boxes say must lie in them however the page was cut and resized."""
    image = Image.new("L", (400, 600), 255)
    box = (100, 300, 220, 320)
    image.paste(0, box)
    scan = Scan(Path("none"), [(box, "TOTAL 12.00")], [QA("How much?", "12.00", (box,), "total")], image)
    sizes = set()
    for seed in range(20):
        page = documents.scan_page(scan, np.random.default_rng(seed), resize=0.2)
        dark = np.argwhere(np.asarray(page.image.convert("L")) < 100)
        (y1, x1), (y2, x2) = dark.min(0), dark.max(0)
        ((a, b, c, d),) = page.qas[0].boxes
        assert max(abs(a - x1), abs(b - y1), abs(c - 1 - x2), abs(d - 1 - y2)) <= 2
        sizes.add(page.image.size)
    assert len(sizes) > 15


def test_guided_heads_follow_what_they_are_shown(built):
    """A few steps on one batch raise the attention that falls where it is led, for each of the three heads."""
    torch.manual_seed(0)
    coarse = replace(sizes.RECEIPTS, first={"longest_side": 192}, crop={"longest_side": 240})  # a tenth of the time
    model, processor = tiny.build(coarse, 2)
    learner = talker((model, processor), "region", place=0.0, guidance=1.0)
    batch = learner.collate([row for row in map(learner.example, range(12)) if len(row.get("aim", ())) > 3][:2])
    optimiser = torch.optim.AdamW(model.model.language_model.parameters(), lr=1e-3)
    seen, module = [], learner.wrap(model)
    for _ in range(6):
        optimiser.zero_grad()
        loss, figures = run_batch(learner, module, batch)
        loss.backward()
        optimiser.step()
        seen.append(figures)
    for name in ("written", "coming", "asking"):
        assert seen[-1][name] > seen[0][name]


def test_a_chain_is_what_the_builder_makes_of_the_answers_box(built):
    """Without rows, drift and jitter; `near` is its second half, asked about what the first region shows."""
    from relook.data.build import BuildOptions, build_item
    from relook.data.items import from_page

    page = make_world("receipts", 5).sample(0)
    grid, margin = built[1].grid_size, built[1].region_margin
    options = BuildOptions(grid=grid, margin=margin, free_choice=True, question_first=True, boxes="union", max_looks=2)
    teller, lengths = documents.RowTeller(built[1], jitter=0.0, rows=False), set()
    for number, qa in enumerate(page.qas):
        item, windows = teller.chain(page, qa, np.random.default_rng(0))
        expected = build_item(from_page(page, number), options).to_dict()
        said = [message["content"] for message in item["messages"]]
        assert said[1:] == [message["content"] for message in expected["messages"]][1:], qa.field
        assert [box for _, box in item["images"][1:]] == [box for _, box in expected["images"][1:]] == windows[1:]
        near, (seen,) = teller.near(page, qa, np.random.default_rng(0))
        assert seen == windows[1] and near["messages"][1]["content"] == said[3]
        lengths.add(len(windows))
    assert lengths == {2, 3}  # long answers are read in the first region


def test_attention_of_each_call_is_led_to_what_it_counts_in(built):
    """The tokens that the cells of a call are to look at show the answer, in the image that the call counts in."""
    page, options = (
        make_world("receipts", 5).sample(0),
        {"mix": {"chain": 1.0}, "place": 1.0, "rows": False, "jitter": 0},
    )
    stage = Stage(name="t", objective="documents", samples=8, batch=1, options=options)
    objective = objective_of(built, stage, make_world("receipts", 5))
    total = next(qa for qa in page.qas if qa.field == "total")
    item, windows = objective.teller.chain(page, total, np.random.default_rng(0))
    row = objective.processor.encode_item(item)
    aims = objective.ask(row, windows, total)
    assert len(aims) == 8 and len(windows) == 3  # two calls of four cells
    ids = torch.as_tensor(row["input_ids"])
    pads = torch.nonzero(ids == objective.config.image_token_id).flatten()
    counts = [int(thw.prod()) // 4 for thw in row["image_grid_thw"]]
    for call, (view, window) in enumerate(zip(pads.split(counts)[:2], windows[:2], strict=True)):
        rows, columns = (int(v) // 2 for v in row["image_grid_thw"][call][1:])
        for place, *seen in aims[4 * call : 4 * call + 4].tolist():
            assert int(ids[place]) in objective.cell_ids
            for token in (t for t in seen if t >= 0):
                at = int(torch.nonzero(view == token))  # fails where it is a token of another image
                x = window[0] + (at % columns + 0.5) * (window[2] - window[0]) / columns
                y = window[1] + (at // columns + 0.5) * (window[3] - window[1]) / rows
                assert any(b[0] - 30 < x < b[2] + 30 and b[1] - 30 < y < b[3] + 30 for b in total.boxes)
