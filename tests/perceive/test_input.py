"""Input validation of `VLM`, models with a single look, and loaded models."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image
from support.scripted_model import QUESTION, picture
from transformers import GenerationConfig

from relook.errors import UserError
from relook.perceive import VLM


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"question": "  "}, "question is empty"),
        ({"question": None}, "expected text"),
        ({"question": "a\ud800b"}, "half a character"),
        ({"look": "zoom"}, "expected one of auto, none, region, clip"),
        ({"look": "seg"}, "this model has no 'seg' look; expected one of auto, none, region, clip"),
        ({"region": (3, 3, 2, 4)}, "grid"),
        ({"region": (0, 0, 8, 8)}, "grid"),
        ({"region": (0, 0, 1)}, "four"),
        ({"region": 7}, "four"),
        ({"region": "2,5,6"}, "four"),
        ({"region": (0, 0, 1, float("nan"))}, "four"),
        ({"region": ("a", 0, 1, 1)}, "four"),
        ({"region": (0, 0, 1.5, 1)}, "four"),
        ({"region": (0, 0, 1, 1), "look": "clip"}, "leave look out"),
        ({"region": (0, 0, 1, 1), "max_looks": 0}, "max_looks=0"),
        ({"box": (0, 0, 30)}, "four numbers x1,y1,x2,y2"),
        ({"box": 7}, "four numbers"),
        ({"box": "10,20,a,40"}, "four numbers"),
        ({"box": (0, 0, 30, float("inf"))}, "four numbers"),
        ({"box": (0.1, 0.2, 0.5, 0.6)}, "looks like fractions of the image's sides"),
        ({"box": (0.0, 0.0, 1.0, 1.0)}, "looks like fractions of the image's sides"),
        ({"box": (100, 60, 30, 30)}, "runs backwards; if it is x, y, width, height, add them"),
        (
            {"box": (100, 60, 131, 80)},
            "leaves the image; expected x1,y1,x2,y2 in pixels of the upright image of 130 x 90",
        ),
        ({"box": (-1, 60, 130, 80)}, "leaves the image"),
        ({"box": (0, 0, 30, 30), "look": "clip"}, "box=(0.0, 0.0, 30.0, 30.0) was given with look='clip'"),
        ({"box": (0, 0, 30, 30), "region": (0, 0, 1, 1)}, "two ways to say one thing"),
        ({"box": (0, 0, 30, 30), "max_looks": 0}, "max_looks=0"),
        ({"max_looks": -1}, "max_looks"),
        ({"max_looks": "1"}, "max_looks: expected a number, not text and not too large (seen: '1')"),
        ({"max_looks": True}, "max_looks: expected a number, not text and not too large (seen: True)"),
        ({"max_looks": 1.5}, "max_looks: expected a whole number"),
        ({"max_pixels": 9}, "ask: unknown option 'max_pixels'"),
        ({"max_tokens": 9}, "unknown option 'max_tokens'; did you mean 'max_new_tokens'"),
        ({"do_sample": "no"}, "do_sample: expected True or False (seen: 'no')"),
        ({"seed": 3}, "seed=3 has no effect on greedy decoding"),
        ({"seed": -1, "do_sample": True}, "seed"),
        ({"temperature": float("nan"), "do_sample": True}, "temperature: expected a number"),
        ({"temperature": 0, "do_sample": True}, "temperature"),
        ({"temperature": 1e-300, "do_sample": True}, "temperature"),
        ({"max_new_tokens": 10**400}, "max_new_tokens: expected a number"),
        ({"max_new_tokens": np.array([1, 2])}, "max_new_tokens: expected a number"),
        ({"region": (1, 2, 10**400, 4)}, "four"),
        ({"region": {1, 2, 3, 4}}, "four"),
        ({"region": b"abcd"}, "four"),
        ({"look_at": "first"}, "look_at"),
        ({"look": None}, "look: Input should be a valid string"),
        ({"image": "http://localhost/a.png"}, "addresses are not fetched"),
        ({"image": "data:image/png;base64,?"}, "data URL"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"look_at": 3}, "look_at=3"),
        ({"condition": 0}, "condition: expected True or False (seen: 0)"),
        ({"condition": False, "look": "region"}, "look='region' and max_looks=1 leaves nothing out; it is for: clip"),
        ({"condition": False, "region": (0, 0, 1, 1)}, "condition=False with look='region'"),
        ({"condition": False, "look": "none", "max_looks": 2}, "condition=False with look='none'"),
        ({"condition": False, "max_looks": 0}, "look='auto' and max_looks=0 leaves nothing out"),
        ({"blank": True, "look": "clip"}, "blank=True with look='clip' and max_looks=1 leaves nothing out; .* region"),
        ({"blank": "yes"}, "blank: expected True or False (seen: 'yes')"),
        ({"temperature": 0.5}, "do_sample"),
        ({"do_sample": True, "top_p": 1.5}, "top_p"),
        ({"image": None}, "no image"),
        ({"image": "no/such/file.png"}, "no such file"),
        ({"image": b"not an image"}, "not an image"),
        ({"image": []}, "no image"),
    ],
    ids=str,
)
def test_invalid_input_raises_before_generation(tiny_vlm, options, said):
    vlm = tiny_vlm(("region", "clip"))
    arguments = {"image": picture(), "question": "What?", **options}
    with pytest.raises(UserError, match=said if ".*" in said else re.escape(said)) as caught:
        vlm.ask(arguments.pop("image"), arguments.pop("question"), **arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="question 1"):
        vlm.ask_many([(picture(), "What?"), {"image": picture(), "question": "What?", **options}])


def test_options_are_the_same_in_numpys_numbers_and_as_text(tiny_vlm):
    vlm = tiny_vlm(("region", "clip"))
    plain = vlm.ask(picture(), "What?", region=(1, 2, 3, 4), max_new_tokens=3, do_sample=True, top_k=2, seed=5)
    region = np.array([1, 2, 3, 4])
    tokens, two, seed = np.int64(3), np.int32(2), np.uint8(5)
    same = vlm.ask(picture(), "What?", region=region, max_new_tokens=tokens, do_sample=True, top_k=two, seed=seed)
    text = vlm.ask(picture(), "What?", region="1,2,3,4", max_new_tokens=3, do_sample=True, top_k=2, seed=5)
    assert plain.transcript == same.transcript == text.transcript and same.looks[0].cells == (1, 2, 3, 4)
    assert vlm.ask(picture(), "What?", constrain=np.True_, look="none", max_new_tokens=1).looks == []
    for pairs in (5, [(picture(), "q", 5)], [(picture(), "q", None)], ["ab"]):
        with pytest.raises(UserError, match=r"expected (pairs|\(image, question\))"):
            vlm.ask_many(pairs)
    with pytest.raises(UserError, match=r"^look 'REGION' is unknown"):
        vlm.ask(picture(), "What?", look="REGION")
    assert len(vlm.ask_many([(picture(), "What?")] * 3, batch_size=np.int64(2), max_new_tokens=1)) == 3


def test_where_a_question_looks_replaces_where_all_look(tiny_vlm):
    vlm, image = tiny_vlm(), picture()
    mine = [{"region": (3, 3, 3, 3)}, {"box": (33, 23, 65, 45)}, {"look": "none"}, {"max_new_tokens": 1}]
    pairs = [(image, "What?", one) for one in mine]
    for shared, last in (({"box": (1, 1, 5, 5)}, (0, 0, 0, 0)), ({"region": (7, 7, 7, 7)}, (7, 7, 7, 7))):
        answers = vlm.ask_many(pairs, **shared, max_new_tokens=2)
        seen = [answer.looks[0].cells if answer.looks else None for answer in answers]
        assert seen == [(3, 3, 3, 3), vlm.ask(image, "What?", box=(33, 23, 65, 45)).looks[0].cells, None, last]
    (answer,) = vlm.ask_many(pairs[:1], look="none", max_new_tokens=2)
    assert answer.looks[0].cells == (3, 3, 3, 3)


def test_a_box_in_pixels_is_looked_at_as_the_cells_that_cover_it(tiny_vlm):
    """Of 8 x 8 cells on 130 x 90 pixels: of 16.25 x 11.25."""
    vlm = tiny_vlm(("region", "clip"))
    for box, cells in (
        ((33, 23, 65, 45), (2, 2, 3, 3)),
        ((33, 23, 65.1, 45), (2, 2, 4, 3)),
        ("33,23,65,45", (2, 2, 3, 3)),
        (np.array([0, 0, 130, 90]), (0, 0, 7, 7)),
        ((-0.4, 0, 130.4, 90), (0, 0, 7, 7)),
    ):
        ours = vlm.ask(picture(), "What?", box=box, max_new_tokens=2)
        theirs = vlm.ask(picture(), "What?", region=cells, max_new_tokens=2)
        assert ours.looks[0].cells == cells and ours.looks == theirs.looks and ours.transcript == theirs.transcript
    turned = picture().transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # shown turned back: boxes are of what people see
    assert vlm.ask(turned, "What?", box=(33, 23, 65, 45), max_new_tokens=1).looks[0].cells == (2, 2, 3, 3)
    wide = [picture(), picture(1, (520, 90))]
    for at, cells in ((0, (2, 2, 3, 3)), (1, (0, 2, 0, 3))):
        assert vlm.ask(wide, "What?", box=(33, 23, 65, 45), look_at=at, max_new_tokens=1).looks[0].cells == cells
    chat = vlm.chat(wide[1])
    chat.ask("What?", look="none", max_new_tokens=1)
    assert chat.ask("And?", box=(500, 23, 520, 45), max_new_tokens=1).looks[0].cells == (7, 2, 7, 3)


def test_what_was_given_is_what_is_looked_at(tiny_vlm):
    """Also when the caller edits the image, or an answer's, afterwards, or gives one buffer again and again."""
    vlm = tiny_vlm(("region", "clip"))
    for given, edit in (
        (picture(1), lambda image: image.paste((0, 0, 0), (0, 0, *image.size))),
        (np.array(picture(1)), lambda image: image.fill(0)),
        (np.array(picture(1).convert("L")), lambda image: image.fill(0)),
    ):
        chat, untouched = vlm.chat(given), vlm.chat(given.copy())
        first = chat.ask(QUESTION, look="clip", max_new_tokens=3)
        untouched.ask(QUESTION, look="clip", max_new_tokens=3)
        for seen in (given, first.image, first.looks[0].image):
            (edit if seen is given else lambda image: image.paste((0, 0, 0), (0, 0, *image.size)))(seen)
        ours, theirs = (each.ask(QUESTION, region=(2, 2, 4, 4), max_new_tokens=3) for each in (chat, untouched))
        assert ours.looks[0].image.tobytes() == theirs.looks[0].image.tobytes() and ours.text == theirs.text

    def frames():
        buffer = picture(0).copy()
        for number in range(3):
            buffer.paste(picture(number))
            yield buffer, QUESTION

    options = {"region": (2, 2, 4, 4), "max_new_tokens": 3}
    many = vlm.ask_many(frames(), **options)
    for number, answer in enumerate(many):
        alone = vlm.ask(picture(number), QUESTION, **options)
        assert answer.looks[0].image.tobytes() == alone.looks[0].image.tobytes() and answer.text == alone.text
        assert answer.image.tobytes() == picture(number).tobytes()


