"""Looks, reading and writing of calls, and the grammar that constrains them.

Compared with the published tokenizers and conversations (tests/fixtures/parity/data/data_pipeline.json). Random token
sequences from hypothesis never raise: every call is either well formed or reports what is wrong.
"""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import TESTS

from relook.errors import UserError
from relook.looks import (
    IM_END,
    LOOKS,
    Call,
    allowed_next,
    control_tokens,
    look_turn,
    parse_calls,
    parse_tokens,
    strip_calls,
    write_call,
    x_token,
    y_token,
)

PUBLISHED = json.loads((TESTS / "fixtures/parity/data/data_pipeline.json").read_text())
S, E = "<|region_token_start|>", "<|region_token_end|>"
CLIP = "<|clip_action_start|><|clip_action|><|clip_action_end|>"


def region(*coordinates: str) -> str:
    return S + "".join(f"<|{c}|>" for c in coordinates) + E


# -- against what was published --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "detection", "seg"])
def test_control_tokens_have_the_order_of_the_published_tokenizers(kind: str) -> None:
    ids = PUBLISHED["meta"]["tokens"][kind]
    published = [token for token, i in sorted(ids.items(), key=lambda pair: pair[1]) if i > ids["<|video_pad|>"]]
    pads, ordinary = control_tokens(["region", kind])
    assert pads + ordinary == published
    assert control_tokens([kind, "region"]) == (pads, ordinary)


def test_control_tokens_of_several_looks_put_pads_first_and_share_the_region_tokens() -> None:
    pads, ordinary = control_tokens(["seg", "clip", "region", "detection"])
    assert pads == ["<|clip_image_pad|>", "<|detection_image_pad|>", "<|seg_image_pad|>"]
    assert ordinary[:2] == [S, E] and ordinary[18:21] == list(_tokens(CLIP))
    assert len(set(ordinary)) == len(ordinary) == 2 + 16 + 9


def test_control_tokens_follow_the_grid_size() -> None:
    _, ordinary = control_tokens(["region"], grid=3)
    assert ordinary == [S, E, "<|x_0|>", "<|x_1|>", "<|x_2|>", "<|y_0|>", "<|y_1|>", "<|y_2|>"]


@pytest.mark.parametrize("sample", PUBLISHED["samples"], ids=lambda sample: sample["name"])
def test_published_conversations_are_read_and_written_back(sample: dict) -> None:
    """Each assistant turn's calls bring exactly the next published user turn, and are written back token for token."""
    messages = sample["sample"]["messages"]
    for turn, answer in zip(messages[1:], [*messages[2:], None], strict=True):
        if turn["role"] != "assistant":
            continue
        calls = parse_calls(turn["content"])
        assert all(call.problem is None for call in calls)
        if answer is not None:
            assert look_turn(calls) == answer["content"]
            assert "".join(write_call(call.look, call.cells) for call in calls) == turn["content"]
        else:
            assert calls == [] and strip_calls(turn["content"]) == turn["content"]


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        (region("x_1", "y_2", "x_3", "y_4"), (1, 2, 3, 4)),
        (region("x_3", "y_4", "x_1", "y_2"), (1, 2, 3, 4)),
        (region("y_4", "y_2", "x_3", "x_1"), (1, 2, 3, 4)),
        (region("x_0", "x_7", "y_7", "y_0"), (0, 0, 7, 7)),
        (region("x_5", "y_6"), (5, 6, 5, 6)),
        (region("x_5", "y_6", "x_2", "y_1", "x_4", "y_7"), (2, 1, 5, 7)),
        (f"{S} <|x_1|>\n<|y_2|> <|x_3|> <|y_4|> {E}", (1, 2, 3, 4)),
    ],
)
def test_a_region_is_min_and_max_over_its_columns_and_its_rows(text: str, cells: tuple) -> None:
    assert parse_calls(text) == [Call("region", cells, None, (0, len(text)))]


def test_several_calls_of_several_kinds_keep_their_order_and_places() -> None:
    one, two = region("x_0", "y_0", "x_1", "y_1"), region("x_7", "y_7")
    text = f"Let me see. {one}{two} and {CLIP}."
    calls = parse_calls(text)
    assert [(call.look, call.cells, call.problem) for call in calls] == [
        ("region", (0, 0, 1, 1), None),
        ("region", (7, 7, 7, 7), None),
        ("clip", None, None),
    ]
    assert [text[slice(*call.span)] for call in calls] == [one, two, CLIP]
    assert strip_calls(text) == "Let me see.  and ."


