"""The processor: parity with the published data pipeline, one encoding of ids, saving and loading, invalid input.

The reference, parity/data/data_pipeline.json, was recorded from the published code with the real Qwen2-VL vocabulary,
which is built here from dashscope's BPE ranks (qwen_vocab.py). torchvision is normally absent where these tests run, so
they also show that the processor does not need it.
"""

import json
from dataclasses import replace

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from support import TESTS, qwen_vocab
from support.small_processors import as_chat, page, processor_of, region_item
from transformers import Qwen2VLImageProcessorPil

from relook.errors import UserError
from relook.looks import LOOKS, write_call
from relook.model.loading import load_processor, resolve
from relook.processing import (
    IGNORED,
    PREPROCESSING,
    View,
    VPTQwen2VLProcessor,
    add_look_tokens,
    chat_template,
    expand,
)

DATA = TESTS / "fixtures" / "parity" / "data"
RECORDED = json.loads((DATA / "data_pipeline.json").read_text())
SAMPLES = {sample["name"]: sample for sample in RECORDED["samples"]}

# The recording was made with Pillow 13. Pillow 12 resizes crops along the other axis first; rounding in between then
# moves some pixels by one grey level: 1/255 over the smallest of the channels' standard deviations, about 0.015.
PIXELS, GREY_LEVEL = 2e-3, 1 / 255 / 0.26
EXACT_PILLOW = int(PIL.__version__.split(".")[0]) >= 13


# ---- the real vocabulary


@pytest.fixture(scope="session")
def published(qwen_folder):
    """The processor of each published checkpoint, from the plain folder."""
    processors = {}
    for look in RECORDED["meta"]["tokens"]:
        processors[look] = VPTQwen2VLProcessor.from_pretrained(qwen_folder, looks=["region", look])
        processors[look].add_look_tokens()
        processors[look] = processors[look].with_settings("published")
    return processors


@pytest.mark.parametrize("look", RECORDED["meta"]["tokens"])
def test_token_ids_are_the_published_ones(published, look):
    tokenizer, expected = published[look].tokenizer, RECORDED["meta"]["tokens"][look]
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in expected} == expected
    assert len(tokenizer) == max(expected.values()) + 1
    control = [LOOKS[look].pad, LOOKS["region"].start, LOOKS[look].action]
    assert {token: published[look].tokens[token] for token in control} == {token: expected[token] for token in control}


def test_only_pads_are_special(published):
    processor = published["clip"]
    text = "<|clip_image_pad|>" + LOOKS["clip"].start + "<|x_3|>" + "<|im_end|>"
    assert (
        processor.decode(processor.tokenizer.encode(text), skip_special_tokens=True) == LOOKS["clip"].start + "<|x_3|>"
    )


@pytest.mark.parametrize("name", SAMPLES)
def test_ids_labels_and_grids_equal_the_published_pipeline(published, name):
    sample = SAMPLES[name]
    encoded = published[sample["tokenizer"]].encode_item(sample["sample"], image_root=DATA)
    assert encoded["input_ids"] == sample["input_ids"]
    assert encoded["labels"] == sample["labels"]
    assert encoded["prompt_ids"] == sample["prompt_ids"]
    assert set(encoded) - {"input_ids", "labels", "prompt_ids"} == set(sample["vision"])
    for key, expected in sample["vision"].items():
        if "grid" in key:
            assert encoded[key].tolist() == expected
        else:
            assert list(encoded[key].shape) == expected["shape"]


@pytest.mark.parametrize("name", SAMPLES)
def test_pixels_equal_the_published_pipeline(published, name):
    sample = SAMPLES[name]
    encoded = published[sample["tokenizer"]].encode_item(sample["sample"], image_root=DATA)
    for key, expected in sample["vision"].items():
        if "grid" in key:
            continue
        values = encoded[key].flatten()[expected["sample_index"]].numpy()
        error = np.abs(values - np.array(expected["sample"]))
        if EXACT_PILLOW:
            assert error.max() < PIXELS, key
        else:
            assert error.max() < GREY_LEVEL and (error > PIXELS).mean() < 0.05, key
        assert encoded[key].mean().item() == pytest.approx(expected["mean"], abs=1e-5)
        assert encoded[key].std().item() == pytest.approx(expected["std"], abs=1e-5)


