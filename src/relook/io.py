"""Files written whole or not at all, JSON lines, YAML checked against a schema, and seeded random generators.

A whole file or folder goes through `replacing*`: written aside (`NAME.part` in the same folder) and renamed at the end,
so that a reader never sees half of it.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from relook.errors import RelookError, UserError

if TYPE_CHECKING:
    import numpy as np
    from filelock import FileLock
    from pydantic import BaseModel

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what writing to a full disk, or beyond a quota or limit, raises

# -- writing


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[str]]:
    """A text file written aside (`NAME.part` in the same folder) and renamed when the block ends without an error.

    Half a surrogate pair, which UTF-8 has no bytes for, is written as JSON escapes it: `\\ud83d`.
    """
    with (
        replacing_file(path) as aside,
        aside.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
    ):
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """The place aside of a file of any kind; it is renamed when the block ends without an error, else removed.

    Raises:
        UserError: there can be no file of that name.
        RelookError: the disk is full; what stood there before still does.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".part")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.open("wb").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    try:
        yield aside
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise RelookError(
                f"{path}: could not be written ({error.strerror}); make room and run the command again"
            ) from error
        raise


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A new folder written aside (`NAME.part`), in the place of `path` when the block ends without an error.

    A folder that stood at `path` is removed only then. Leftovers of a run that was killed are removed first.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        shutil.rmtree(path, ignore_errors=True)
        os.replace(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def locked_folder(folder: str | Path) -> Iterator[None]:
    """Hold `folder` (made if need be) for this process while the block runs; the lock dies with its process.

    Raises:
        UserError: another process holds it.
    """
    folder = Path(folder)
    lock = _acquired(folder / ".lock", folder)
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):  # a run that was refused leaves no folder
            if [path.name for path in folder.iterdir()] == [".lock"]:
                (folder / ".lock").unlink()
                folder.rmdir()


@contextmanager
def locked_file(path: str | Path) -> Iterator[None]:
    """As `locked_folder`, of a file that lines are appended to; the lock is `.NAME.lock` beside it.

    Raises:
        UserError: another process holds it.
    """
    path = Path(path)
    lock = _acquired(path.with_name(f".{path.name}.lock"), path)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            Path(lock.lock_file).unlink()
        lock.release()


def _acquired(place: Path, path: Path) -> FileLock:
    from filelock import FileLock, Timeout

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{path}: another run is writing here; wait for its end, or choose another place") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    return lock


# -- what a run is about


def content_digest(path: str | Path, *patterns: str) -> str | None:
    """Digest of a file, or of the files in a folder that match `patterns` (all of them by default); None: not there.

    Of a file over a GiB: of its size and 64 blocks spread over it.
    """
    path = Path(path)
    names = sorted({one for pattern in patterns or ("*",) for one in path.rglob(pattern)}) if path.is_dir() else [path]
    found = hashlib.sha256()
    for name in (name for name in names if name.is_file()):
        size = name.stat().st_size
        found.update(f"{name.relative_to(path)} {size}".encode())
        with name.open("rb") as file:
            for at in range(0, size, max(2**24, size // 64) if size > 2**30 else 2**24):
                file.seek(at)
                found.update(file.read(2**24))
    return found.hexdigest()[:16] if path.exists() else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any], name: str = "") -> list[str]:
    """What differs, by dotted names; what is None now is not known, and does not count.

    >>> differences({"lr": 1, "data": {"path": "a"}}, {"lr": 2, "data": {"path": "a"}})
    ['lr (1, now 2)']
    """
    found = []
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{name}{key}.")
        elif old != new and (new is not None or key not in now):
            said = [_short(side[key]) if key in side else "not given" for side in (before, now)]
            found.append(f"{name}{key} ({said[0]}, now {said[1]})")
    return found


# -- JSON lines


def append_lines(path: str | Path, entries: Iterable[Any]) -> None:
    """Append entries to a file of JSON lines, after whatever a killed writer left; on the disk when this returns."""
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    with Path(path).open("a+b") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
            text = "\n" + text
        file.write(text.encode("utf-8", "backslashreplace"))  # a lone surrogate as JSON writes it: \udc80
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: str | Path) -> list[Any]:
    """The entries of a file of JSON lines, without lines that a write left unfinished; none where there is no file."""
    path, found = Path(path), []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


# -- YAML and names


def checkpoint_name(name: str | Path) -> str:
    """The last part of a folder or hub id; of a snapshot in the hub's cache, the repository's name.

    >>> checkpoint_name("/cache/models--rp-yu--Qwen2-VL-2b-VPT-Det/snapshots/0a1b")
    'Qwen2-VL-2b-VPT-Det'
    """
    path = Path(name)
    path = path.resolve() if path.exists() else path  # "." and links have the name of what they are
    snapshot = path.parent.name == "snapshots"
    return path.parent.parent.name.rpartition("--")[2] if snapshot else path.name


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file.

    Raises:
        UserError: it cannot be read, or is not YAML.
    """
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def nearest(name: str, known: Iterable[str], cutoff: float = 0.4) -> str:
    """A hint for an unknown name: the nearest known one, or all of them.

    >>> nearest("lr_sched", ["lr", "lr_schedule"])
    "did you mean 'lr_schedule'?"
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else f"expected some of {', '.join(known)}"


def validate(schema: type[BaseModel], raw: Mapping[str, Any], where: str, noun: str = "key") -> Any:
    """`schema(**raw)` with errors for people: one line, the first problem, the nearest valid key.

    Raises:
        UserError: `raw` does not fit.
    """
    from pydantic import ValidationError

    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        found = error.errors()  # an unknown key comes first: it may be the one that is missing, misspelt
        problem = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
        key = ".".join(_names(raw, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            valid = list(_siblings(schema, problem["loc"]))
            near = difflib.get_close_matches(str(problem["loc"][-1]), valid, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"valid {noun}s are {', '.join(valid)}."
            raise UserError(f"{where}: unknown {noun} {key!r}; {hint}") from error
        message = problem["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}: {key or 'recipe'}: {message} (seen: {_short(problem.get('input'))})") from error


def _names(raw: Any, loc: Sequence[int | str]) -> Iterator[str]:
    """The way to `loc` as an override would say it: an entry of a list by its name, where it has one."""
    for part in loc:
        listed = isinstance(part, int) and isinstance(raw, Sequence) and part < len(raw)
        raw = raw[part] if listed or (isinstance(raw, Mapping) and part in raw) else None
        yield str(raw["name"] if isinstance(part, int) and isinstance(raw, Mapping) and "name" in raw else part)


def _siblings(schema: type[BaseModel], loc: Sequence[int | str]) -> Iterator[str]:
    """The keys that would have been valid where `loc` points."""
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        inner = [a for a in _models_in(schema.model_fields[str(part)].annotation)]
        if not inner:
            return
        schema = inner[0]
    yield from schema.model_fields


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    from typing import get_args

    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# -- random numbers


def rng(*key: int | str) -> np.random.Generator:
    """A generator that depends on the key alone, not on call order, process or platform.

    Keys of one use should be of one length: numpy takes (1, 2) and (1, 2, 0) for the same seed.

    >>> rng(1, "cards", 7).integers(1000) == rng(1, "cards", 7).integers(1000)
    True
    """
    import zlib

    import numpy as np

    words = [zlib.crc32(part.encode()) if isinstance(part, str) else int(part) for part in key]
    return np.random.default_rng(np.random.SeedSequence(words))
