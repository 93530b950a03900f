"""lmms-eval and VLMEvalKit: our classes through their documented interfaces, on stubs; slow: on the real packages.

The packages need an environment of their own (docs/integrations.md). Give its Python to run the slow tests:
RELOOK_LMMS_EVAL=/path/bin/python RELOOK_VLMEVAL=/path/bin/python pytest -m slow tests/integrations/test_integrations.py
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image
from support import ROOT, TESTS

from relook.errors import UserError
from relook.evaluate import find_task
from relook.integrations.answering import Answering, bare

PICTURE = Image.new("RGB", (8, 8))


class Echo:
    """A model that answers with what it was asked."""

    def __init__(self):
        self.asked, self.options = [], {}

    def ask_many(self, pairs, **options):
        self.asked += pairs
        self.options = options
        return [SimpleNamespace(text=f"{pair['question']} END more") for pair in pairs]


def stub(monkeypatch, **modules: dict) -> None:
    """Modules of these (underscored) names with these contents, in place of an installed package."""
    for name, contents in modules.items():
        module = ModuleType(name.replace("__", "."))
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)


# ---- what they share


def test_prompts_lose_placeholders_and_options_are_read_as_words():
    model = Echo()
    answering = Answering(model, batch="4", look="region", max_looks="2", constrain="False")
    assert answering.texts([([PICTURE], "<image>\nWhat?", {"max_new_tokens": 3})]) == ["What? END more"]
    assert model.options == {"batch_size": 4, "look": "region", "max_looks": 2, "constrain": False}
    assert model.asked == [{"image": [PICTURE], "question": "What?", "max_new_tokens": 3}]
    assert bare("<image 1> a") == "a"
    with pytest.raises(UserError, match="unknown option 'zoom'"):
        Answering(model, zoom=2)


def test_the_real_loop_answers_for_a_harness(tiny_vlm):
    answering = Answering(tiny_vlm(looks=("region",)), look="region")
    texts = answering.texts([([PICTURE], "What?", {"max_new_tokens": 2}), ([PICTURE, PICTURE], "And?", {})])
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)
    with pytest.raises(UserError, match="no image was given"):
        answering.texts([([], "What?", {})])


# ---- lmms-eval


@pytest.fixture
def lmms(monkeypatch):
    """Our module on a stand-in for lmms-eval 0.7.3: what its base class demands, offers and calls."""

    class Base(ABC):
        is_simple = True

        def __init__(self):
            self.task_dict, self.cached = {}, []
            self.cache_hook = SimpleNamespace(add_partial=lambda *entry: self.cached.append(entry))

        @abstractmethod
        def loglikelihood(self, requests): ...

        @abstractmethod
        def generate_until(self, requests): ...

        @abstractmethod
        def generate_until_multi_round(self, requests): ...

    stub(
        monkeypatch,
        lmms_eval={},
        lmms_eval__api={},
        lmms_eval__api__model={"lmms": Base},
        lmms_eval__models={},
        lmms_eval__models__registry_v2={
            "ModelManifest": lambda name, simple_class_path: SimpleNamespace(name=name, path=simple_class_path)
        },
    )
    monkeypatch.delitem(sys.modules, "relook.integrations.lmms", raising=False)
    yield importlib.import_module("relook.integrations.lmms")
    sys.modules.pop("relook.integrations.lmms", None)


def test_lmms_eval_gets_texts_for_documents(lmms):
    model = lmms.Relook(model=Echo(), look="none", max_batch_size=None)
    model.task_dict = {"own": {"test": [{"picture": PICTURE}, {"picture": PICTURE}]}}
    greedy = {"max_new_tokens": 5, "until": ["\n\n", " END"], "do_sample": False, "temperature": 0, "num_beams": 1}
    drawn = {"do_sample": True, "temperature": 0.7, "top_p": None}
    requests = [
        SimpleNamespace(args=("one", greedy, lambda doc: [doc["picture"]], 0, "own", "test")),
        SimpleNamespace(args=("two", drawn, lambda doc: doc["picture"], 1, "own", "test")),
    ]
    assert model.generate_until(requests) == ["one", "two END more"]
    first, second = model.answering.vlm.asked
    assert first == {"image": [PICTURE], "question": "one", "max_new_tokens": 5}
    assert second == {"image": [PICTURE], "question": "two", "do_sample": True, "temperature": 0.7}
    assert [entry[2] for entry in model.cached] == ["one", "two END more"]


def test_lmms_eval_is_told_what_there_is_not(lmms):
    model = lmms.Relook(model=Echo())
    with pytest.raises(NotImplementedError, match="likelihood of a given answer is not defined"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round([])
    with pytest.raises(UserError, match="num_beams=3"):
        lmms.generation({"num_beams": 3})
    with pytest.raises(UserError, match="no model was named"):
        lmms.Relook()


def test_lmms_eval_finds_the_class_by_its_entry_point(lmms):
    manifest = lmms.manifest()
    assert (manifest.name, manifest.path) == ("relook", "relook.integrations.lmms.Relook")
    project = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points."lmms_eval.models"]\nrelook = "relook.integrations.lmms:manifest"' in project


# ---- VLMEvalKit


@pytest.fixture
def vlmeval(monkeypatch):
    """Our module on a stand-in for VLMEvalKit: a base class that hands a checked message to `generate_inner`."""

    class Base:
        allowed_types = ["text", "image", "video"]

        def generate(self, message, dataset=None):
            assert all(part["type"] in self.allowed_types for part in message), message
            return self.generate_inner(message, dataset)

    stub(monkeypatch, vlmeval={}, vlmeval__vlm={}, vlmeval__vlm__base={"BaseModel": Base})
    sys.modules["vlmeval"].vlm = sys.modules["vlmeval.vlm"]
    monkeypatch.delitem(sys.modules, "relook.integrations.vlmeval", raising=False)
    yield importlib.import_module("relook.integrations.vlmeval")
    sys.modules.pop("relook.integrations.vlmeval", None)


def test_vlmevalkit_gets_a_text_for_a_message(vlmeval):
    model = vlmeval.Relook(Echo(), max_new_tokens=9, look="region")
    message = [
        {"type": "text", "value": "Look:"},
        {"type": "image", "value": "a.png"},
        {"type": "text", "value": "What?"},
    ]
    assert model.generate(message, "Own") == "Look:\nWhat? END more"
    assert model.answering.vlm.asked == [{"image": ["a.png"], "question": "Look:\nWhat?", "max_new_tokens": 9}]
    with pytest.raises(AssertionError):
        model.generate([{"type": "video", "value": "a.mp4"}])
    with pytest.raises(UserError, match="a question of Own has no image"):
        model.generate(message[:1], "Own")


def test_vlmevalkit_knows_the_class_by_name(vlmeval):
    vlmeval.register()
    assert sys.modules["vlmeval.vlm"].Relook is vlmeval.Relook


# ---- for real


@pytest.fixture
def pages() -> list:
    """Pages of the shipped cards-tiny, whose task is the zoo's."""
    pytest.importorskip("zoo")
    return list(find_task("cards").items(4, 0))