# ---- one way of writing ids


@pytest.mark.parametrize("name", SAMPLES)
def test_transformers_way_equals_encode_item(published, name):
    """processor.apply_chat_template, as pipelines and Trainers call it, gives the ids and pixels of encode_item."""
    sample = SAMPLES[name]
    processor = published[sample["tokenizer"]]
    encoded = processor.encode_item(sample["sample"], image_root=DATA)
    out = processor.apply_chat_template(
        as_chat(sample["sample"], DATA), tokenize=True, return_dict=True, return_tensors="pt"
    )
    newline = processor.tokenizer.encode("\n")  # the template closes the last turn with its newline
    assert out["input_ids"][0].tolist() == encoded["input_ids"] + newline
    for key in sample["vision"]:
        assert torch.equal(out[key], encoded[key]), key
    is_image = out["input_ids"] == processor.image_token_id
    assert torch.equal(out["mm_token_type_ids"], is_image.to(out["mm_token_type_ids"].dtype))


@pytest.mark.parametrize("name", SAMPLES)
def test_blocks_of_the_loop_equal_encode_item(published, name):
    """What the loop pushes (opening, sampled turn, next user turn, ...) adds up to what training sees."""
    sample = SAMPLES[name]
    processor = published[sample["tokenizer"]]
    encoded = processor.encode_item(sample["sample"], image_root=DATA)
    counts = {}
    for kind in ("image", "clip", "detection", "seg"):
        number = len(sample["sample"].get(LOOKS["region" if kind == "image" else kind].item_key) or [])
        tensors = {key: encoded[key] for key in encoded if key not in ("input_ids", "labels", "prompt_ids")}
        counts[kind] = processor.pad_counts(kind, tensors, number)
    left = {kind: iter(numbers) for kind, numbers in counts.items()}
    contents = [expand(m["content"], left) for m in sample["sample"]["messages"]]
    ids, encode = processor.user_ids(contents[0], opening=True), processor.tokenizer.encode
    for asked, content in enumerate(contents[1:], start=1):
        if asked % 2:
            ids += encode(content)
        else:
            ids += encode("<|im_end|>") + processor.user_ids(content, opening=False)
    assert ids + encode("<|im_end|>") == encoded["input_ids"]
    ids, _ = processor.conversation_ids(sample["sample"]["messages"][:-1], counts)
    assert ids == sample["prompt_ids"]


def test_pieces_are_tokenised_apart(published):
    """An answer that begins with a newline must not melt into its header's newline ("\\n\\n" is one token)."""
    item = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\nHello"}]}
    encoded = published["clip"].encode_item(item)
    assert encoded["input_ids"][: len(encoded["prompt_ids"])] == encoded["prompt_ids"]


# ---- small processors


def test_every_look_has_its_own_resolution():
    processor = processor_of(looks=["region", "clip"], first_look=32, second_look=None, reencode_look=View(48))
    encoded = processor.encode_item(
        region_item(
            clip_images=[page()],
            messages=[
                *region_item()["messages"],
                {"role": "user", "content": "<clip_image>"},
                {"role": "assistant", "content": "you"},
            ],
        )
    )
    assert encoded["image_grid_thw"].tolist() == [[1, 6, 8], [1, 6, 6]]  # 64 x 48 seen at 32 x 24, 24 x 24 as it is
    assert encoded["clip_images_grid_thw"].tolist() == [[1, 8, 12]]  # at 48 x 36, moved to 48 x 32


