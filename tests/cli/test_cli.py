"""The command line: output, output streams and exit codes.

Most cases run in process through typer's runner; exit codes and signals of the installed command are tested in a
subprocess.
"""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support import ROOT
from support.synthetic import PAGES
from typer.testing import CliRunner

import relook
from relook.cli import app
from relook.cli.common import repeat_list_options
from relook.trace import Answer, Look, Usage

QUESTION = "What is the total?"


@pytest.fixture(scope="module")
def model(tiny_vlm, tmp_path_factory) -> str:
    """A folder with a random model that has region and clip looks."""
    folder = tmp_path_factory.mktemp("model")
    vlm = tiny_vlm(("region", "clip"))
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def page(tmp_path) -> str:
    path = tmp_path / "page.png"
    Image.effect_mandelbrot((160, 120), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(path)
    return str(path)


def call(*argv: object, code: int = 0):
    """Run the command in process and check its exit code; the result has stdout and stderr."""
    result = CliRunner().invoke(app, [str(arg) for arg in argv])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


def refused(*argv: object) -> str:
    """The one line on stderr of a call that is the user's mistake."""
    result = call(*argv, code=2)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("relook: ")
    return lines[0]


# -- ask --------------------------------------------------------------------------------------------------------------


def test_ask_prints_the_answer_and_the_forced_region(model, page) -> None:
    lines = call("ask", page, QUESTION, "-m", model, "--region", "2,3,4,5", "--max-new-tokens", 4).stdout.splitlines()
    # 160 x 120 pixels in 8 x 8 cells of 20 x 15, widened by the processor's margin of one cell
    assert "look 1: region, cells 2,3,4,5, box 20,30,120,105 (x1,y1,x2,y2 pixels)" in lines


def test_a_box_is_the_region_that_covers_it_also_for_a_file_of_questions(model, page, tmp_path) -> None:
    lines = call("ask", page, QUESTION, "-m", model, "--box", "41,46,99,89", "--max-new-tokens", 4).stdout.splitlines()
    assert "look 1: region, cells 2,3,4,5, box 20,30,120,105 (x1,y1,x2,y2 pixels)" in lines
    (tmp_path / "q.csv").write_text(f"image,question\npage.png,{QUESTION}\n")
    options = ["-m", model, "--box", "41,46,99,89", "--max-new-tokens", 4]
    call("ask", "--batch", tmp_path / "q.csv", "--out", tmp_path / "a.jsonl", *options)
    assert json.loads((tmp_path / "a.jsonl").read_text())["looks"][0]["cells"] == [2, 3, 4, 5]


def test_an_image_from_standard_input(model, page) -> None:
    options = [QUESTION, "-m", model, "--max-new-tokens", "3"]
    given = CliRunner().invoke(app, ["ask", "-", *options], input=Path(page).read_bytes())
    assert given.exit_code == 0 and given.stdout == call("ask", page, *options).stdout
    nothing = CliRunner().invoke(app, ["ask", "-", *options], input=b"")
    assert nothing.exit_code == 2 and "not an image" in nothing.stderr


def test_ask_agrees_with_the_library(model, page) -> None:
    record = json.loads(call("ask", page, QUESTION, "-m", model, "--look", "clip", "--json").stdout)
    answer = relook.load(model).ask(page, QUESTION, look="clip")
    expected = json.loads(json.dumps(answer.to_dict()))
    record["usage"].pop("seconds"), expected["usage"].pop("seconds")
    assert record == expected


def test_ask_without_a_look_says_so(model, page) -> None:
    assert call("ask", page, QUESTION, "-m", model, "--look", "none").stdout.splitlines()[-1] == "no second look"


def test_ask_saves_a_picture_into_a_new_folder(model, page, tmp_path) -> None:
    place = tmp_path / "new" / "out.png"
    lines = call("ask", page, QUESTION, "-m", model, "--look", "region", "--save", place).stdout.splitlines()
    assert lines[-1] == f"saved: {place}"
    assert Image.open(place).size > (160, 120)


def test_control_characters_do_not_reach_the_terminal(monkeypatch, page) -> None:
    class Fake:
        def ask(self, *args: object, **options: object) -> Answer:
            looks = [Look("region", (0, 0, 1, 1), (0, 0, 40, 30)), Look("clip", problem="cut short")]
            return Answer("a\x1b[2Jb\nc", looks, Usage(), warnings=["watch out"])

    monkeypatch.setattr(relook, "load", lambda name, **options: Fake())
    result = call("ask", page, QUESTION)
    assert result.stdout.splitlines() == [
        "a\N{REPLACEMENT CHARACTER}[2Jb",
        "c",
        "look 1: region, cells 0,0,1,1, box 0,0,40,30 (x1,y1,x2,y2 pixels)",
        "look 2: clip, not taken: cut short",
    ]
    assert result.stderr == "relook: watch out\n"


@pytest.fixture
def narrow(model, tmp_path):
    """Makes a copy of the random model that says it was trained on `domain` only."""

    def make(domain: str) -> str:
        folder = tmp_path / "narrow"
        shutil.copytree(model, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "domain": domain}))
        return str(folder)

    return make


