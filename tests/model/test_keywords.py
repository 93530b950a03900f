"""The base model's keyword arguments with looks in the input: as stock Qwen2-VL takes them, or one true sentence.

What a look makes of the embeddings is the oracle's (`support.oracle`); stock then runs over these embeddings with the
same keyword.
"""

from __future__ import annotations

import pytest
import torch
from support.oracle import Oracle, deepstack_inputs
from support.tiny_model import conversation, stack, tiny_model
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, Trainer, TrainingArguments

from relook.errors import UserError

CLOSE = dict(atol=1e-4, rtol=1e-4)
LOOKS = [(), ("region",), ("clip",), ("detection", "clip")]
GREEDY = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)


class Yardstick(Oracle):
    """The oracle, and stock's own output over the embeddings it arrives at."""

    def _hidden(self, embeds, positions, inner):
        self.inputs, self.inner = dict(inputs_embeds=embeds[None], position_ids=positions), inner
        return super()._hidden(embeds, positions, inner)

    def stock_output(self, row, **keywords):
        self.logits(row)
        return self.stock_again(**keywords)

    def stock_again(self, **keywords):
        more = deepstack_inputs(self.inputs["inputs_embeds"].shape[1], self.inner)  # stock takes it with images only
        add = lambda _module, args, given: (args, {**given, **more})  # noqa: E731
        hook = self.stock.model.language_model.register_forward_pre_hook(add, with_kwargs=True)
        try:
            return self.stock(**self.inputs, **keywords)
        finally:
            hook.remove()


pytestmark = pytest.mark.usefixtures("base")


@pytest.fixture(scope="module")
def model(base):
    return tiny_model()


@pytest.fixture(scope="module")
def stock(model):
    return Yardstick(model)


def row_of(looks, seed=3, labels=False):
    return {k: v for k, v in conversation(looks, seed).items() if labels or k != "labels"}