# text, then for each call read from it: look, words its problem must hold, the text of its span (None: all of it)
MALFORMED = {
    "start alone": (S, [("region", "cut off", None)]),
    "missing end": (S + "<|x_1|><|y_2|><|x_3|><|y_4|>", [("region", "cut off", None)]),
    "half a token": (S + "<|x_1|><|y_", [("region", "cut off", S + "<|x_1|>")]),
    "turn ends": (S + "<|x_1|>" + IM_END, [("region", "cut off", S + "<|x_1|>")]),
    "over two turns": (
        S + "<|x_1|>" + IM_END + "<|y_1|>" + E,
        [("region", "cut off", S + "<|x_1|>"), ("region", "start token is missing", "<|y_1|>" + E)],
    ),
    "end alone": (E, [("region", "start token is missing", None)]),
    "no start": ("<|x_1|><|y_2|>" + E, [("region", "start token is missing", None)]),
    "loose coordinates": ("<|x_1|><|y_2|>", [("region", "start token is missing", None)]),
    "loose action": ("<|seg_action|>", [("seg", "start token is missing", None)]),
    "empty": (S + E, [("region", "no cells", None)]),
    "only columns": (region("x_1", "x_3"), [("region", "no row", None)]),
    "only rows": (region("y_1", "y_3"), [("region", "no column", None)]),
    "off the grid": (region("x_8", "y_1", "x_1", "y_8"), [("region", "<|x_8|> is not on the grid", None)]),
    "only off the grid": (region("x_8", "y_8"), [("region", "<|y_8|> is not on the grid", None)]),
    "no number": (region("x_one", "y_1"), [("region", "<|x_one|>", None)]),
    "negative": (region("x_-1", "y_1", "x_2"), [("region", "<|x_-1|>", None)]),
    "leading zero": (region("x_01", "y_1", "x_2"), [("region", "<|x_01|>", None)]),
    "huge": (region("x_" + "9" * 5000, "y_1", "x_1"), [("region", "not on the grid", None)]),
    "text inside": (S + "<|x_1|>left<|y_1|>" + E, [("region", "'left' does not belong", None)]),
    "pad inside": (S + "<|x_1|><|image_pad|><|y_1|>" + E, [("region", "<|image_pad|>", None)]),
    "action inside": (S + "<|x_1|><|y_1|><|clip_action|>" + E, [("region", "<|clip_action|>", None)]),
    "nested": (
        S + "<|x_1|>" + region("x_2", "y_2"),
        [("region", "cut off", S + "<|x_1|>"), ("region", None, region("x_2", "y_2"))],
    ),
    "nested kinds": (S + "<|x_1|>" + CLIP, [("region", "cut off", S + "<|x_1|>"), ("clip", None, CLIP)]),
    "other end": (S + "<|x_1|><|y_1|><|seg_action_end|>", [("region", "ends in <|seg_action_end|>", None)]),
    "no action": (
        "<|clip_action_start|><|clip_action_end|>",
        [("clip", "<|clip_action|> is missing", None)],
    ),
    "other action": (
        "<|clip_action_start|><|seg_action|><|clip_action_end|>",
        [("clip", "holds <|seg_action|>", None)],
    ),
    "other action end": (
        "<|clip_action_start|><|clip_action|><|seg_action_end|>",
        [("clip", "ends in <|seg_action_end|>", None)],
    ),
    "two actions": (
        "<|clip_action_start|><|clip_action|><|clip_action|><|clip_action_end|>",
        [("clip", "2 times", None)],
    ),
    "cells in an action": (
        "<|clip_action_start|><|clip_action|><|x_1|><|clip_action_end|>",
        [("clip", "takes no cells", None)],
    ),
    "action cut off": ("<|detection_action_start|><|detection_action|>", [("detection", "cut off", None)]),
    "answer after a cut": (S + "<|x_1|> It is 4.", [("region", "cut off", S + "<|x_1|>")]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_calls_say_what_is_wrong(name: str) -> None:
    text, expected = MALFORMED[name]
    calls = parse_calls(text)
    assert [call.look for call in calls] == [look for look, _, _ in expected]
    for call, (_, words, span) in zip(calls, expected, strict=True):
        assert text[slice(*call.span)] == (text if span is None else span)
        if words is None:
            assert call.problem is None
        else:
            assert call.problem is not None and words in call.problem
            assert call.cells is None


def test_the_answer_beside_a_cut_off_call_is_kept() -> None:
    assert strip_calls(S + "<|x_1|> It is 4.") == "It is 4."


@pytest.mark.parametrize(
    "text", ["", "a plain answer", "5 < 7 |> 3 <|", "<image>", "<|im_start|>user\n<|im_end|>", "<||>"]
)
def test_plain_text_holds_no_calls(text: str) -> None:
    assert parse_calls(text) == []


def test_a_grid_of_another_size_reads_its_own_cells() -> None:
    text = region("x_15", "y_9", "x_10", "y_12")
    assert parse_calls(text, grid=16)[0].cells == (10, 9, 15, 12)
    assert parse_calls(text, grid=8)[0].problem is not None


def test_spans_of_tokens_are_positions() -> None:
    tokens = ["Ġsee", S, "<|x_1|>", "Ġ", "<|y_1|>", E, "."]
    assert parse_tokens(tokens) == [Call("region", (1, 1, 1, 1), None, (1, 6))]


def _tokens(text: str) -> list[str]:
    """`text` made of control tokens, cut after every ``|>``."""
    return [piece + "|>" for piece in text.split("|>")[:-1]]


PADS, ORDINARY = control_tokens(LOOKS)
CONTROLS = [*ORDINARY, "<|x_8|>", "<|y_99|>"]  # whatever holds one of these holds a call, good or bad
SOUP = st.lists(st.sampled_from([*CONTROLS, *PADS, IM_END, "<|vision_start|>", "word", " "]), max_size=14)


@given(SOUP)
def test_anything_is_read_without_an_exception_and_calls_are_sound(tokens: list[str]) -> None:
    text = "".join(tokens)
    calls = parse_calls(text)
    at = 0
    for call in calls:
        assert call.look in LOOKS
        assert (call.cells is not None) == (call.look == "region" and call.problem is None)
        assert at <= call.span[0] < call.span[1] <= len(text)
        at = call.span[1]
        if call.problem is None:
            # a sound call is read the same way alone, and when written anew
            inside = text[slice(*call.span)]
            again = parse_calls(inside)
            assert [(c.look, c.cells, c.problem) for c in again] == [(call.look, call.cells, None)]
            assert parse_calls(write_call(call.look, call.cells))[0].cells == call.cells
    assert bool(calls) == any(token in CONTROLS for token in tokens)
    assert not parse_calls(strip_calls(text))


@given(st.lists(st.sampled_from([*CONTROLS, *PADS, IM_END, "word"]), max_size=14))
def test_text_and_tokens_are_read_alike(tokens: list[str]) -> None:
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(token))
    from_text, from_tokens = parse_calls("".join(tokens)), parse_tokens(tokens)
    assert [(c.look, c.cells, c.span) for c in from_text] == [
        (c.look, c.cells, (ends[c.span[0]], ends[c.span[1]])) for c in from_tokens
    ]
    assert [c.problem is None for c in from_text] == [c.problem is None for c in from_tokens]


FRAGMENTS = st.lists(st.sampled_from([S, E, "<|x_", "|>", "<|", "x_1", "7", "<|y_1|>", "<|clip_action"])).map("".join)


@given(st.one_of(st.text(max_size=60), FRAGMENTS))
def test_any_text_is_read_without_an_exception(text: str) -> None:
    assert all(isinstance(call, Call) for call in parse_calls(text))


# -- writing ---------------------------------------------------------------------------------------

CELLS = st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(0, 7), st.integers(0, 7)).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
)


