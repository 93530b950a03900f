"""Servers that `relook bench load` starts on this machine and compares."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from relook.errors import RelookError, UserError

from .load import Load, Target, measure

OURS, SINGLE, STOCK = "relook serve", "without batching", "transformers serve"
READY_SECONDS = 300


def run(
    model: str | None = None,
    clients: Sequence[int] = (1, 4, 16, 64),
    rounds: int = 3,
    per_client: int = 2,
    tokens: int = 64,
    look: str = "none",
    transformers_serve: str | None = None,
    seed: int = 0,
    status: Callable[[str], None] = lambda text: None,
) -> Load:
    """Compare relook's server with itself without batching, and with `transformers serve` of the same weights.

    Args:
        model: what to serve; None: a random model, whose answers have exactly `tokens` tokens.
        clients, rounds, per_client, tokens, seed: see `load.measure`.
        look: that relook's servers are asked for; stock transformers has none.
        transformers_serve: a Python in whose environment `transformers serve` runs.
        status: called with a short text about what is being done.
    """
    if transformers_serve is not None and shutil.which(transformers_serve) is None:
        raise UserError(f"--transformers-serve {transformers_serve}: there is no such program; name a Python")
    with tempfile.TemporaryDirectory(prefix="relook-bench-") as folder, ExitStack() as stack:
        status("writing the models")
        ours, stock = write_models(Path(folder), model, transformers_serve is not None)
        extra = {"relook": {"look": look}}
        targets = []
        for name, rows in ((OURS, None), (SINGLE, 1)):
            status(f"starting {name}")
            command = relook_serve(ours, max(clients), rows)
            targets.append(stack.enter_context(started(name, command, Path(folder), "bench", extra)))
        if transformers_serve is not None:
            status(f"starting {STOCK}")
            command = [transformers_serve, "-m", "transformers.cli.transformers", "serve", str(stock)]
            targets.append(stack.enter_context(started(STOCK, command, Path(folder), str(stock))))
        cells = measure(targets, clients, rounds, per_client, tokens, seed, status)
    what = "a random model (8 layers, width 512, float32)" if model is None else model
    told = f"{what}; images of 504 x 504 pixels, answers of {tokens} tokens, look={look}"
    size = f"{rounds} rounds of {per_client} questions a client (at least 8), seed {seed}"
    notes = () if transformers_serve else (f"{STOCK} was not measured: --transformers-serve names no Python for it",)
    return Load(f"{machine()}\n{told}\n{size}", cells, notes, seed)


def run_at(
    address: str,
    clients: Sequence[int],
    rounds: int,
    per_client: int,
    tokens: int,
    look: str = "none",
    seed: int = 0,
    status: Callable[[str], None] = lambda text: None,
) -> Load:
    """Measure a server that runs already, of any make; see `load.measure`."""
    import httpx2

    address = address.rstrip("/").removesuffix("/v1")
    key = os.environ.get("RELOOK_API_KEY") or os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        told = httpx2.get(f"{address}/v1/models", headers=headers, timeout=30)
        served = told.raise_for_status().json()["data"][0]
        extra = {"relook": {"look": look}} if "relook" in served else {}
        target = Target(address, address, served["id"], extra, key)
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{address} names no model at /v1/models ({error}); give the address of a server of OpenAI's API, "
            "such as http://127.0.0.1:8000"
        ) from error
    cells = measure([target], clients, rounds, per_client, tokens, seed, status)
    what = f"{served['id']}; images of 504 x 504 pixels, answers of at most {tokens} tokens"
    return Load(f"clients on {machine()}\n{what}; {rounds} rounds, seed {seed}", cells, (), seed)


def machine() -> str:
    """Processor, cores and versions."""
    import torch
    import transformers

    from relook.evaluate.environment import cpu_name

    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{platform.system()} {platform.machine()}, {cpu_name()}, {os.cpu_count()} cores; {versions}"


def write_models(folder: Path, model: str | None, with_stock: bool) -> tuple[str, Path]:
    """What relook serves, and a folder with the same weights for stock transformers, where it is asked for."""
    from relook.model.export import export

    from .cost import random_model

    if model is None:
        network, processor = random_model()
        _write_ascii_only(network, processor.tokenizer)
        model = str(folder / "relook")
        network.save_pretrained(model)
        processor.save_pretrained(model)
    return model, export(model, folder / "stock", "transformers") if with_stock else folder


def _write_ascii_only(model: Any, tokenizer: Any) -> None:
    """Keep a random model from choosing other tokens than printable ASCII: a logit of 0 is below the maximum.

    Streams hold back the bytes of a character that is not finished, and white space; here every token is a piece.
    """
    added = set(tokenizer.get_added_vocab().values())
    for index in range(len(tokenizer)):
        text = tokenizer.decode([index])
        if index in added or not (text.isascii() and text.isprintable() and text.strip() == text):
            model.lm_head.weight.data[index] = 0


def relook_serve(model: str, clients: int, rows: int | None) -> list[str]:
    """The command of relook's server, without its address; `rows` answered side by side."""
    command = [sys.executable, "-m", "relook", "serve", model, "--name", "bench", "--seconds", "86400"]
    command += ["--waiting", str(clients)]
    return command if rows is None else [*command, "--rows", str(rows)]


@contextmanager
def started(
    name: str, command: Sequence[str], folder: Path, model: str, extra: Mapping[str, Any] | None = None
) -> Iterator[Target]:
    """Run a server on a free port until the block ends; its command gets `--host` and `--port`."""
    import httpx2

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / f"{name}.log"
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environ.pop("RELOOK_API_KEYS", None)
    with log.open("wb") as file:
        where = ["--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen([*command, *where], env=environ, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + READY_SECONDS
        while True:
            try:
                if httpx2.get(f"{address}/health", timeout=5).status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(0.2)
            if process.poll() is not None or time.monotonic() > end:
                said = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
                raise RelookError(f"{name} did not start: {said[0]}")
        yield Target(name, address, model, extra or {})
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
