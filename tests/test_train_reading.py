"""Dense reading: where the truth lies in a window, how rows are pooled, and what a fresh tower looks at."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relook.data.worlds import make_world
from relook.train import lines, tiny


def test_letters_under_agrees_with_the_boxes_of_the_page():
    """Every cell that is said to lie on a letter has its centre inside a box of that letter's line and columns."""
    page = make_world("receipts", 5).sample(1)
    classes = {c: i + 1 for i, c in enumerate(type(make_world("receipts", 5)).charset)}
    window = (0, 0, page.image.width, page.image.height)
    grid = (page.image.height // 6, page.image.width // 6)
    found = lines.letters_under(page.meta["lines"], window, grid, classes)
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
    """On noise, most inner patches look where `NEIGHBOURS` says: judged on the library's own q and k."""
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
            assert (steps == tiny.NEIGHBOURS[layer][head]).all(-1).mean() > 0.6