def test_a_view_is_resampled_once():
    """What `view` returns is what the ViT sees: the image processor changes nothing but the scale of the numbers."""
    processor = processor_of(first_look=View(50, "lanczos"))
    seen = processor.view(page(61, 37), "first")
    pixels = processor.encode_images([seen])["pixel_values"]
    ip = processor.image_processor
    back = pixels.view(-1, 3, 2, 4, 4)[:, :, 0] * torch.tensor(ip.image_std)[:, None, None]
    back = ((back + torch.tensor(ip.image_mean)[:, None, None]) * 255).round()
    assert sorted(back.flatten().tolist()) == sorted(np.asarray(seen).flatten().tolist())
    assert np.array_equal(np.asarray(processor.view(seen, "first")), np.asarray(seen))


def test_nearest_drops_what_bicubic_keeps():
    """Thin lines vanish or survive whole under nearest-neighbour; a proper filter keeps their mean."""
    lines = np.full((100, 100, 3), 255, np.uint8)
    lines[:, ::4] = 0
    means = {r: np.asarray(View(50, r).apply(Image.fromarray(lines))).mean() for r in ("nearest", "bicubic", "lanczos")}
    assert abs(means["bicubic"] - lines.mean()) < 3 and abs(means["lanczos"] - lines.mean()) < 3
    assert abs(means["nearest"] - lines.mean()) > 50


@pytest.mark.parametrize(
    ("view", "size", "seen"),
    [
        (View(512), (640, 400), (512, 320)),
        (View(512), (100, 80), (100, 80)),
        (View(None), (3000, 2000), (3000, 2000)),
        (View(512), (1000, 20), (512, 28)),  # 512 x 10, sides under 28 raised
        (View(None), (10000, 40), (7200, 40)),  # over 200:1 cut to 180:1
        (View(None), (40, 10000), (40, 7200)),
        (View(512), (1, 1), (28, 28)),
        (View(None, scale=0.5), (256, 128), (128, 64)),
        (View(64, scale=2.0), (100, 20), (64, 28)),
        (View(None, scale=3.0), (30, 20), (90, 60)),
        (View(None, min_pixels=40_000), (100, 64), (250, 160)),
        (View(None, min_pixels=40_000, max_scale=2.0), (100, 64), (200, 128)),
        (View(None, min_pixels=40_000, max_scale=0.5), (100, 64), (100, 64)),  # never smaller than `scale` says
        (View(None, min_pixels=40_000), (400, 200), (400, 200)),
        (View(None, scale=0.5, min_pixels=40_000), (400, 200), (282, 141)),  # 20,000 after scale
        (View(128, min_pixels=40_000), (100, 64), (128, 81)),  # the cap holds
        (View(None, max_pixels=80_000), (400, 800), (200, 400)),
        (View(300, max_pixels=80_000), (400, 800), (150, 300)),  # the cap says less
        (View(None, max_pixels=80_000), (200, 400), (200, 400)),
    ],
)
def test_sizes_of_views(view, size, seen):
    assert view.target(size) == seen
    for resample in ("nearest", "bicubic"):
        applied = replace(view, resample=resample).apply(Image.new("L", size))
        assert applied.size == seen and applied.mode == "RGB"


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (2000, 100), (5, 7), (333, 121)])
def test_odd_sizes_go_through(size):
    processor = processor_of(looks=list(LOOKS))
    for look, stage in [("image", "first"), ("image", "crop"), ("clip", "reencode"), ("detection", "reencode")]:
        tensors = processor.encode_images([processor.view(Image.new("RGB", size), stage, look)], look)
        count = processor.pad_counts(look, tensors, 1)[0]
        assert count >= 1
        if look in ("image", "clip"):
            grid = next(value for key, value in tensors.items() if "thw" in key)
            assert grid.prod() == 4 * count