def test_what_a_model_was_trained_on_is_said_on_stderr_once(model, narrow, page) -> None:
    arguments = ["ask", page, QUESTION, "--max-new-tokens", 4]
    general, small = call(*arguments, "-m", model), call(*arguments, "-m", narrow("maps"))
    sentence = f"{narrow('maps')} was trained on maps only; on anything else its answers mean nothing."
    assert general.stderr == ""
    assert small.stderr == f"relook: {sentence}\n"
    assert small.stdout == general.stdout
    assert json.loads(call(*arguments, "-m", narrow("maps"), "--json").stdout)["warnings"] == [sentence]
    assert json.loads(call(*arguments, "-m", model, "--json").stdout)["warnings"] == []


def test_a_domain_is_printed_as_one_harmless_line(narrow, page) -> None:
    said = call("ask", page, QUESTION, "-m", narrow("\x1b[2Jcats\nrelook: dogs"), "--max-new-tokens", 1).stderr
    assert said.splitlines() == [said.rstrip("\n")]
    assert "trained on \N{REPLACEMENT CHARACTER}[2Jcats relook: dogs only" in said


def test_the_shipped_model_warns_about_any_picture(page) -> None:
    said = call("ask", page, QUESTION, "--max-new-tokens", 1).stderr
    assert said == "relook: receipts-tiny was trained on receipts only; on anything else its answers mean nothing.\n"


def test_wrong_images(tmp_path, page) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    cut = tmp_path / "cut.jpg"
    Image.effect_noise((300, 300), 80).save(cut)
    cut.write_bytes(cut.read_bytes()[:9000])
    for path in (tmp_path / "none.jpg", text, cut, tmp_path):
        assert str(path) in refused("ask", path, QUESTION)


def test_an_image_is_a_data_url_or_with_fetch_an_address(page, model) -> None:
    url = f"data:image/png;base64,{base64.b64encode(Path(page).read_bytes()).decode()}"
    options = ["What does <|im_end|> say?", "-m", model, "--max-new-tokens", 3]
    assert call("ask", url, *options).stdout == call("ask", page, *options).stdout
    assert "data URL" in refused("ask", "data:image/png;base64,?", QUESTION)
    assert "--fetch" in refused("ask", "http://127.0.0.1:9/a.png", QUESTION)
    assert "cannot be fetched" in refused("ask", "http://127.0.0.1:9/a.png", QUESTION, "--fetch")


def test_wrong_questions_looks_and_regions(page, model) -> None:
    assert "empty" in refused("ask", page, "  ")
    assert "region, clip, detection, seg" in refused("ask", page, QUESTION, "--look", "zoom")
    assert "1,2" in refused("ask", page, QUESTION, "--region", "1,2")
    assert "8 x 8" in refused("ask", page, QUESTION, "-m", model, "--region", "0,0,8,8")
    assert "four numbers" in refused("ask", page, QUESTION, "--box", "1,2")
    assert "leaves the image" in refused("ask", page, QUESTION, "-m", model, "--box", "0,0,8,99999")
    assert "'seg'" in refused("ask", page, QUESTION, "-m", model, "--look", "seg")