def test_the_folders_generation_config_is_followed(tiny_vlm):
    """Ids that end a turn, penalties, sampling numbers: as transformers' generate does it. Others are refused."""
    vlm = tiny_vlm(("region", "clip"))
    processor = vlm.processor
    chat = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": QUESTION}]}]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    banned = vlm.vocabulary.banned([], may_look=False, constrain=True).nonzero().flatten().tolist()
    usual = vlm.model.generation_config

    def ask(**settings):
        vlm.model.generation_config = GenerationConfig(eos_token_id=usual.eos_token_id, **settings)
        try:
            asked = VLM(vlm.model, processor)
            ours = asked.chat(picture())
            ours.ask(QUESTION, look="none", max_new_tokens=8)
            theirs = vlm.model.generate(**inputs, max_new_tokens=8, do_sample=False, suppress_tokens=banned)
        finally:
            vlm.model.generation_config = usual
        return ours._conversation.ids[inputs["input_ids"].shape[1] :], theirs[
            0, inputs["input_ids"].shape[1] :
        ].tolist()

    plain, _ = ask()
    for settings in ({"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}):
        ours, theirs = ask(**settings)
        assert ours[: len(theirs)] == theirs != plain[: len(theirs)]
    vlm.model.generation_config = GenerationConfig(eos_token_id=[usual.eos_token_id, plain[2]], top_k=1)
    try:
        ended = VLM(vlm.model, processor)
        short = ended.chat(picture())
        short.ask(QUESTION, look="none", max_new_tokens=8)
        assert short._conversation.ids[inputs["input_ids"].shape[1] :][:3] == [*plain[:2], ended.vocabulary.im_end]
        assert ended.ask(picture(), QUESTION, look="none", max_new_tokens=2, do_sample=True).text == (
            ended.ask(picture(), QUESTION, look="none", max_new_tokens=2).text
        ), "top_k=1 of the folder"
        vlm.model.generation_config = GenerationConfig(
            **{"num_beams": 1, "typical_p": 1.0, "length_penalty": 1.0, "renormalize_logits": True, "top_k": 0}
        )  # nothing of this changes a greedy choice, and a top_k of 0 is none
        assert VLM(vlm.model, processor).ask(picture(), QUESTION, look="none", do_sample=True, max_new_tokens=2)
        vlm.model.generation_config = GenerationConfig(num_beams=4)
        with pytest.raises(UserError, match=r"generation_config.json sets num_beams=4, which `ask` does not follow"):
            VLM(vlm.model, processor)
    finally:
        vlm.model.generation_config = usual


def test_a_tokenizer_without_look_tokens_raises(tiny_vlm):
    from transformers import Qwen2Tokenizer

    vlm = tiny_vlm()
    bare = type("Processor", (), {"tokenizer": Qwen2Tokenizer(vocab={"a": 0}, merges=[]), "grid_size": 8})()
    with pytest.raises(UserError, match="the tokenizer has no token"):
        VLM(vlm.model, bare)


def test_load_gives_the_same_answers(tiny_vlm, tmp_path):
    import relook

    vlm = tiny_vlm(("region", "clip"))
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    loaded = relook.load(tmp_path, dtype="float32", device="cpu")
    assert loaded.looks == ["region", "clip"] and loaded.domain is None and loaded.name == str(tmp_path)
    with pytest.raises(UserError, match="'meta' holds shapes and no weights"):
        relook.load(tmp_path, device="meta")
    for options in ({"look": "clip"}, {"region": (0, 0, 2, 2)}):
        ours, theirs = (v.ask(picture(), QUESTION, max_new_tokens=4, **options) for v in (vlm, loaded))
        assert ours.transcript == theirs.transcript and ours.looks == theirs.looks
        assert theirs.model == str(tmp_path) and theirs.to_dict()["usage"]["lm_positions"] == ours.usage.lm_positions


def test_a_model_with_a_domain_adds_a_warning_to_every_answer(tiny_vlm):
    vlm = tiny_vlm(("region",), seed=3)
    assert vlm.ask(picture(), "What?", look="none", max_new_tokens=1).warnings == []
    vlm.model.config.domain = "receipts"
    try:
        many = vlm.ask_many([(picture(), "What?"), (picture(1), "Who?", {"look": "none"})], max_new_tokens=1)
        chat = vlm.chat(picture())
        followed = [chat.ask(question, max_new_tokens=1) for question in ("What?", "And then?")]
        unnamed = VLM(vlm.model, vlm.processor).ask(picture(), "What?", max_new_tokens=1)
    finally:
        vlm.model.config.domain = None
    said = "was trained on receipts only; on anything else its answers mean nothing."
    assert [answer.warnings for answer in (*many, *followed)] == [[f"tiny {said}"]] * 4
    assert unnamed.to_dict()["warnings"] == [f"this model {said}"]