@given(CELLS)
def test_a_written_region_is_read_back(cells: tuple[int, int, int, int]) -> None:
    text = write_call("region", cells)
    assert parse_calls(text) == [Call("region", cells, None, (0, len(text)))]


@pytest.mark.parametrize(
    ("look", "cells", "words"),
    [
        ("zoom", None, "region, clip, detection, seg"),
        ("region", None, "needs cells"),
        ("region", (0, 0, 8, 1), "(0, 0, 8, 1)"),
        ("region", (3, 0, 1, 1), "(3, 0, 1, 1)"),
        ("region", (0, -1, 1, 1), "(0, -1, 1, 1)"),
        ("region", (0, 0, 1), "four"),
        ("clip", (0, 0, 1, 1), "takes no cells"),
    ],
)
def test_a_call_that_cannot_be_written_is_the_users_error(look: str, cells: tuple | None, words: str) -> None:
    with pytest.raises(UserError) as error:
        write_call(look, cells)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_look_turns_of_mixtures_and_of_calls_with_a_problem() -> None:
    def call(look: str, problem: str | None = None) -> Call:
        return Call(look, (0, 0, 1, 1) if look == "region" and not problem else None, problem, (0, 1))

    assert look_turn([]) == ""
    assert look_turn([call("region", "cut off")]) == ""
    assert look_turn([call("region", "cut off"), call("region")]) == "<image>"
    assert look_turn([call("seg")]) == "<seg_image>"
    assert look_turn([call("clip"), call("region")]) == "<clip_image>\n<image>"
    mixed = look_turn([call("region"), call("detection"), call("region")])
    assert mixed == "Region 0: <image>\nRegion 1: <image>\n<detection_image>"


