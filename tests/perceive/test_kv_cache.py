"""The batched key-value cache: after appending, selecting and merging, every row equals the row run alone."""

from __future__ import annotations

import torch
from support.tiny_model import tiny_model

from relook.perceive.kv_cache import KVRows


def blocks(model, lengths, seed=0):
    """Random (embeds, positions, real) for rows of the given lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    embeds = torch.randn(len(lengths), width, model.config.text_config.hidden_size, generator=generator)
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    return embeds, real


@torch.no_grad()
def push(model, kv, embeds, real, starts):
    positions = (torch.arange(embeds.shape[1]) + torch.tensor(starts)[:, None]).expand(3, -1, -1)
    return kv.forward(model, embeds, positions, real)


def test_rows_that_join_and_part_equal_rows_alone():
    model = tiny_model()
    first, real = blocks(model, [3, 7, 5])
    alone, together = [], KVRows.empty(3)
    push(model, together, first, real, [0, 0, 0])
    for row, length in enumerate([3, 7, 5]):
        kv = KVRows.empty()
        push(model, kv, first[row : row + 1, :length], real[row : row + 1, :length], [0])
        alone.append(kv)
    # row 1 leaves, rows 2 and 0 go on (in another order), row 1 comes back beside row 0
    step, ones = blocks(model, [1, 1], seed=1)
    left = together.extract(1)
    together = together.select_rows([2, 0])
    state = push(model, together, step, ones, [5, 3])
    for place, row in enumerate([2, 0]):
        expected = push(model, alone[row], step[place : place + 1], ones[:1], [[5, 3][place]])
        torch.testing.assert_close(state[place], expected[0], atol=1e-5, rtol=1e-5)
    back = KVRows.merge([left, together.extract(1)])
    more, real = blocks(model, [2, 4], seed=2)
    state = push(model, back, more, real, [7, 4])
    for place, (row, length, start) in enumerate([(1, 2, 7), (0, 4, 4)]):
        expected = push(model, alone[row], more[place : place + 1, :length], real[place : place + 1, :length], [start])
        torch.testing.assert_close(state[place, :length], expected[0], atol=1e-5, rtol=1e-5)
    assert back.lengths == [9, 8]


def test_take_drops_padding_and_join_puts_it_after():
    model = tiny_model()
    kv = KVRows.empty(2)
    push(model, kv, *blocks(model, [2, 4]), [0, 0])
    push(model, kv, *blocks(model, [3, 1]), [2, 4])
    assert kv.mask.int().tolist() == [[1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]
    single = kv.extract(0)
    assert single.mask.shape == (1, 5) and single.mask.all()
    assert all(k.shape[2] == v.shape[2] == 5 for k, v in single.layers)
    joined = KVRows.merge([single, KVRows.empty(), kv.extract(1)])
    assert joined.mask.int().tolist() == [[1] * 5, [0] * 5, [1] * 5]
    for (k, v), (whole_k, whole_v) in zip(single.layers, joined.layers, strict=True):
        assert torch.equal(k[0], whole_k[0]) and torch.equal(v[0], whole_v[0])


def test_a_copy_grows_apart():
    model = tiny_model()
    kv = KVRows.empty()
    push(model, kv, *blocks(model, [4]), [0])
    before = [k.clone() for k, _ in kv.layers]
    copy = kv.copy()
    push(model, copy, *blocks(model, [2], seed=1), [4])
    assert kv.lengths == [4] and copy.lengths == [6]
    assert all(torch.equal(old, now) for old, (now, _) in zip(before, kv.layers, strict=True))


def test_a_single_row_is_not_copied():
    model = tiny_model()
    kv = KVRows.empty()
    push(model, kv, *blocks(model, [4]), [0])
    assert kv.extract(0) is kv and KVRows.merge([kv]) is kv and kv.select_rows([0]) is kv