@pytest.mark.parametrize("looks", LOOKS, ids=str)
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"output_hidden_states": True},
        {"use_cache": False},
        {"logits_to_keep": 3},
        {"logits_to_keep": torch.tensor([2, 5])},
        {"logits_to_keep": torch.tensor([[2, 5, 7]])},
        {"labels": True, "num_items_in_batch": torch.tensor(7)},
    ],
    ids=lambda keywords: "+".join(keywords) or "none",
)
@torch.no_grad()
def test_forward_takes_the_keywords_of_stock(model, stock, looks, keywords):
    row = row_of(looks, labels="labels" in keywords)
    if "labels" in keywords:
        keywords = keywords | {"labels": row.pop("labels")}
    ours, theirs = model(**row, **keywords), stock.stock_output(row, **keywords)
    torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
    assert (ours.past_key_values is None) == (theirs.past_key_values is None)
    assert (ours.hidden_states is None) == (theirs.hidden_states is None)
    for one, other in zip(ours.hidden_states or (), theirs.hidden_states or (), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    if theirs.loss is not None:
        torch.testing.assert_close(ours.loss, theirs.loss, **CLOSE)
    as_tuple, expected = (
        model(**row, **keywords, return_dict=False),
        stock.stock_again(**keywords, return_dict=False),
    )
    assert list(map(type, as_tuple)) == list(map(type, expected))
    torch.testing.assert_close(as_tuple[0], expected[0], **CLOSE)


@pytest.mark.parametrize("looks", LOOKS, ids=str)
@torch.no_grad()
def test_attention_maps_are_those_of_one_pass(looks):
    model = tiny_model(attn_implementation="eager")
    oracle, row = Yardstick(model), row_of(looks)
    oracle.stock.set_attn_implementation("eager")
    expected = oracle.stock_output(row, output_attentions=True).attentions
    found = model(**row, output_attentions=True).attentions
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    batch = stack([row_of(looks, labels=True), conversation((), 1)], "left")
    real = int(row["input_ids"].shape[1])
    for one, other in zip(model(**batch, output_attentions=True).attentions, expected, strict=True):
        torch.testing.assert_close(one[:1, :, -real:, -real:], other, **CLOSE)


@torch.no_grad()
def test_the_mean_over_learnt_tokens_of_a_step_however_it_is_cut(model):
    """num_items_in_batch as Trainer gives it: the parts' losses add up to the loss of the whole."""
    rows = [conversation(looks, seed, answer=3 + 4 * seed) for seed, looks in enumerate(LOOKS)]
    learnt = sum(int((row["labels"][:, 1:] != -100).sum()) for row in rows)
    whole = model(**stack(rows)).loss
    parts = [model(**row, num_items_in_batch=learnt).loss for row in rows]
    torch.testing.assert_close(sum(parts), whole, **CLOSE)


@pytest.mark.parametrize("looks", LOOKS, ids=str)
@torch.no_grad()
def test_positions_of_two_dimensions_count_for_all_three(model, stock, looks):
    row = row_of(looks)
    length = row["input_ids"].shape[1]
    where = 2 * torch.arange(length)[None]
    found = [model(**row, position_ids=where.expand(shape + (-1,))).logits for shape in ((1,), (3, 1), (4, 1))]
    for one in found[1:]:
        torch.testing.assert_close(found[0], one, **CLOSE)
    both = stack([row_of(looks, labels=True)] * 2)
    both.pop("labels")
    torch.testing.assert_close(model(**both, position_ids=where).logits, found[0].expand(2, -1, -1), **CLOSE)


@torch.no_grad()
def test_a_call_that_is_masked_is_none(model):
    """Its columns are hidden from everything behind them, and its image is not conditioned."""
    row = row_of(("clip",))
    ids = row["input_ids"]
    token = model.config.reencode_ids("clip")
    start = int((ids[0] == token.start).nonzero()[0])
    mask = torch.ones_like(ids)
    mask[0, start - 2 : start + 4] = 0
    positions = model._positions(ids, None, row["image_grid_thw"], None)
    hidden = model(**row, attention_mask=mask, position_ids=positions).logits[0, start + 4 :]
    other = ids.clone()
    other[0, start : start + 2] = 5  # words in place of the call
    expected = model(**row | {"input_ids": other}, attention_mask=mask, position_ids=positions).logits[0, start + 4 :]
    torch.testing.assert_close(hidden, expected, **CLOSE)
    with pytest.raises(UserError, match=r"attention_mask has shape .*; where the input holds a look"):
        length = ids.shape[1]
        model(**row, attention_mask=torch.ones(1, 1, length, length).tril().bool(), position_ids=positions)


@torch.no_grad()
def test_the_cache_that_comes_back_by_default_goes_on(model, stock):
    row = row_of(("clip",))
    ids, expected = row["input_ids"], stock.logits(row)
    positions = model._positions(ids, None, row["image_grid_thw"], None)
    first = model(**row | {"input_ids": ids[:, :-1]})
    step = model(input_ids=ids[:, -1:], position_ids=positions[..., -1:], past_key_values=first.past_key_values)
    torch.testing.assert_close(step.logits[0, -1], expected[-1], **CLOSE)


def after_the_call(model, row):
    """Column behind the turn that holds the call."""
    return int((row["input_ids"][0] == model.config.reencode_ids("clip").start).nonzero()[0]) + 4


@torch.no_grad()
def test_a_look_that_continues_a_cache_is_conditioned_by_the_call_in_it(model, stock):
    row = row_of(("clip",))
    ids, expected = row["input_ids"], stock.logits(row)
    positions = model._positions(ids, None, row["image_grid_thw"], None)
    images = {name: row.pop(name) for name in ("clip_pixel_values", "clip_images_grid_thw")}
    for back in (0, 3):  # after the turn, and between the call's start and its action
        cut = after_the_call(model, row) - back
        first = model(**row | {"input_ids": ids[:, :cut]}, use_cache=True)
        rest = dict(input_ids=ids[:, cut:], position_ids=positions[..., cut:], **images)
        with pytest.raises(UserError, match="look_states"):
            model(**rest, past_key_values=first.past_key_values)
        out = model(**rest, past_key_values=first.past_key_values, look_states=first.look_states)
        torch.testing.assert_close(out.logits[0], expected[cut:], **CLOSE)


@torch.no_grad()
def test_generate_continues_a_cache_with_a_look(model, stock):
    row = row_of(("clip",))
    ids, cut = row["input_ids"], after_the_call(model, row)
    images = {name: row[name] for name in ("pixel_values", "image_grid_thw")}
    for states in (True, False):
        first = model(input_ids=ids[:, :cut], **images, use_cache=True)
        more = {k: v for k, v in row.items() if k != "pixel_values"} | {"attention_mask": torch.ones_like(ids)}
        more |= {"past_key_values": first.past_key_values, "look_states": first.look_states if states else None}
        if states:
            assert torch.equal(model.generate(**more, **GREEDY), model.generate(**row, **GREEDY))
        else:
            with pytest.raises(UserError, match="look_states"):
                model.generate(**more, **GREEDY)
    more.pop("image_grid_thw")
    with pytest.raises(UserError, match="more images than image_grid_thw has grids"):
        model.generate(**more, **GREEDY)


@pytest.mark.parametrize("looks", LOOKS, ids=str)
def test_generate_without_a_cache_keeps_the_images(model, looks):
    row = row_of(looks)
    row["input_ids"] = row["input_ids"][:, :-3]
    no_image = dict(suppress_tokens=[model.config.image_token_id])  # without a cache, stock would look for its pixels
    cached = model.generate(**row, **GREEDY, **no_image)
    assert torch.equal(cached, model.generate(**row, **GREEDY, **no_image, use_cache=False))


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"cache_implementation": "static", "disable_compile": True}, UserError, "a cache that grows"),
        ({"prefill_chunk_size": 20}, UserError, "prefill_chunk_size"),
        ({"num_beams": 2}, UserError, "beam search cannot follow looks"),
        ({"prompt_lookup_num_tokens": 2}, UserError, "assisted generation cannot follow looks"),
    ],
    ids=lambda value: "" if not isinstance(value, dict) else next(iter(value)),
)
def test_ways_to_generate_that_cannot_follow_looks(model, keywords, error, words):
    with pytest.raises(error, match=words):
        model.generate(**row_of(("clip",)), max_new_tokens=2, do_sample=False, **keywords)