def test_batches_and_texts_without_images():
    processor = processor_of(looks=["region", "clip"])
    image, clip = (f"<|vision_start|>{LOOKS[name].pad}<|vision_end|>" for name in ("region", "clip"))
    out = processor(
        text=[f"{image}{clip} a", "b", f"{image}{image}c"],
        images=[[page(16, 16)], [page(32, 16), page(16, 24)]],
        clip_images=page(16, 16),
        padding=True,
        return_tensors="pt",
    )
    pads = {
        name: (out["input_ids"] == processor.tokenizer.convert_tokens_to_ids(LOOKS[name].pad)).sum(1) for name in LOOKS
    }
    assert pads["region"].tolist() == [4, 0, 8 + 6] and pads["clip"].tolist() == [4, 0, 0]
    assert out["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 8], [1, 6, 4]]
    assert out["clip_images_grid_thw"].tolist() == [[1, 4, 4]]
    assert set(out) <= set(processor.model_input_names)
    assert set(processor(text="only words")) == {"input_ids", "attention_mask", "mm_token_type_ids"}


def test_crops_in_a_chat_get_the_second_view():
    processor = processor_of(first_look=16, second_look=None)
    out = processor.apply_chat_template(
        as_chat(region_item(), DATA), tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert out["image_grid_thw"].tolist() == processor.encode_item(region_item())["image_grid_thw"].tolist()
    for image in (page(), np.asarray(page())):
        as_given = processor(text="<|image_pad|>", images=image, views=False)
        assert as_given["image_grid_thw"].tolist() == [[1, 12, 16]]


def test_labels_cover_only_the_assistant():
    processor = processor_of(looks=["region", "clip"])
    item = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "<|clip_action_start|><|clip_action|><|clip_action_end|>"},
        ]
    }
    encoded = processor.encode_item(item)
    learnt = [i for i in encoded["labels"] if i != IGNORED]
    assert processor.decode(learnt) == "<|clip_action_start|><|clip_action_end|><|im_end|>"
    assert processor.decode(encoded["prompt_ids"]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "labels" not in processor.encode_item(item, labels=False)
    no_system = processor_of(system="")
    assert (
        no_system.decode(no_system.user_ids("Hi", opening=True))
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_follows_the_system_prompt():
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    processor = processor_of(system='Say "yes".')
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == (
        '<|im_start|>system\nSay "yes".<|im_end|>\n'
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>\n?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert processor_of(system="").apply_chat_template(chat).startswith("<|im_start|>user")
    for part in ("what?", {"text": "what?"}, {"type": "text", "text": 7}):
        with pytest.raises(UserError, match="is not understood; expected"):
            processor.apply_chat_template([{"role": "user", "content": [part]}])
    with pytest.raises(Exception, match="video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


# ---- saving and loading


def test_round_trip(tmp_path):
    processor = processor_of(
        looks=["region", "seg"],
        grid_size=6,
        region_margin=2,
        first_look=View(40, "lanczos", 0.5),
        second_look=View(None, min_pixels=900, max_scale=3.0),
        reencode_look=View(None, scale=2.0),
        free_choice=True,
        question_first=True,
        system="Look.",
        region_of="last",
        max_looks=3,
    )
    processor.save_pretrained(tmp_path)
    again = VPTQwen2VLProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    assert (again.first_look, again.second_look, again.reencode_look) == (
        View(40, "lanczos", 0.5),
        View(None, min_pixels=900, max_scale=3.0),
        View(None, scale=2.0),
    )
    assert (again.region_of, again.max_looks) == ("last", 3)
    assert again.tokens == processor.tokens and "<|x_5|>" in again.tokens and "<|x_6|>" not in again.tokens
    assert again.chat_template == processor.chat_template == chat_template("Look.")
    item = region_item()
    for key, value in processor.encode_item(item).items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(again.encode_item(item)[key]))


def test_a_folder_from_before_nested_looks(tmp_path):
    """Of models that look as before the file stays as it was: older versions read it, and hashes of it hold."""
    processor_of().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    assert not {"region_of", "max_looks"} & config.keys()
    for view in ("first_look", "second_look"):
        assert config[view].keys() == {"longest_side", "resample", "scale"}
    again = VPTQwen2VLProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor_of().to_dict()
    assert (again.region_of, again.max_looks, again.first_look.min_pixels) == ("whole", 1, None)


def test_round_trip_through_auto_processor(tmp_path):
    from transformers import AutoProcessor

    import relook  # noqa: F401  (registers the class)

    processor_of(looks=["clip"], grid_size=4).save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is VPTQwen2VLProcessor and again.looks == ["clip"] and again.grid_size == 4


def test_settings_given_at_loading_stay_out_of_the_tokenizer(tmp_path):
    processor_of().save_pretrained(tmp_path / "a")
    changed = VPTQwen2VLProcessor.from_pretrained(tmp_path / "a", first_look=View(99), region_margin=0)
    assert changed.first_look == View(99) and changed.region_margin == 0
    changed.save_pretrained(tmp_path / "b")
    assert "first_look" not in (tmp_path / "b" / "tokenizer_config.json").read_text()
    assert VPTQwen2VLProcessor.from_pretrained(tmp_path / "b").first_look == View(99)


def test_plain_qwen_folder(qwen_folder):
    """A hub folder that knows no looks: loads, keeps its pixel limits, says what is missing, then gets the tokens."""
    processor = VPTQwen2VLProcessor.from_pretrained(qwen_folder)
    assert type(processor.image_processor) is Qwen2VLImageProcessorPil
    assert dict(processor.image_processor.size) == {"shortest_edge": 3136, "longest_edge": 12845056}
    with pytest.raises(UserError, match=r"lacks 22 control tokens .*add_look_tokens"):
        processor.tokens  # noqa: B018
    with pytest.raises(UserError, match="add_look_tokens"):
        processor.config_token_ids()
    assert processor.add_look_tokens(["region", "clip", "detection", "seg"]) == 3 + 18 + 9
    assert processor.add_look_tokens() == 0
    ids = processor.config_token_ids()
    assert ids["clip_image_token_id"] == 151657 and ids["seg_image_token_id"] == 151659
    assert ids["para_start_id"] == 151644 and ids["clip_action_id"] == ids["clip_action_start_id"] + 1


def test_template_of_the_folder_is_kept(tmp_path):
    tokenizer = qwen_vocab.byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    Qwen2VLImageProcessorPil().save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'image here' }}"}))
    assert VPTQwen2VLProcessor.from_pretrained(tmp_path).chat_template == "{{ 'image here' }}"
    (tmp_path / "chat_template.json").unlink()
    assert VPTQwen2VLProcessor.from_pretrained(tmp_path).chat_template == chat_template()


def test_named_settings():
    processor = processor_of(first_look=View(99))
    published = processor.with_settings("published")
    assert published.first_look == published.second_look == View(512, "nearest") and published.reencode_look is None
    assert processor.first_look == View(99) and published.tokenizer is processor.tokenizer
    assert PREPROCESSING["default"]["first_look"].resample != "nearest"
    with pytest.raises(UserError, match="'old' is unknown; expected one of default, published, published-224"):
        processor.with_settings("old")


def test_adding_tokens_keeps_those_there():
    tokenizer = qwen_vocab.byte_tokenizer()
    known = len(tokenizer)
    assert add_look_tokens(tokenizer, ["clip"], grid_size=8) == 4
    before = tokenizer.convert_tokens_to_ids("<|clip_action|>")
    assert add_look_tokens(tokenizer, ["region", "clip"], grid_size=3) == 2 + 6
    assert tokenizer.convert_tokens_to_ids("<|clip_action|>") == before and len(tokenizer) == known + 12


def test_no_torchvision_is_needed():
    """The normal case where these tests run; where it is installed, the PIL classes are used all the same."""
    processor = processor_of()
    assert VPTQwen2VLProcessor.get_attributes() == ["image_processor", "tokenizer"]
    assert type(processor.image_processor).__name__.endswith("Pil")


def test_calls_of_a_finer_grid_stay_calls():
    """receipts-tiny has 12 x 12 cells: a call that names cell 10 is structure in training, too."""
    processor = load_processor(resolve("receipts-tiny"))
    call = write_call("region", (1, 2, 10, 4), processor.grid_size)
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": call}]
    ids, written = processor.conversation_ids(turns, {})
    said = [token for token, mine in zip(ids, written, strict=True) if mine]
    assert processor.tokenizer.convert_ids_to_tokens(said)[:-1] == [piece + ">" for piece in call.split(">")[:-1]]