def python(variable: str) -> str:
    named = os.environ.get(variable)
    if not named:
        pytest.skip(f"the harness wants an environment of its own; name its Python in {variable}")
    return named


def run(folder: Path, *command: object, **more: str) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_lmms_eval_for_real(pages, tmp_path):
    interpreter = python("RELOOK_LMMS_EVAL")
    rows = []
    for number, page in enumerate(pages):
        page.image.save(tmp_path / f"{number}.png")
        rows.append({"image": str(tmp_path / f"{number}.png"), "question": page.text, "answer": page.answer})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task").mkdir()
    for name in ("own_cards.yaml", "utils.py"):
        text = (TESTS / "fixtures/lmms_eval" / name).read_text()
        (tmp_path / "task" / name).write_text(text.replace("own.jsonl", str(tmp_path / "own.jsonl")))
    command = ["-m", "lmms_eval", "--model", "relook", "--model_args", "model=cards-tiny,look=auto", "--include_path"]
    command += ["task", "--tasks", "own_cards", "--batch_size", "4", "--output_path", "out", "--log_samples"]
    run(tmp_path, interpreter, *command, HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    (results,) = tmp_path.glob("out/*/*results.json")
    assert json.loads(results.read_text())["results"]["own_cards"]["exact,none"] == 1.0
    (samples,) = tmp_path.glob("out/*/*samples_own_cards.jsonl")
    told = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [sample["filtered_resps"] for sample in told] == [page.answer for page in pages]


@pytest.mark.slow
def test_vlmevalkit_for_real(pages, tmp_path):
    interpreter = python("RELOOK_VLMEVAL")
    lines = ["index\timage\tquestion\tanswer"]
    for number, page in enumerate(pages):
        file = BytesIO()
        page.image.save(file, "PNG")
        lines.append(f"{number}\t{base64.b64encode(file.getvalue()).decode()}\t{page.text}\t{page.answer}")
    (tmp_path / "own.tsv").write_text("\n".join(lines) + "\n")
    config = {
        "model": {"mine": {"class": "Relook", "model": "cards-tiny", "look": "auto", "max_new_tokens": 16}},
        "data": {"own": {"class": "CustomVQADataset", "dataset": "own"}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = ["-m", "relook.integrations.vlmeval", "--config", "config.json", "--work-dir", "out", "--mode", "infer"]
    run(tmp_path, interpreter, *command, LMUData=str(tmp_path))
    read = "import pandas; print([int(told) for told in pandas.read_excel('out/mine/mine_own.xlsx').prediction])"
    told = subprocess.run([interpreter, "-c", read], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert json.loads(told) == [int(page.answer) for page in pages]  # the kit's tables make 22 of 022