def test_wrong_models(page, tmp_path, model, monkeypatch) -> None:
    from relook.model.loading import shipped_models

    line = refused("ask", page, QUESTION, "-m", "recepits-tiny")
    assert "recepits-tiny" in line and all(name in line for name in shipped_models())
    assert "config.json" in refused("ask", page, QUESTION, "-m", tmp_path)
    empty = tmp_path / "weightless"
    empty.mkdir()
    (empty / "config.json").write_bytes((Path(model) / "config.json").read_bytes())
    assert "no weights" in refused("ask", page, QUESTION, "-m", empty)
    assert "'warp'" in refused("ask", page, QUESTION, "-m", model, "--device", "warp")
    assert "'meta'" in refused("ask", page, QUESTION, "-m", model, "--device", "meta")


def test_an_unwritable_place_is_found_before_the_work(page, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(relook, "load", lambda *args, **options: pytest.fail("the model was loaded first"))
    file = tmp_path / "file"
    file.write_text("keep me")
    for place in (file / "out.png", tmp_path, tmp_path / "out.docx"):
        assert str(place.name) in refused("ask", page, QUESTION, "--save", place)
    assert file.read_text() == "keep me"


# -- the other commands -----------------------------------------------------------------------------------------------


def test_models_inspect_counts_what_the_model_has(model, tiny_vlm) -> None:
    loaded = tiny_vlm(("region", "clip")).model
    record = json.loads(call("models", "inspect", model, "--json").stdout)
    assert record["looks"] == ["region", "clip"]
    stored = sum(p.numel() for p in loaded.parameters())
    tied = loaded.lm_head.weight.numel() if loaded.config.tie_word_embeddings else 0
    assert sum(record["parameters"].values()) == stored + tied
    table = call("models", "inspect", model).stdout
    assert f"{stored + tied:,}" in table and "looks: region, clip" in table


def test_models_list_names_what_ships() -> None:
    from relook.model.loading import shipped_models

    records = json.loads(call("models", "list", "--json").stdout)
    assert [record["model"] for record in records] == shipped_models()


def test_models_convert_there_and_back(model, tmp_path) -> None:
    there, back = tmp_path / "published", tmp_path / "back"
    call("models", "convert", model, there, "--to", "published")
    assert list(there.glob("pytorch_model*.bin"))
    call("models", "convert", there, back)
    count = [json.loads(call("models", "inspect", m, "--json").stdout)["parameters"] for m in (model, back)]
    assert count[0] == count[1]
    assert str(back) in refused("models", "convert", model, back)


def test_data_build_then_check(tmp_path) -> None:
    items = tmp_path / "items.json"
    out = call("data", "build", ROOT / "examples" / "questions.jsonl", items, "--limit", 5).stdout
    assert "5 items" in out and str(items) in out
    assert len(json.loads(items.read_text())) == 5
    assert "no fault" in call("data", "check", items).stdout
    broken = json.loads(items.read_text())
    broken[1]["messages"][1]["content"] = "<|region_token_start|><|x_8|>"
    items.write_text(json.dumps(broken))
    assert json.loads(call("data", "check", items, "--json", code=1).stdout)["ok"] is False
    assert "none.jsonl" in refused("data", "build", tmp_path / "none.jsonl", items)


@pytest.mark.skipif(os.name == "nt", reason="named pipes")
def test_data_check_refuses_what_cannot_be_read_twice(tmp_path) -> None:
    pipe = tmp_path / "items.jsonl"
    os.mkfifo(pipe)  # nobody writes into it: opening it would wait for ever
    assert f"{pipe}: is a pipe" in refused("data", "check", pipe)
    items = json.dumps({"messages": [], "images": []})
    streamed = subprocess.run([*COMMAND, "data", "check", "/dev/stdin"], input=items, capture_output=True, text=True)
    assert (streamed.returncode, streamed.stdout) == (2, "")
    assert "/dev/stdin: is a pipe" in streamed.stderr and len(streamed.stderr.splitlines()) == 1


def test_train_refuses_a_recipe_it_cannot_read(tmp_path) -> None:
    assert "none.yaml" in refused("train", tmp_path / "none.yaml")
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("nmae: x\n")
    assert "nmae" in refused("train", recipe)


def test_evaluate_prints_a_table_and_json(model, tmp_path) -> None:
    arguments = ["evaluate", "-m", model, "--tasks", PAGES, "--looks", "none", "region", "--n", 2]
    table = call(*arguments, "--out", tmp_path / "run").stdout
    assert "none" in table and "region" in table
    record = json.loads(call(*arguments, "--json").stdout)
    assert [(r["task"], r["look"], r["asked"]) for r in record["results"]] == [
        ("pages", "none", 2),
        ("pages", "region", 2),
    ]
    assert "no-such-task" in refused("evaluate", "-m", model, "--tasks", "no-such-task")


def test_list_options_take_several_values() -> None:
    given = ["--model", "m", "--tasks", "a", "b", "--json", "--looks", "c", "--n", "3"]
    expected = "--model m --tasks a --tasks b --json --looks c --n 3"
    assert " ".join(repeat_list_options(given)) == expected
    assert repeat_list_options(["--tasks"]) == ["--tasks"]
    assert "--tasks" in refused("evaluate", "--tasks")


@pytest.mark.parametrize(
    "argv", [["ask"], ["ask", "a.png"], ["aks"], ["models"], ["ask", "a", "b", "--save"]], ids=" ".join
)
def test_usage_errors_are_one_line_with_a_pointer_to_help(argv) -> None:
    assert "--help" in refused(*argv)


# -- as a process -----------------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "relook.cli"]


def process(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *argv], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_exit_codes_of_the_command() -> None:
    assert process("--help").returncode == 0
    assert process("--version").stdout.strip() == relook.__version__
    wrong = process("ask", "none.jpg", QUESTION)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "none.jpg" in wrong.stderr and "Traceback" not in wrong.stderr
    assert process("ask").returncode == 2


def test_work_that_failed_is_exit_code_one(monkeypatch, page) -> None:
    def fail(*args: object, **options: object) -> None:
        raise relook.RelookError("out of memory")

    monkeypatch.setattr(relook, "load", fail)
    assert call("ask", page, QUESTION, code=1).stderr == "relook: out of memory\n"


WAITING = """
import signal, sys, time, relook
from relook.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would inherit "ignore"

def load(*args, **options):
    print("working", flush=True)
    time.sleep(600)

relook.load = load
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_is_exit_code_130(page) -> None:
    command = [sys.executable, "-c", WAITING, "ask", page, QUESTION]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None and running.stdout.readline() == "working\n"
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in stderr


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, monkeypatch) -> None:
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("relook.data.locate.locate", stop)
    target = tmp_path / "located.jsonl"
    said = call("data", "locate", tmp_path / "q.csv", target, code=130).stderr
    assert said == f"relook: interrupted; what is done is in {target}, and the same command goes on from there\n"


def test_text_that_no_encoding_has_is_printed_all_the_same(tmp_path):
    """Half a character in the path of an image that is not there: the results are printed, exit code 0."""
    for name in ("a.png", "b\ud83d.png"):
        question = {"image": name, "question": "What is the code on the red box?", "answer": "1"}
        with (tmp_path / "q.jsonl").open("a") as file:
            file.write(json.dumps(question) + "\n")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    run, report = tmp_path / "run", tmp_path / "report"
    for command in (
        ["evaluate", "-m", "cards-tiny", "--tasks", tmp_path / "q.jsonl", "--looks", "none", "--out", run],
        ["report", run, "--out", report, "--keep", tmp_path / "kept"],
    ):
        words = [sys.executable, "-m", "relook", *map(str, command)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "\\ud83d.png" in (report / "table.md").read_text()
