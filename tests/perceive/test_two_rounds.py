"""The published two-round evaluation generates the same greedy tokens as one pass of ours, on the parity models.

Published procedure (the evaluation script beside the published code): round 1 answers the question; the perception
tokens in its text determine round 2, a new conversation with the whole prompt (question and image, the call, the images
of the look). With no look, or looks of several kinds, round 1's text is the answer. At every step the language model
runs twice over the whole sequence: unconditioned for the control token's state, then conditioned on it.

Both rounds are implemented here without `relook.perceive`, and decoded both by transformers' `generate` and by two full
passes per token. Both sides are constrained alike to well-formed calls (`allowed`) and to no structural tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.parity import MODELS, fresh, set_mode
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import LogitsProcessor, PreTrainedTokenizerFast, StoppingCriteria
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from relook.model import VPTQwen2VLProcessor
from relook.perceive import VLM
from relook.views import View

LOOK_OF = {"clip": "clip", "clip-untied": "clip", "dino": "detection", "sam": "seg"}
REGION = "Identify the region that can help you answer the question, and then answer the question."
REENCODE = "Require additional perception features, and then answer the question."
CELLS = [f"<|{axis}_{i}|>" for axis in "xy" for i in range(8)]
QUESTIONS = ("What is written in the red box ?", "How many birds are there ?")
SIZES = ((130, 90), (64, 200))
ANSWER = 12  # tokens that the model may choose in a turn

# ---- a vocabulary for the parity models' ids


@cache
def words() -> dict[str, int]:
    """Token -> id. 0 to 379: a character each, so that text and ids say the same; the rest as parity/README.md has it.

    The parity models know no regions: their tokens take ids that mean nothing to a random model (380 on).
    """
    characters = ["\n", *map(chr, range(32, 127))]
    characters += [chr(0x4E00 + i) for i in range(380 - len(characters))]
    named = dict(enumerate(["<|region_token_start|>", "<|region_token_end|>", *CELLS], start=380))
    named |= {401: "<|vision_start|>", 402: "<|vision_end|>", 403: "<|image_pad|>", 404: "<|video_pad|>"}
    named |= {405: "<|im_start|>", 406: "<|im_end|>", 407: "<|endoftext|>"}
    for first, look in ((430, "detection"), (434, "clip"), (438, "seg")):
        parts = ("image_pad", "action_start", "action", "action_end")
        named |= {first + i: f"<|{look}_{part}|>" for i, part in enumerate(parts)}
    return {c: i for i, c in enumerate(characters)} | {named.get(i, f"<|unused_{i}|>"): i for i in range(380, 448)}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    ids = words()
    made = Tokenizer(models.BPE(vocab=ids, merges=[]))
    made.decoder = decoders.Fuse()
    special = [t for t in ids if t.endswith("pad|>") or t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]
    made.add_tokens([AddedToken(t, special=t in special, normalized=False) for t in ids if len(t) > 1])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    assert wrapped.get_vocab() == ids
    return wrapped


@cache
def vlm(name: str) -> VLM:
    """A parity model as the paper evaluated: conditioned, M-RoPE, crops a cell wider, images by the nearest neighbour
    (to 112 pixels, for time)."""
    model = set_mode(fresh(name)).eval()
    view, looks = View(112, "nearest"), ("region", LOOK_OF[name])
    processor = VPTQwen2VLProcessor(
        Qwen2VLImageProcessorPil(), tokenizer(), looks=looks, first_look=view, second_look=view
    )
    return VLM(model, processor, name)


# ---- the published evaluation, written again


@dataclass
class Rounds:
    """What one question led to: ids of the last conversation from the first token on, and every turn of the model."""

    ids: list[int] = field(default_factory=list)
    turns: list[list[int]] = field(default_factory=list)


def item(question: str, picture: str, *more: tuple[str, str], **images: list[str]) -> dict[str, Any]:
    """A conversation in the published form; `more` are the turns after the question."""
    turns = [("user", f"<image>\n{question}"), *more]
    lists = {key: images.get(key, []) for key in ("clip_images", "detection_images", "seg_images")}
    crops = images.get("crops", [])
    return {"messages": [{"role": r, "content": c} for r, c in turns], "images": [picture, *crops], **lists}


def crop_of(call: str, picture: str) -> str:
    """The crop that a call names, as a path suffix: cells from least to most, one wider, in whole pixels."""
    xs, ys = ([int(n) for n in re.findall(rf"<\|{axis}_(\d)\|>", call)] for axis in "xy")
    width, height = Image.open(picture).size
    left, top = max(min(xs) - 1, 0) * width / 8, max(min(ys) - 1, 0) * height / 8
    right, bottom = (min(max(xs) + 1, 7) + 1) * width / 8, (min(max(ys) + 1, 7) + 1) * height / 8
    return f"{picture}_{int(left)},{int(top)},{int(right)},{int(bottom)}"


def second_round(question: str, picture: str, said: str) -> dict[str, Any] | None:
    """Round 2's conversation up to the answer; None where round 1's text is the answer."""
    regions = re.findall(r"<\|region_token_start\|>(?:<\|[xy]_[0-7]\|>)+<\|region_token_end\|>", said)
    asked = [look for look in ("detection", "clip", "seg") if f"<|{look}_action_start|>" in said]
    if len(asked) + bool(regions) != 1:
        return None
    if asked:
        call = "".join(f"<|{asked[0]}_action{part}|>" for part in ("_start", "", "_end"))
        turns = ("assistant", call), ("user", f"<{asked[0]}_image>")
        return item(question, picture, *turns, **{f"{asked[0]}_images": [picture]})
    shown = "<image>" if len(regions) == 1 else "".join(f"Region {i}: <image>\n" for i in range(len(regions)))
    crops = [crop_of(call, picture) for call in regions]
    return item(question, picture, ("assistant", said), ("user", shown), crops=crops)


def two_rounds(asked: VLM, decode: Any, question: str, picture: str, start: str = "") -> Rounds:
    """The whole evaluation of one question; `start` is the token that opens a look that is asked for."""
    done = Rounds()
    conversation: dict[str, Any] | None = item(question, picture)
    for number in (1, 2):
        if conversation is None:
            break
        inputs = asked.processor.encode_item(conversation, labels=False)
        prompt = inputs.pop("prompt_ids")
        inputs.pop("input_ids")
        forced = tokenizer().encode(start) if number == 1 else []
        turn = decode(asked.model, prompt, forced, inputs, number == 1)
        done.turns.append(turn)
        done.ids = prompt + turn
        conversation = second_round(question, picture, tokenizer().decode(turn[:-1])) if number == 1 else None
    return done


def allowed(turn: list[int], look: str, may_look: bool) -> list[int]:
    """Ids that may follow an assistant's turn so far: text and its end, whole calls in round 1, nothing else."""
    ids = words()
    region, reencode = (
        [ids[f"<|{name}_{part}|>"] for part in ("start", "end")] for name in ("region_token", f"{look}_action")
    )
    starts, ends = {region[0], reencode[0]}, {region[1], reencode[1]}
    at = max((n for n, i in enumerate(turn) if i in starts), default=None)
    if may_look and at is not None and not ends & {*turn[at:]}:  # inside a call
        written = len(turn) - 1 - at
        if turn[at] == reencode[0]:
            return [[ids[f"<|{look}_action|>"]], [reencode[1]]][written]
        columns, rows = [ids[c] for c in CELLS[:8]], [ids[c] for c in CELLS[8:]]
        return [columns, rows, columns, rows, [region[1]]][written]
    if may_look and turn and turn[-1] in ends:  # another call, or the end; an image is encoded again only once
        return [406, region[0]] if turn[-1] == region[1] else [406]
    return prose() + (sorted(starts) if may_look else [])


