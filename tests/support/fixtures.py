"""Fixtures shared by several test files."""

from __future__ import annotations

import json
import os
import shutil
from functools import cache
from pathlib import Path

import pytest

from relook.bases import BASES
from relook.looks import LOOKS
from support import qwen_vocab
from support.tiny_model import PATCH, default_base, of_base, tiny_model


@cache
def _tokenizer():
    from relook.model.new import build_tokenizer
    from support.synthetic import TINY

    size = TINY
    return build_tokenizer(type(size)(**{**vars(size), "looks": tuple(LOOKS)}))


@pytest.fixture(scope="module", params=list(BASES))
def base(request):
    """Each base in turn, of which tiny models are twins; module fixtures that hold one depend on it."""
    with of_base(request.param):
        yield request.param


@cache
def _tiny_vlm(base: str, looks: tuple[str, ...], seed: int, settings: tuple):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from relook.model import VPTQwen2VLProcessor
    from relook.perceive import VLM
    from relook.processing import View

    tokenizer = _tokenizer()
    ids = tokenizer.convert_tokens_to_ids
    reencoding = tuple(look for look in looks if LOOKS[look].reencodes)
    token_ids = {}
    for look in reencoding:
        spec = LOOKS[look]
        token_ids |= {
            f"{look}_image_token_id": ids(spec.pad),
            f"{look}_action_start_id": ids(spec.start),
            f"{look}_action_id": ids(spec.action),
        }
    # tiny_config's token ids belong to a vocabulary without text
    model = tiny_model(
        seed,
        base=base,
        looks=reencoding,
        region="region" in looks,
        vocab_size=len(tokenizer) + 5,  # models pad their vocabulary
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        para_start_id=ids("<|im_start|>"),
        para_end_id=ids("<|im_end|>"),
        eos_token_id=ids("<|im_end|>"),
        pad_token_id=ids("<|endoftext|>"),
        bos_token_id=None,
        **token_ids,
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, size={"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 512 * 512}
    )
    defaults = {"first_look": View(64), "second_look": View(48)}
    processor = VPTQwen2VLProcessor(images, tokenizer, looks=looks, **{**defaults, **dict(settings)})
    return VLM(model, processor, "tiny")


@pytest.fixture(scope="session")
def tiny_vlm():
    """A factory of random VLMs of a few thousand parameters: `tiny_vlm(looks=("region", "clip"), seed=0, **settings)`.

    `settings` are the processor's (`free_choice=True`, `reencode_look=View(96)`). VLMs are stateless, so the one made
    for a set of arguments is cached and shared.
    """

    def make(looks=tuple(LOOKS), seed=0, **settings):
        return _tiny_vlm(default_base(), tuple(looks), seed, tuple(sorted(settings.items())))

    return make


@pytest.fixture(scope="session")
def qwen_folder(request, tmp_path_factory):
    """A plain Qwen2-VL folder as on the hub: tokenizer, preprocessor_config.json, no processor_config.json."""
    if qwen_vocab.ranks_file() is None:
        pytest.fail("dashscope is not installed, which carries the Qwen vocabulary: pip install -e '.[dev]'")
    kept = getattr(request.config, "cache", None)  # building takes seconds: cache if possible
    folder = Path(kept.mkdir("qwen-vocab-1") if kept else tmp_path_factory.mktemp("qwen"))
    if not (folder / "done").exists():
        qwen_vocab.write_folder(folder)
        preprocessing = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            **{"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2},
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
        (folder / "done").touch()
    return folder


FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
FLAGS += ("--disable-component-update", "--disable-sync")


@pytest.fixture(scope="module")  # playwright's event loop must not outlive the file: others start their own
def chromium():
    """A headless Chromium of the machine, driven by playwright; none is downloaded."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[browser]")
    named = os.environ.get("RELOOK_CHROMIUM")
    path = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium); RELOOK_CHROMIUM=PATH names one")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()
