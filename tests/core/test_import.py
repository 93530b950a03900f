"""`import relook` loads no heavy package and registers with transformers whichever of the two is imported first.

Each case runs in a fresh interpreter, because it depends on sys.modules.
"""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "PIL", "pydantic", "rich")


def run(code: str) -> str:
    """Run code in a new interpreter; its stdout. A failure shows what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded_after(code: str) -> set[str]:
    return set(run(f"{code}\nimport sys; print(*(m for m in {HEAVY} if m in sys.modules))").split())


@pytest.mark.parametrize("code", ["import relook", "import relook.looks, relook.regions, relook.trace, relook.errors"])
def test_nothing_heavy_is_imported(code: str) -> None:
    assert not loaded_after(code) & set(HEAVY)


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["ask", "--help"], ["models", "--help"], ["train", "--help"]]
)
def test_help_loads_no_torch(argv: list[str]) -> None:
    code = f"from relook.cli import app\ntry: app({argv!r})\nexcept SystemExit as stop: assert not stop.code"
    assert not loaded_after(code) & {"torch", "transformers", "numpy"}


def test_public_names_are_there_and_listed() -> None:
    import relook

    for name in relook.__all__:
        assert getattr(relook, name) is not None
        assert name in dir(relook)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        relook.lode  # noqa: B018


# Each import of torch and the model classes costs seconds, so only the orders that take different paths are here.
ORDERS = {
    "relook, then transformers": "import relook, transformers",
    "Auto classes, then relook": "from transformers import AutoModelForImageTextToText, AutoProcessor; import relook",
    "one of them, then relook": "from transformers import AutoConfig; import relook",
    "our own module first": "import relook.processing",
}

ASK_AUTO_CLASSES = """
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from relook.bases import BASES
for base in BASES:
    config = AutoConfig.for_model(base)
    model = AutoModelForImageTextToText._model_mapping[type(config)]
    print(type(config).__name__, model.__name__, PROCESSOR_MAPPING[type(config)].__name__)
print(processor_class_from_name("VPTQwen2VLProcessor").__module__)
"""

OTHER_MODELS = """
import relook, sys
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
print(type(AutoConfig.for_model("qwen2_vl")).__module__)
print([name for name in sys.modules if name.startswith("relook.model")])
"""

FORK = """
import contextlib, io, json, os, sys, torch
assert not {{"transformers", "relook"}} & set(sys.modules)
printed = {{}}
for name, code in {programs!r}.items():
    reader, writer = os.pipe()
    if os.fork() == 0:
        with open(writer, "w") as file, contextlib.redirect_stdout(file):
            exec(code, {{"__name__": "__main__"}})
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        printed[name] = file.read()
    os.wait()
print(json.dumps(printed))
"""


@pytest.fixture(scope="module")
def runs() -> dict[str, str]:
    """What each program prints, run in processes forked from one that has imported torch, but not transformers."""
    programs = {order: code + ASK_AUTO_CLASSES for order, code in ORDERS.items()} | {"others": OTHER_MODELS}
    return json.loads(run(FORK.format(programs=programs)))


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_know_the_model_type(order: str, runs) -> None:
    *names, module = runs[order].splitlines()
    assert names == [
        f"VPT{stock}Config VPT{stock}ForConditionalGeneration VPTQwen2VLProcessor"
        for stock in ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
    ]
    assert module.startswith("relook.")


def test_a_program_that_uses_other_models_loads_nothing_of_ours(runs) -> None:
    assert runs["others"].splitlines() == ["transformers.models.qwen2_vl.configuration_qwen2_vl", "[]"]
