"""`import relook` stays light, and announces its model type to transformers in whichever order the two are imported.

Each case runs in a fresh interpreter: what is in sys.modules there is the whole point.
"""

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


RELOOK_FIRST = "import relook\nimport transformers\n"
TRANSFORMERS_FIRST = "import transformers\nimport relook\n"
AUTO_FIRST = "from transformers import AutoModelForImageTextToText, AutoConfig, AutoProcessor\nimport relook\n"
CONFIG_FIRST = "from transformers import AutoConfig\nimport relook\n"
OURS_FIRST = "import relook.model\n"
PROCESSING_FIRST = "import relook.processing\n"
ORDERS = [RELOOK_FIRST, TRANSFORMERS_FIRST, AUTO_FIRST, CONFIG_FIRST, OURS_FIRST, PROCESSING_FIRST]

ASK_AUTO_CLASSES = """
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
config = AutoConfig.for_model("qwen2_vl_vpt")
model = AutoModelForImageTextToText._model_mapping[type(config)]
print(type(config).__name__, model.__name__, PROCESSOR_MAPPING[type(config)].__name__)
print(processor_class_from_name("VPTQwen2VLProcessor").__module__)
"""


@pytest.mark.parametrize("order", ORDERS, ids=lambda code: code.replace("\n", "; "))
def test_auto_classes_know_the_model_type(order: str) -> None:
    names, module = run(order + ASK_AUTO_CLASSES).splitlines()
    assert names == "VPTQwen2VLConfig VPTQwen2VLForConditionalGeneration VPTQwen2VLProcessor"
    assert module.startswith("relook.")


def test_announcing_loads_no_model_code() -> None:
    """A program that imports relook and uses transformers for something else pays nothing for us."""
    code = (
        RELOOK_FIRST + "from transformers import AutoConfig, AutoProcessor, AutoModelForImageTextToText, AutoTokenizer"
    )
    out = run(code + "\nimport sys; print([m for m in sys.modules if m.startswith('relook.model')])")
    assert out == "[]"


def test_other_models_are_untouched() -> None:
    code = (
        RELOOK_FIRST + "from transformers import AutoConfig; print(type(AutoConfig.for_model('qwen2_vl')).__module__)"
    )
    assert run(code) == "transformers.models.qwen2_vl.configuration_qwen2_vl"


def test_transformers_alone_does_not_know_us() -> None:
    code = (
        "from transformers import AutoConfig\ntry: AutoConfig.for_model('qwen2_vl_vpt')\nexcept ValueError: print('no')"
    )
    assert run(code) == "no"