@cache
def prose() -> list[int]:
    """Ids of everything that is neither structure nor part of a call."""
    never = r"<\|(im_start|vision|image|video|region|[xy]_|clip|detection|seg)"
    return [i for token, i in words().items() if not re.match(never, token)]


def over(turn: list[int], forced: int, look: str, may_look: bool) -> bool:
    """Whether a turn is at its end, or at the limit and not inside a call."""
    return turn[-1] in (406, 407) or (len(turn) - forced >= ANSWER and 406 in allowed(turn, look, may_look))


def closed(turn: list[int]) -> list[int]:
    """The turn with the template's end, which is the same whether the model wrote it or the limit came first."""
    return [i for i in turn if i not in (406, 407)] + [406]


@dataclass
class Allowed(LogitsProcessor):
    """`allowed`, for transformers' `generate`."""

    prompt: int  # tokens before the turn
    rules: tuple[str, bool]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ids = allowed(input_ids[0, self.prompt :].tolist(), *self.rules)
        return torch.full_like(scores, -torch.inf).index_copy(1, torch.tensor(ids), scores[:, ids])


@dataclass
class Over(StoppingCriteria):
    """`over`, for transformers' `generate`."""

    prompt: int
    forced: int
    rules: tuple[str, bool]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.tensor([over(input_ids[0, self.prompt :].tolist(), self.forced, *self.rules)])


