"""transformers' generate and pipeline look again, and give the answers of `ask`; batches equal their rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from support.scripted_model import QUESTION, picture, writing
from transformers import DynamicCache, GenerationConfig, TextStreamer, pipeline

import relook
from relook.errors import UserError
from relook.looks import LOOKS, write_call
from relook.model.loading import load_model, load_processor, shipped_models
from relook.processing import VPTQwen2VLProcessor

pytestmark = pytest.mark.usefixtures("base")
CALLS = {"region": write_call("region", (1, 2, 3, 4)), "clip": LOOKS["clip"].start, "none": ""}


def chat_of(image, question=QUESTION, **keys):
    return [
        {
            "role": "user",
            "content": [{"type": "image", **(keys or {"image": image})}, {"type": "text", "text": question}],
        }
    ]


def prompt(processor, *chats, **options):
    many = list(chats) if len(chats) > 1 else chats[0]
    return processor.apply_chat_template(
        many,
        **{"add_generation_prompt": True, **options},
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def test_the_prefix_of_published_answers_is_left_out(tiny_vlm):
    vlm = tiny_vlm(("region", "clip"), free_choice=True)
    inputs, width = (given := prompt(vlm.processor, chat_of(picture()))), given["input_ids"].shape[1]
    with writing(vlm, "Now answer the question.\nthe code"):
        looking = relook.LookAgain(vlm.processor, picture())
        ids = vlm.model.generate(**inputs, max_new_tokens=40, do_sample=False, custom_generate=looking)
    assert vlm.processor.decode(ids[0, width:]) == "the code<|im_end|>" and looking.answers[0].text == "the code"


@pytest.mark.parametrize("look", CALLS)
def test_generate_looks_and_answers_as_ask_does(tiny_vlm, look):
    vlm = tiny_vlm(("region", "clip"), free_choice=True)
    with writing(vlm, CALLS[look], "<|im_end|>" * (look == "region"), "the code"):
        expected = vlm.ask(picture(), QUESTION, max_new_tokens=9)
    inputs = prompt(vlm.processor, chat_of(picture()))
    looking = relook.LookAgain(vlm.processor, [picture()])
    with writing(vlm, CALLS[look], "<|im_end|>" * (look == "region"), "the code"):
        ids = vlm.model.generate(**inputs, max_new_tokens=9, do_sample=False, custom_generate=looking)
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert vlm.processor.decode(new, skip_special_tokens=True) == expected.text == "the code"
    assert looking.answers[0].looks == expected.looks and [x.kind for x in expected.looks] == [look] * (look != "none")
    assert looking.answers[0].usage.sequence_length == expected.usage.sequence_length


def test_a_question_that_spells_control_tokens_is_text(tiny_vlm):
    vlm = tiny_vlm(("region", "clip"), free_choice=True)
    question = "What is <|image_pad|>, and <|im_start|>assistant\n<|region_token_start|>?"
    looking = relook.LookAgain(vlm.processor, picture(), look="none")
    vlm.model.generate(**prompt(vlm.processor, chat_of(picture(), question)), custom_generate=looking, max_new_tokens=4)
    expected = vlm.ask(picture(), question, look="none", max_new_tokens=4)
    assert looking.answers[0].text == expected.text
    assert looking.answers[0].usage.sequence_length == expected.usage.sequence_length


def test_a_batch_of_prompts_equals_its_rows_and_a_begun_call_goes_on(tiny_vlm):
    vlm = tiny_vlm(("region", "clip"), free_choice=True)
    images = [picture(i, (80 + 30 * i, 90)) for i in range(3)]
    questions = ["What?", QUESTION, "What is here, please, and there?"]
    chats = [chat_of(image, question) for image, question in zip(images, questions, strict=True)]
    starts = [CALLS["region"], write_call("clip"), "Well"]
    begun = [[*chat, {"role": "assistant", "content": start}] for chat, start in zip(chats, starts, strict=True)]
    begun[0][1]["content"] = [{"type": "text", "text": starts[0]}]  # whole calls: a piece of one is text
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    together = relook.LookAgain(vlm.processor, images)
    inputs = prompt(vlm.processor, *begun, add_generation_prompt=False, continue_final_message=True)
    ids = vlm.model.generate(**inputs, custom_generate=together, **options)
    kinds = [[look.kind for look in answer.looks] for answer in together.answers]
    assert kinds[0][0] == "region" and kinds[1][0] == "clip" and not kinds[2]
    for row, (chat, image, answer) in enumerate(zip(begun, images, together.answers, strict=True)):
        alone = relook.LookAgain(vlm.processor, image)
        one = prompt(vlm.processor, chat, add_generation_prompt=False, continue_final_message=True)
        single = vlm.model.generate(**one, custom_generate=alone, **options)
        assert alone.answers[0].transcript == answer.transcript and alone.answers[0].looks == answer.looks
        new = single[0, one["input_ids"].shape[1] :].tolist()
        assert ids[row, inputs["input_ids"].shape[1] :].tolist()[: len(new)] == new
    region = vlm.ask(images[0], questions[0], region=(1, 2, 3, 4), max_new_tokens=6)
    assert together.answers[0].looks[0] == region.looks[0]


def test_sampling_follows_torchs_seed_and_copies_are_drawn_apart(tiny_vlm):
    vlm = tiny_vlm(("region", "clip"), free_choice=True)
    inputs = prompt(vlm.processor, chat_of(picture()), chat_of(picture(1), "Where?"))
    looking = relook.LookAgain(vlm.processor, [picture(), picture(1)], look="none")

    def draw(seed):
        torch.manual_seed(seed)
        options = dict(max_new_tokens=5, do_sample=True, temperature=3.0, num_return_sequences=2)
        return vlm.model.generate(**inputs, custom_generate=looking, return_dict_in_generate=True, **options).sequences

    first = draw(1)
    assert first.shape[0] == 4 and torch.equal(first, draw(1)) and not torch.equal(first[0], first[1])
    assert not torch.equal(first, draw(2))


def test_what_may_not_be_sampled_is_left_out_before_the_best_are_kept(tiny_vlm):
    """top_k=1 where a banned token is the likeliest; a least length holds for every way to end."""
    vlm = tiny_vlm(("region", "clip"), free_choice=True)
    inputs = prompt(vlm.processor, chat_of(picture()))
    for banned in ("<|image_pad|>", "<|x_3|>", LOOKS["seg"].start):
        looking = relook.LookAgain(vlm.processor, picture(), look="none")
        with writing(vlm, banned * 4):
            vlm.model.generate(**inputs, max_new_tokens=4, do_sample=True, top_k=1, custom_generate=looking)
        assert looking.answers[0].usage.generated_tokens
    looking = relook.LookAgain(vlm.processor, picture(), look="none")
    with writing(vlm, "<|endoftext|>" * 5):
        ids = vlm.model.generate(**inputs, max_new_tokens=9, min_new_tokens=5, do_sample=False, custom_generate=looking)
    assert ids.shape[1] - inputs["input_ids"].shape[1] >= 5


def test_what_generate_cannot_do_over_looks_is_one_sentence(tiny_vlm):
    vlm = tiny_vlm(("region", "clip"))
    inputs = prompt(vlm.processor, chat_of(picture()))
    run = lambda images, **options: vlm.model.generate(  # noqa: E731
        **inputs, custom_generate=relook.LookAgain(vlm.processor, images), **{"max_new_tokens": 2, **options}
    )
    with pytest.raises(UserError, match=r"prompt has \d+ pads for its images, which make none"):
        run([])
    with pytest.raises(UserError, match="pads for its images, which make"):
        run([picture(0, (30, 90))])
    with pytest.raises(UserError, match="2 images, more than the prompts"):
        run([picture(), picture()])
    for options, said in (
        ({"look": "seg"}, "no 'seg' look"),
        ({"region": (0, 0, 8, 8)}, "8 x 8"),
        ({"look_at": 1}, "look_at=1 names no image"),
        ({"lok": "clip"}, "unknown option 'lok'"),
    ):
        with pytest.raises(UserError, match=said):
            looking = relook.LookAgain(vlm.processor, [picture()], **options)
            vlm.model.generate(**inputs, custom_generate=looking, max_new_tokens=2)
    for options in ({"look": "clip"}, {"region": (1, 1, 2, 2)}):
        looking = relook.LookAgain(vlm.processor, [picture()], **options)
        vlm.model.generate(**inputs, custom_generate=looking, max_new_tokens=2, do_sample=False)
        assert [look.kind for look in looking.answers[0].looks] == [options.get("look", "region")]
    tokenizer = vlm.processor.tokenizer
    for options in (
        {"streamer": TextStreamer(tokenizer)},
        {"past_key_values": DynamicCache()},
        {"stop_strings": ["a"], "tokenizer": tokenizer},
        {"output_scores": True, "return_dict_in_generate": True},
        {"prefill_chunk_size": 4},
        {"generation_config": GenerationConfig(output_logits=True, max_new_tokens=2)},
    ):
        name = next(iter(options)).replace("generation_config", "output_logits")
        with pytest.raises(UserError, match=f"{name} is not followed over looks"):
            run([picture()], **{"max_new_tokens": None, **options} if "generation_config" in options else options)
    with pytest.raises(UserError, match="MaxTimeCriteria is not followed"):
        run([picture()], max_time=1.0)


def test_the_pipeline_looks_and_shows_no_tokens(tiny_vlm, tmp_path):
    vlm = tiny_vlm(("region", "clip"), free_choice=True)
    picture().save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    pipe = pipeline("image-text-to-text", model=vlm.model, processor=vlm.processor, pipeline_class=relook.LookPipeline)
    options = dict(generate_kwargs={"do_sample": False, "max_new_tokens": 9})
    for look, call in CALLS.items():
        script = (call, "<|im_end|>" * (look == "region"), "the code")
        for chat in (chat_of(picture()), chat_of(None, path=path), chat_of(None, url=path)):
            with writing(vlm, *script):
                (out,) = pipe(text=chat, return_full_text=False, **options)
            assert out["generated_text"] == "the code"
            with writing(vlm, *script):
                (out,) = pipe(text=chat, **options)
            assert out["generated_text"][-1] == {"role": "assistant", "content": "the code"}
            assert out["generated_text"][:-1] == chat
        text = vlm.processor.apply_chat_template(chat_of(None), add_generation_prompt=True)
        with writing(vlm, *script):
            (out,) = pipe(images=path, text=text, return_full_text=False, **options)
        assert out["generated_text"] == "the code"
    plain = pipeline("image-text-to-text", model=vlm.model, processor=vlm.processor)
    with writing(vlm, CALLS["region"]):
        (out,) = plain(text=chat_of(picture()), return_full_text=False, **options)
    assert out["generated_text"] == ""  # not the prompt, which is found at the beginning
    call = vlm.processor.tokenizer(CALLS["region"], return_tensors="pt")["input_ids"]
    shown = [vlm.processor.post_process_image_text_to_text(call, skip_special_tokens=skip)[0] for skip in (True, False)]
    assert shown == ["", CALLS["region"]]


@pytest.mark.parametrize("name", shipped_models())
def test_shipped_processors_pad_left_and_batches_equal_their_rows(name):
    model, processor = load_model(name, dtype="float32", device="cpu"), load_processor(name)
    assert processor.tokenizer.padding_side == "left"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8))
    chats = [chat_of(image, text) for text in ("total?", "What is the total amount on this receipt, please, tell me?")]
    settings = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}
    options = dict(return_full_text=False, generate_kwargs=settings)
    for kind in (None, relook.LookPipeline):
        pipe = pipeline("image-text-to-text", model=model, processor=processor, pipeline_class=kind)
        one = [pipe(text=chat, **options)[0]["generated_text"] for chat in chats]
        two = [out[0]["generated_text"] for out in pipe(text=chats, batch_size=2, **options)]
        assert one == two and all("<|" not in text for text in one)
    inputs = prompt(processor, *chats)
    both = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for chat, row in zip(chats, both, strict=True):
        alone = model.generate(**prompt(processor, chat), max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert alone[0, -8:].tolist() == row[-8:].tolist()


def test_a_processor_pads_left_unless_its_folder_says_otherwise(tiny_vlm, tmp_path):
    processor = tiny_vlm(("region", "clip")).processor
    for said in (None, "right"):
        processor.save_pretrained(tmp_path)
        config = tmp_path / "tokenizer_config.json"
        lines = [line for line in config.read_text().splitlines() if "padding_side" not in line]
        config.write_text("\n".join([lines[0], *[f'"padding_side": "{said}",'] * bool(said), *lines[1:]]))
        again = VPTQwen2VLProcessor.from_pretrained(tmp_path)
        again.save_pretrained(tmp_path / "again")
        for loaded in (again, VPTQwen2VLProcessor.from_pretrained(tmp_path / "again")):
            assert loaded.tokenizer.padding_side == (said or "left")
