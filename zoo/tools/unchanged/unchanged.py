"""Proof that a restructuring changed no behaviour: the same commands on two trees, and what differs in what they leave.

    unchanged.py run TREE --out DIR [--only CASE]  run the cases with TREE's code; leaves DIR/digests.json
    unchanged.py compare DIR_A DIR_B               print what differs; exit 1 if anything does

The cases are in unchanged.yaml; what they start from (`--assets`) was made once, by make_assets.py.

Every file that a case leaves is brought into a normal form (a text: tensors as hashes, images as hashes of pixels,
JSON without what is volatile); its digest goes into digests.json, the text itself below DIR/normal, for `compare`.
Two classes of files: numbers (weights, logs, records, answers: must be equal) and bookkeeping (`BOOKKEEPING`: configs,
recipes as used, what is said on stderr: a key may have been renamed on purpose).

Commands run as `python -m relook` would, but in forks of a process that has torch and transformers, and nothing of
relook, in memory (five seconds less a command), under a clock that all but stands still, so that no table or picture
shows how long it took. One thread; numbers hold for one kind of CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import fnmatch
import gzip
import hashlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# ---------------------------------------------------------------- what is volatile, what is bookkeeping

# Keys of JSON that are left out, wherever they stand.
VOLATILE_KEYS = (
    *("seconds", "s", "time", "times", "date", "created", "started", "ended", "elapsed", "duration", "wall", "when"),
    *("version", "versions", "relook_version", "transformers_version", "torch_version", "python", "platform"),
    *("host", "hostname", "machine", "cpu", "device_name", "pid", "mtime", "memory_mb", "peak_mb", "peak_memory_mb"),
    *("samples_per_s", "tokens_per_s", "train_runtime", "train_samples_per_second", "train_steps_per_second"),
    *("total_flos", "digest", "commit", "seconds_a_step", "peak"),
)
# Pieces of text that are replaced; paths of the run come before these.
VOLATILE_TEXT = (
    (r"\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?(?:\.\d+)?Z?)?", "<date>"),
    (r"\b(samples_per_s|tokens_per_s|memory_mb|seconds)([ =:]+)[\d.e+]+", r"\1\2<volatile>"),
    (r"\bseconds(?:,[\d.e-]+){3}", "seconds,<time>"),
    (r"\b\d+(?:\.\d+)? (?:s|min|h|ms|seconds|minutes)\b", "<time>"),
    (r"\b\d\d:\d\d(?::\d\d)?\b", "<time>"),
    (r"[\d.]+(?:it/s|s/it)", "<rate>"),
    (r"\b\d+(?:\.\d+)?e-1\d\b", "<time>"),  # by the clock of `start`
    (r"0x[0-9a-f]{6,}", "<address>"),
    (r"<tree>/(?:zoo/)?recipes", "<recipes>"),
)
# Files whose differences are told apart: a restructuring may rename a key here.
BOOKKEEPING = (
    *("recipe.yaml", "stage.json", "done.json", "record.json", "checkpoint.json", "*config.json", "tokenizer*.json"),
    *("*.jinja", "*.index.json", "trainer_state.json", "*.pt", "*.pth", "*.bin", "README.md", "*.stderr"),
)
IGNORED = ("events.out.tfevents.*", "*.pyc", ".lock")  # files of no interest
HERE = Path(__file__).resolve()

# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """Commands of relook in one folder (see unchanged.yaml)."""

    commands: list[str]
    keep: tuple[str, ...] = ("*",)
    stop: str = ""


def cases() -> tuple[dict[str, Case], dict[str, str], dict[str, str]]:
    """All cases by name; the files they need; words that stand for longer ones."""
    import yaml

    raw = yaml.safe_load(HERE.with_suffix(".yaml").read_text(encoding="utf-8"))
    found = {name: Case(**of) if isinstance(of, dict) else Case(of) for name, of in raw["cases"].items()}
    return found, raw["files"], raw["words"]


def expand(command: str, words: Mapping[str, str], tree: Path) -> list[str]:
    """The arguments of a command as unchanged.yaml has it."""

    def stands_for(seen: re.Match[str]) -> str:
        name, stages, settings = seen["name"], (seen["stages"] or "").split(), (seen["settings"] or "").split()
        if name == "cut":
            return " ".join(f"stages.{stage}.{setting}" for stage in stages for setting in settings)
        if name.startswith("recipe:"):
            places = [tree / folder / f"{name[7:]}.yaml" for folder in ("zoo/recipes", "recipes")]
            return shlex.quote(str(next((place for place in places if place.is_file()), places[0])))
        return expanded(words[name])

    def expanded(text: str) -> str:
        return re.sub(r"\{(?P<name>cut|[a-z][\w:-]*)(?: (?P<stages>[\w ]+): (?P<settings>[^}]*))?\}", stands_for, text)

    return shlex.split(expanded(command))


# ---------------------------------------------------------------- running

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb",
}  # fmt: skip
PRELOADED = (
    *("torch", "transformers", "transformers.trainer", "transformers.models.qwen2_vl.modeling_qwen2_vl", "peft"),
    *("transformers.models.dinov2.modeling_dinov2", "transformers.models.sam.modeling_sam", "PIL.Image", "typer"),
    *("torch.utils.tensorboard", "matplotlib.pyplot", "pydantic", "accelerate", "pyarrow.parquet", "datasets"),
)


def start(argv: list[str], out: Path) -> int:
    """Begin a command in the working directory; returns its process id."""
    streams = [os.open(f"{out}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for kind in ("stdout", "stderr")]
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(streams[0], 1), os.dup2(streams[1], 2)
            sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w"), write_through=True) for n in (1, 2))
            sys.argv, clock = ["relook", *argv], time.perf_counter
            time.perf_counter = time.process_time = lambda: clock() * 1e-12
            runpy.run_module("relook", run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    for stream in streams:
        os.close(stream)
    return pid


def run_case(one: Case, folder: Path, tree: Path, args: argparse.Namespace) -> list[int]:
    """All commands of a case; returns their exit codes."""
    _, files, words = cases()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "in").symlink_to(args.assets)
    os.chdir(folder)
    codes = []
    for number, command in enumerate(one.commands * (2 if one.stop else 1)):
        argv = expand(command, words, tree)
        for file in files.keys() & set(argv):
            Path(file).write_text(files[file])
        pid = start(argv, folder / f"{number:02d}-{argv[0].strip('-')}")
        if one.stop and number == 0:
            while not (Path(one.stop).is_file() and Path(one.stop).stat().st_size) and alive(pid):
                time.sleep(0.01)
            os.kill(pid, signal.SIGTERM)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return codes


def alive(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def worker(args: argparse.Namespace) -> None:
    """Run some cases and write what they left, normal, below DIR (the environment is set by `run`)."""
    for module in PRELOADED:
        with contextlib.suppress(ImportError):
            __import__(module)
    tree, out, known = args.tree.resolve(), args.out.resolve(), cases()[0]
    for name in args.only:
        began = time.time()
        folder = out / "work" / name.replace("/", "-")
        codes = run_case(known[name], folder, tree, args)
        places = {str(folder): "<work>", str(out): "<out>", str(args.assets): "<assets>", str(tree): "<tree>"}
        files = {}
        for file, text in normal_forms(folder, known[name].keep, places):
            target = out / "normal" / folder.name / f"{file}.txt"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
            kind = "bookkeeping" if matches(file, BOOKKEEPING) else "numbers"
            files[file] = {"class": kind, "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}
        result = {"exit": codes, "files": files}
        (out / "normal" / f"{folder.name}.json").write_text(json.dumps({name: result}))
        print(f"{name:28} exit {codes}  {len(files)} files  {time.time() - began:.1f} s", flush=True)


def run(args: argparse.Namespace) -> int:
    """Run cases in as many workers as `--jobs` says, then put their results together."""
    known, out = cases()[0], args.out.resolve()
    chosen = [name for name in known if not args.only or any(fnmatch.fnmatch(name, o) for o in args.only)]
    (out / "work").mkdir(parents=True, exist_ok=True)
    for name in chosen:
        shutil.rmtree(out / "normal" / name.replace("/", "-"), ignore_errors=True)
        (out / "normal" / f"{name.replace('/', '-')}.json").unlink(missing_ok=True)
    (out / "normal").mkdir(exist_ok=True)
    shared = out / "work" / "shared"  # recipes and tasks look for scans in ../shared
    shared.unlink(missing_ok=True)
    shared.symlink_to(args.assets / "shared")
    places = os.pathsep.join([str(args.tree.resolve() / "src"), str(args.tree.resolve())])
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": places, "PYTHONPYCACHEPREFIX": str(out / "work/pycache")}
    parts = [chosen[n :: args.jobs] for n in range(args.jobs)]
    head = [sys.executable, str(HERE), "worker", str(args.tree), "--out", str(out), "--assets", str(args.assets)]
    began = os.times()
    running = [subprocess.Popen([*head, "--only", *part], env=environment) for part in parts if part]
    codes = [process.wait() for process in running]
    spent = os.times()
    results: dict[str, Any] = {}
    for name in known:  # those of earlier runs with --only stay
        place = out / "normal" / f"{name.replace('/', '-')}.json"
        results |= json.loads(place.read_text()) if place.is_file() else {}
    (out / "digests.json").write_text(json.dumps(results, indent=1, sort_keys=True))
    cpu = spent.children_user + spent.children_system - began.children_user - began.children_system
    print(f"{len(chosen)} cases, {cpu:.0f} CPU seconds, written: {out / 'digests.json'}")
    return int(any(codes))


# ---------------------------------------------------------------- normal forms


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, p) or fnmatch.fnmatch(name.rsplit("/", 1)[-1], p) for p in patterns)


def normal_forms(folder: Path, keep: tuple[str, ...], places: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Name and normal form of each file of a case."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not path.is_file() or matches(name, IGNORED):
            continue
        if matches(name, (*keep, "*.stdout")):
            yield name, normal(path.name, path.read_bytes(), places)


def normal(name: str, data: bytes, places: Mapping[str, str]) -> str:
    """A file as text, without what is volatile; what is binary as hashes, or as "binary" where its bytes may vary."""
    suffix = Path(name).suffix
    if suffix == ".gz":
        return normal(name.removesuffix(".gz"), gzip.decompress(data), places)
    if suffix in BINARY:
        return BINARY[suffix](data)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return "binary\n"
    whole = suffix == ".json" or (suffix == ".stdout" and is_json(text))
    lines = [text] if whole else text.splitlines()
    return "\n".join(normal_text(line, places) for line in lines) + "\n"


def normal_text(text: str, places: Mapping[str, str]) -> str:
    """A line (or a whole JSON) without volatile keys, paths, times."""
    if text.lstrip()[:1] in ("{", "[") and is_json(text):
        text = json.dumps(without_volatile(json.loads(text)), indent=1, ensure_ascii=False)
    text = text.rsplit("\r", 1)[-1]
    for place, name in places.items():
        text = text.replace(place, name)
    for pattern, stands in VOLATILE_TEXT:
        text = re.sub(pattern, stands, text)
    return text


def is_json(text: str) -> bool:
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(text) is not ...
    return False


def without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_volatile(v) for k, v in value.items() if k not in VOLATILE_KEYS}
    return [without_volatile(v) for v in value] if isinstance(value, list) else value


def tensors(data: bytes) -> str:
    size = int.from_bytes(data[:8], "little")
    head, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    head.pop("__metadata__", None)
    return "".join(
        f"{name} {of['dtype']} {of['shape']} {hashlib.sha256(body[slice(*of['data_offsets'])]).hexdigest()[:16]}\n"
        for name, of in sorted(head.items())
    )


def pixels(data: bytes) -> str:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return f"{image.mode} {image.size} {hashlib.sha256(image.tobytes()).hexdigest()[:16]}\n"


def rows(data: bytes) -> str:
    from pyarrow import parquet

    return json.dumps(parquet.read_table(io.BytesIO(data)).to_pylist(), indent=1, default=repr) + "\n"


BINARY: dict[str, Callable[[bytes], str]] = {".safetensors": tensors, ".parquet": rows}
BINARY |= dict.fromkeys((".png", ".jpg", ".jpeg"), pixels)

# ---------------------------------------------------------------- comparing


def compare(args: argparse.Namespace) -> int:
    """Print what differs, numbers apart from bookkeeping; 1 if anything does."""
    one, other = (json.loads((folder / "digests.json").read_text()) for folder in (args.one, args.other))
    told: dict[str, list[str]] = {"numbers": [], "bookkeeping": []}
    names = [n for n in sorted(one | other) if not args.only or any(fnmatch.fnmatch(n, o) for o in args.only)]
    for name in names:
        if name not in one or name not in other:
            told["numbers"].append(f"{name}: only in {args.one if name in one else args.other}")
            continue
        a, b = one[name], other[name]
        if a["exit"] != b["exit"]:
            told["numbers"].append(f"{name}: exit codes {a['exit']} -> {b['exit']}")
        for file in sorted(a["files"].keys() | b["files"].keys()):
            left, right = a["files"].get(file), b["files"].get(file)
            if left == right:
                continue
            lines = told[(left or right)["class"]]
            if left is None or right is None:
                lines.append(f"{name}: {file}: only in {args.one if left else args.other}")
                continue
            lines.append(f"{name}: {file} differs")
            texts = [
                (folder / "normal" / name.replace("/", "-") / f"{file}.txt").read_text().splitlines()
                for folder in (args.one, args.other)
            ]
            diff = [d[:200] for d in difflib.unified_diff(*texts, lineterm="", n=0)][2:]
            lines += [f"    {d}" for d in diff[: args.lines]]
            lines += [f"    ... {len(diff) - args.lines} lines more"] if len(diff) > args.lines else []
    for kind, lines in told.items():
        print(f"{kind}: {sum(not line.startswith('    ') for line in lines)} differences in {len(names)} cases")
        print("".join(f"  {line}\n" for line in lines), end="")
    return int(any(told.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "worker"):
        sub = commands.add_parser(name)
        sub.add_argument("tree", type=Path)
        sub.add_argument("--out", type=Path, required=True)
        sub.add_argument("--assets", type=Path, help="what the cases start from; beside DIR unless told")
        sub.add_argument("--only", nargs="+", default=[], help="cases, also as own/*")
        sub.add_argument("--jobs", type=int, default=1, help="cases side by side")
    sub = commands.add_parser("compare")
    sub.add_argument("one", type=Path)
    sub.add_argument("other", type=Path)
    sub.add_argument("--only", nargs="+", default=[], help="cases, also as own/*")
    sub.add_argument("--lines", type=int, default=12, help="of each file's diff")
    args = parser.parse_args()
    if args.command == "compare":
        return compare(args)
    args.assets = (args.assets or args.out.resolve().parent / "assets").resolve()
    if args.command == "run":
        return run(args)
    worker(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