def by_generate(model: Any, prompt: list[int], forced: list[int], images: dict[str, Any], may_look: bool) -> list[int]:
    """One turn by transformers' `generate`, the conversation encoded afresh."""
    ids, rules = torch.tensor([prompt + forced]), (model.config.reencodings[0], may_look)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **images,
        do_sample=False,
        max_new_tokens=100,
        eos_token_id=[406, 407],
        logits_processor=[Allowed(len(prompt), rules)],
        stopping_criteria=[Over(len(prompt), len(forced), rules)],
    )
    return closed(out[0, len(prompt) :].tolist())


@torch.no_grad()
def by_two_passes(
    model: Any, prompt: list[int], forced: list[int], images: dict[str, Any], may_look: bool
) -> list[int]:
    """One turn by two full passes over everything for every token (spec.md section 6, equations of section 5)."""
    look, turn = model.config.reencodings[0], list(forced)
    grids = images["image_grid_thw"]
    features = {"image": torch.cat(model.encode("image", pixel_values=images["pixel_values"], image_grid_thw=grids))}
    names = {"clip_pixel_values": "pixel_values", "clip_images_grid_thw": "image_grid_thw"}
    again = {names.get(name, name): tensor for name, tensor in images.items() if name.split("_")[0] == look}
    if again:
        (features[look],) = model.encode(look, **again)
    while not turn or not over(turn, len(forced), look, may_look):
        ids = torch.tensor([prompt + turn])
        logits = model.lm_head(second_pass(model, look, ids, features, grids)[0, -1])
        legal = allowed(turn, look, may_look)
        turn.append(legal[int(logits[legal].argmax())])
    return closed(turn)


def second_pass(
    model: Any, look: str, ids: torch.Tensor, features: dict[str, torch.Tensor], grids: torch.Tensor
) -> Any:
    """Hidden states (1, L, d) of pass 2; pass 1, with unconditioned features, says the state h at `*_action_start`."""
    token = model.config.reencode_ids(look)
    embeds = model.get_input_embeddings()(ids)
    embeds[0, ids[0] == 403] = features["image"]
    pads = ids[0] == token.pad
    projector = model.projectors[look]
    if pads.any():
        plain = projector.project_features(features[look])
        embeds[0, pads] = plain
    where = model.model.get_rope_index(ids, (ids == 403).int(), image_grid_thw=grids)[0]
    run = lambda x: model.model.language_model(inputs_embeds=x, position_ids=where).last_hidden_state  # noqa: E731
    first = run(embeds)
    starts = ((ids[0, :-1] == token.start) & (ids[0, 1:] == token.action)).nonzero().flatten().tolist()
    assert len(starts) <= 1
    for start in starts:
        h = first[0, start]
        embeds[0, start + 1] = h
        if pads.any():
            c = projector.linear_condition(projector.layernorm_condition(h))
            embeds[0, pads] = plain + (plain @ c)[:, None] * c
    return run(embeds)


# ---- the tests


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    folder, found = tmp_path_factory.mktemp("pictures"), []
    for seed, size in enumerate(SIZES):
        coarse = np.random.default_rng(seed).integers(0, 255, (9, 13, 3), dtype=np.uint8)
        found.append(str(folder / f"{seed}.png"))
        Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST).save(found[-1])
    return found


def one_pass(asked: VLM, question: str, picture: str, **options: Any) -> tuple[list[int], list[list[int]], Any]:
    """Ids of the whole conversation, the assistant's turns in ids, and the answer, by `VLM`."""
    chat = asked.chat(picture)
    answer = chat.ask(question, max_new_tokens=ANSWER, **options)
    turns = [tokenizer().encode(t.text + "<|im_end|>") for t in answer.transcript if t.role == "assistant"]
    return list(chat._conversation.ids), turns, answer