# -- the grammar -----------------------------------------------------------------------------------

XS, YS = {x_token(i) for i in range(8)}, {y_token(i) for i in range(8)}


def test_the_grammar_leads_through_a_region_call() -> None:
    written = ["I", S]
    for expected, choice in [(XS, "<|x_1|>"), (YS, "<|y_2|>"), (XS, "<|x_3|>"), (YS, "<|y_4|>"), ({E}, E)]:
        assert allowed_next(written, {"region"}) == expected
        written.append(choice)
    assert allowed_next(written, {"region"}) == {IM_END, S}
    assert allowed_next(written, {"region", "clip"}) == {IM_END, S, "<|clip_action_start|>"}


def test_the_grammar_leads_through_a_reencoding_call_once() -> None:
    start, action, end = _tokens(CLIP)
    assert allowed_next([start], {"clip"}) == {action}
    assert allowed_next([start, action], {"clip"}) == {end}
    assert allowed_next([start, action, end], {"clip"}) == {IM_END}
    assert allowed_next([start, action, end], {"clip", "seg"}) == {IM_END, "<|seg_action_start|>"}


@pytest.mark.parametrize("written", [[], ["The", "Ġtotal"], ["<|x_1|>"], _tokens(CLIP) + ["text"], [S, IM_END]])
def test_nothing_is_constrained_where_no_call_is_open(written: list[str]) -> None:
    assert allowed_next(written, set(LOOKS)) is None


@pytest.mark.parametrize("written", [[S, "<|y_1|>"], [S, "<|x_1|>", "<|x_1|>"], [S, "word"], [S, "<|clip_action|>"]])
def test_a_call_that_left_the_grammar_may_only_be_closed(written: list[str]) -> None:
    assert allowed_next(written, {"region"}) == {E}


@given(st.data(), st.sets(st.sampled_from(list(LOOKS)), min_size=1), st.integers(1, 9))
def test_whatever_the_grammar_allows_is_well_formed(data: st.DataObject, looks: set[str], grid: int) -> None:
    """Any walk through the allowed tokens is a list of well-formed calls of the model's looks, and never gets stuck."""
    written = [data.draw(st.sampled_from(sorted(LOOKS[look].start for look in looks)))]
    while len(written) < 40 and written[-1] != IM_END:
        allowed = allowed_next(written, looks, grid)
        assert allowed
        written.append(data.draw(st.sampled_from(sorted(allowed))))
    calls = parse_tokens(written, grid)
    assert calls and {call.look for call in calls} <= looks
    assert all(call.problem is None for call in calls[:-1])
    assert calls[-1].problem is None or written[-1] != IM_END


def test_importing_the_pure_layer_loads_nothing_heavy() -> None:
    code = (
        "import sys, relook.looks, relook.regions, relook.trace, relook.errors;"
        "print([m for m in ('torch', 'transformers', 'PIL', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