def test_images_without_pads_and_pads_without_images(model):
    row = row_of(("clip",))
    images = {name: row[name] for name in ("clip_pixel_values", "clip_images_grid_thw")}
    with pytest.raises(UserError, match=r"the text holds 6 image tokens but the images make 0 features"):
        model(**{name: value for name, value in row.items() if name not in images})
    with pytest.raises(UserError, match=r"the text holds 0 image tokens but the images make 6 features"):
        model(**row_of(()), **images)
    with pytest.raises(UserError, match="no 'clip' look"):
        tiny_model(looks=("detection",))(**row)


class Forced(LogitsProcessor):
    def __init__(self, tokens, prompt):
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids, scores):
        out = torch.full_like(scores, -1e9)
        out[:, self.tokens[input_ids.shape[1] - self.prompt]] = 0
        return out


@torch.no_grad()
def test_steps_of_generate_equal_one_forward_whatever_is_written(model, stock):
    """An action without its start, a start of another look, a call: by a cache step for step, and whole."""
    clip, other = (model.config.reencode_ids(look) for look in ("clip", "detection"))
    for written in ([5, clip.action, 7, 8], [other.start, clip.action, 7, 8], [clip.start, clip.action, 7, 8]):
        row = row_of((), seed=4)
        prompt = row["input_ids"].shape[1]
        out = model.generate(
            **row,
            **GREEDY | {"max_new_tokens": 4, "min_new_tokens": 0},
            logits_processor=LogitsProcessorList([Forced(written, prompt)]),
            return_dict_in_generate=True,
            output_logits=True,
        )
        whole = row | {"input_ids": out.sequences}
        expected = stock.logits(whole)[prompt - 1 : -1]
        torch.testing.assert_close(torch.cat(out.logits), expected, **CLOSE)
        torch.testing.assert_close(model(**whole).logits[0, prompt - 1 : -1], expected, **CLOSE)