@contextmanager
def leaning(asked: VLM, picture: str, **wishes: float) -> Iterator[None]:
    """The model as if it had learnt something: its logits changed in a way that is the same for everybody who asks it.

    A random model says one token for ever. Its mean logits over a prompt are taken off, so that what is left depends on
    the place, and it never says what it has just heard; `wishes` (token -> by how much) make it call, or not call.
    """
    inputs = asked.processor.encode_item(item(QUESTIONS[0], picture), labels=False)
    ids = torch.tensor([inputs.pop("input_ids")])
    inputs.pop("prompt_ids")
    with torch.no_grad():
        bias = -asked.model(input_ids=ids, **inputs).logits[0].mean(0)
    for token, much in wishes.items():
        bias[words()[token]] += much
    heard: list[int] = []

    def hear(module: Any, inputs: Any) -> None:
        heard[:] = [int(inputs[0][0, -1])]

    def say(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits + bias.index_fill(0, torch.tensor(heard), -1e4)

    embedding = asked.model.get_input_embeddings()
    handles = [embedding.register_forward_pre_hook(hear), asked.model.lm_head.register_forward_hook(say)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# how much each would like to call for a region: after a few words, clip-untied at once
WISH = {"clip": 1.0, "clip-untied": 1.5, "dino": 1.2, "sam": 1.0}
START = {look: f"<|{look}_action_start|>" for look in LOOK_OF.values()} | {"region": "<|region_token_start|>"}


def asked_about(name: str, pictures: list[str], wishes: dict[str, float], *how: str, **options: Any) -> list[Any]:
    """Our answers about every picture, each the two rounds' token for token however these decode; and not all alike.

    `how`: the sentence that asks for a look, and the token that opens it where that is given.
    """
    asked, answers = vlm(name), []
    for picture, question in zip(pictures, QUESTIONS, strict=True):
        with leaning(asked, pictures[0], **wishes):
            ids, turns, answer = one_pass(asked, question, picture, **options)
            for decode in (by_generate, by_two_passes):
                published = two_rounds(asked, decode, f"{question} {how[0]}", picture, *how[1:])
                assert turns == published.turns
                assert ids == published.ids
        answers.append(answer)
    assert len({answer.text for answer in answers}) > 1
    return answers


def kinds(answers: list[Any]) -> set[tuple[str, ...]]:
    return {tuple(look.kind for look in answer.looks) for answer in answers}


NEVER = -1e3


@pytest.mark.parametrize("name", MODELS)
def test_a_region_that_is_asked_for(name, pictures):
    """The call's first token is given, as `look="region"` does; the cells and the answer are the model's."""
    wishes = {START["region"]: NEVER, START[LOOK_OF[name]]: NEVER}
    answers = asked_about(name, pictures, wishes, REGION, START["region"], look="region")
    assert kinds(answers) == {("region",)}


@pytest.mark.parametrize("name", MODELS)
def test_several_regions_in_one_turn(name, pictures):
    wishes = {"<|im_end|>": NEVER, START[LOOK_OF[name]]: NEVER}
    answers = asked_about(name, pictures, wishes, REGION, START["region"], look="region")
    assert kinds(answers) == {("region",) * 3}


@pytest.mark.parametrize("name", MODELS)
def test_an_image_encoded_again(name, pictures):
    look = LOOK_OF[name]
    answers = asked_about(name, pictures, {}, REENCODE, START[look], look=look)
    assert kinds(answers) == {(look,)}


@pytest.mark.parametrize("name", MODELS)
def test_a_region_that_the_model_calls_for_by_itself(name, pictures):
    """Among other words, which stay in the conversation of round 2 as in ours."""
    wishes = {START["region"]: WISH[name], START[LOOK_OF[name]]: NEVER}
    answers = asked_about(name, pictures, wishes, REGION)
    assert ("region",) in {kind[:1] for kind in kinds(answers)}
    turns = [turn.text for answer in answers for turn in answer.transcript if turn.role == "assistant"]
    later = any(START["region"] in text and not text.startswith(START["region"]) for text in turns)
    assert later or name == "clip-untied"


@pytest.mark.parametrize("name", MODELS)
def test_a_text_without_a_call_is_the_answer(name, pictures):
    wishes = {START["region"]: NEVER, START[LOOK_OF[name]]: NEVER}
    answers = asked_about(name, pictures, wishes, REGION)
    assert kinds(answers) == {()}