def test_sliding_windows_are_refused(base):
    if not hasattr(tiny_model().config.text_config, "use_sliding_window"):
        pytest.skip("this base has none")
    with pytest.raises(ValueError, match="use_sliding_window is true"):
        tiny_model(use_sliding_window=True, sliding_window=8, max_window_layers=1)


class Rows(torch.utils.data.Dataset):
    def __init__(self, looks):
        self.looks = looks

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return conversation(self.looks, index, answer=5)


@pytest.mark.parametrize("looks", [(), ("clip",)], ids=str)
def test_trainer_predicts_logits(model, looks, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, remove_unused_columns=False, disable_tqdm=True
    )
    found = Trainer(model, arguments, data_collator=stack).predict(Rows(looks))
    assert found.predictions.shape[-1] == 128 and len(found.predictions) == 3


def test_what_learns_but_is_not_used_takes_a_step_of_zero():
    model = tiny_model().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("projectors.clip.linear_condition"))
    model(**conversation(())).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(gradient is not None and not gradient.any() for gradient in gradients)
    model(**conversation(("clip",))).loss.backward()
    assert any(gradient.any() for gradient in gradients)


@torch.no_grad()
def test_a_cache_of_ones_own_is_kept(model):
    row, cache = row_of(("clip",)), DynamicCache()
    assert model(**row, past_key_values=cache).past_key_values is cache
    assert cache.get_seq_length() == row["input_ids"].shape[1]


@pytest.mark.parametrize("look", ["clip", "detection"])
@pytest.mark.parametrize("form", ["alone", "right", "left", "padded chunk"])
@torch.no_grad()
def test_a_cache_that_ends_in_the_midst_of_a_call(model, stock, look, form):
    """The start is the cache's last token, the action the first that follows, wherever padding lies; without the
    start's hidden state it is refused."""
    row, other = row_of((look,)), row_of((), seed=2)
    full, ids = stock.logits(row), row["input_ids"]
    cut = 1 + int((ids[0] == model.config.reencode_ids(look).start).nonzero()[0])
    images = {name: row[name] for name in ("pixel_values", "image_grid_thw")}
    first = {"input_ids": ids[:, :cut], **images}
    positions = model._positions(ids, None, images["image_grid_thw"], None)[..., cut : cut + 2]  # (3, 1, 2)
    after = ids[:, cut : cut + 2]
    if form == "alone":
        out = model(**first, use_cache=True)
        goes_on = dict(input_ids=after, position_ids=positions)
    else:
        rows = [each | {"labels": each["input_ids"]} for each in (first, other)]
        batch = stack(rows, "right" if form == "right" else "left")
        del batch["labels"]
        out, mask = model(**batch, use_cache=True), batch["attention_mask"]
        after, real = torch.cat([after, torch.tensor([[5, 6]])]), torch.ones(2, 2, dtype=torch.long)
        positions = positions.expand(3, 2, 2).clone()
        if form == "padded chunk":
            after = torch.cat([torch.tensor([[0], [7]]), after], dim=1)
            real = torch.tensor([[0, 1, 1], [1, 1, 1]])
            positions = torch.cat([positions[..., :1], positions], dim=2)
        goes_on = dict(input_ids=after, position_ids=positions, attention_mask=torch.cat([mask, real], dim=1))
    cache = out.past_key_values
    with pytest.raises(UserError, match="pass look_states"):
        model(**goes_on, past_key_values=cache)
    logits = model(**goes_on, past_key_values=cache, look_states=out.look_states).logits[0, -2:]
    torch.testing.assert_close(logits, full[cut : cut + 2], **CLOSE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip_images_grid_thw": None}, "clip_pixel_values came without clip_images_grid_thw"),
        ({"image_grid_thw": None}, "pixel_values came without image_grid_thw"),
        ({"attention_mask": torch.ones(1, 3, dtype=torch.long)}, r"attention_mask has shape \(1, 3\)"),
        ({"attention_mask": {"full_attention": None}}, "attention_mask is a dict; where the input holds a look"),
    ],
    ids=["clip grid", "image grid", "narrow mask", "dict of masks"],
)
def test_arguments_that_do_not_go_together_are_one_sentence(model, changes, words):
    with pytest.raises(UserError, match=words):
        model(**row_of(("clip",)) | changes)
