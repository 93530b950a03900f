"""An engine behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, or relook's own server.

Regions are taken here (`asking`): the model calls one, the crop is made from the original image and sent back as an
image of the user's, and the model goes on. Each turn is a request with the whole conversation, of which the server
keeps what it has seen (prefix caching).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, Thread, Timer
from typing import Any

from relook.errors import RelookError, UserError
from relook.interventions import INTERVENTIONS
from relook.looks import LOOKS
from relook.regions import GRID
from relook.trace import Answer

from ..engine import REGIONS, DeadlineExceeded, EngineBusy, EngineClosed, Request, Running
from ..vlm import domain_warnings
from .asking import Asking
from .dialects import DIALECTS, Views


class Refused(UserError):
    """The server says that a request is wrong: shown as a failure of the work, and a server's own 400."""

    exit_code = 1


class OpenAIEngine:
    """Answers requests with a model behind an endpoint (`engine.Engine`).

    Args:
        url: of the API, "http://127.0.0.1:8000/v1".
        model: its id there; None where the server has one.
        processor: the relook model (a name, folder or hub id) that the server's was exported from: its grid, views and
            prompts hold. Not needed where the id names it, nor for other dialects.
        dialect: a row of `dialects.DIALECTS`; None: found by `processor`, the server and the model's id.
        api_key: default RELOOK_API_KEY, else OPENAI_API_KEY of the environment.
        timeout: seconds that the server may be silent.
        retries: of a request that fails before its answer begins.
        max_rows: requests under way at once; `submit` refuses more with `EngineBusy`.

    Raises:
        UserError: several models and none chosen, one that is not there, one whose dialect is not known.
        RelookError: the server cannot be reached, or refuses.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        processor: str | Path | None = None,
        dialect: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 2,
        max_rows: int = 256,
    ):
        try:
            import openai
        except ImportError:
            raise UserError(
                "an endpoint needs the openai client, which is not installed; pip install 'relook[endpoint]'"
            ) from None
        if dialect is not None and dialect not in DIALECTS:
            raise UserError(f"dialect {dialect!r} is unknown; expected one of {', '.join(DIALECTS)}")
        self.url, self.timeout, self.max_rows = url.rstrip("/"), timeout, max_rows
        key = api_key or os.environ.get("RELOOK_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none"
        self.client = openai.OpenAI(api_key=key, base_url=self.url, timeout=timeout, max_retries=retries)
        entry = self._entry(model)
        self.name: str = entry["id"]
        self.own: Mapping[str, Any] = entry.get("relook") or {}  # what relook's server says of its model
        self.dialect, self.processor, self.domain = self._manner(entry, processor, dialect)
        self.context: int | None = self.own.get("context_window") or entry.get("max_model_len")
        self._lock, self._closed, self._rows = Lock(), False, set[Running]()
        self._counts = dict.fromkeys(("requests", "generated_tokens", "cached_tokens", "looks"), 0.0)

    @property
    def looks(self) -> list[str]:
        takes = self.processor.looks
        return list(takes) if self.dialect == "relook" else [look for look in takes if not LOOKS[look].reencodes]

    @property
    def interventions(self) -> tuple[str, ...]:
        """Rows of `relook.interventions` that can be made here: relook's server has views and history of its own, and
        where regions nest it counts cells in what it was asked for."""
        if self.dialect != "relook":
            return tuple(INTERVENTIONS)
        return ("blank", "other", *(["moved"] if self.processor.region_of == "whole" else []))

    @property
    def grid(self) -> int:
        return self.processor.grid_size

    @property
    def regions(self) -> dict[str, Any]:
        return {name: getattr(self.processor, name) for name in REGIONS}

    @property
    def warnings(self) -> list[str]:
        if self.dialect == "relook":
            return list(self.own.get("warnings") or ())
        left = ", ".join(look for look in self.processor.looks if look not in self.looks)
        said = f"{self.name} can also look by {left}, which takes relook's own server (relook serve)."
        return [*domain_warnings(self.name, self.domain), *([said] if left else [])]

    def submit(self, request: Request, timeout: float | None = None) -> Running:
        """See `engine.Engine`."""
        if self._closed:
            raise EngineClosed("the engine takes no more requests; open the endpoint again")
        if (rows := len(self._rows)) >= self.max_rows:
            raise EngineBusy(f"{rows} questions are under way; ask again in a second", 1.0)
        asking = Asking(self, request)
        running = Running(asking.stop)

        def expire() -> None:
            running.put(DeadlineExceeded(f"not finished in {timeout:g} s; ask for less"))
            asking.stop()

        timer = Timer(timeout or 0, expire)
        timer.daemon = True

        def work() -> None:
            try:
                for event in asking.events():
                    running.put(event)
            except Exception as error:
                running.put(error)
            timer.cancel()
            with self._lock:
                self._rows.discard(running)

        with self._lock:
            self._rows.add(running)
        if timeout is not None:
            timer.start()
        Thread(target=work, name="relook endpoint", daemon=True).start()
        return running

    def count(self, answer: Answer) -> None:
        """Called with each answer, for `stats`."""
        usage, taken = answer.usage, sum(look.problem is None for look in answer.looks)
        with self._lock:
            for name, value in zip(self._counts, (1, usage.generated_tokens, usage.cached_tokens, taken), strict=True):
                self._counts[name] += value

    def stats(self) -> dict[str, float]:
        """See `engine.Engine`; what waits inside the server is not known here."""
        with self._lock:
            return {"rows": float(len(self._rows)), **{f"{name}_total": n for name, n in self._counts.items()}}

    def close(self, drain: float = 0) -> None:
        """See `engine.Engine`."""
        self._closed, end = True, time.monotonic() + drain
        while self._rows and time.monotonic() < end:
            time.sleep(0.01)
        for running in list(self._rows):
            running.put(EngineClosed("the engine was closed"))
            running.on_cancel()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _entry(self, model: str | None) -> dict[str, Any]:
        """The model as the server lists it; as it is named where the server has no list (`transformers serve`)."""
        from openai import InternalServerError, NotFoundError

        with self.errors():
            try:
                found = {each.id: each.model_dump() for each in self.client.models.list().data}
            except (NotFoundError, InternalServerError):
                if model is None:
                    raise
                found = {}
        if model is not None and not found:
            return {"id": model}
        if model is None and len(found) == 1:
            return next(iter(found.values()))
        if model not in found:
            has = ", ".join(map(repr, found)) or "none"
            said = f"has several models ({has}); name one" if model is None else f"has no model {model!r}; it has {has}"
            raise UserError(f"{self.url} {said}")
        return found[model]

    def _manner(self, entry: Mapping[str, Any], processor: Any, dialect: str | None) -> tuple[str, Any, str | None]:
        """The dialect, the processor or what stands for it, and the domain of a small model."""
        if dialect is None and processor is None:
            named = [n for n, row in DIALECTS.items() if row.models and re.search(row.models, self.name, re.IGNORECASE)]
            dialect = "relook" if self.own else named[0] if named else None
        if dialect == "relook" and not self.own:
            raise UserError(f"{self.url} is no server of relook's; leave dialect out, or choose another")
        if dialect is not None and dialect != "tokens":
            own = self.own if dialect == "relook" else {}
            views = Views(DIALECTS[dialect], own.get("grid", GRID), own)
            return dialect, views, self.own.get("domain")
        return ("tokens", *self._processor(entry, processor))

    def _processor(self, entry: Mapping[str, Any], given: Any) -> tuple[Any, str | None]:
        """The processor of a model with control tokens, and its domain."""
        from relook.model.loading import load_processor, read_json, resolve, shipped_models

        ids = [] if given else [str(entry[key]) for key in ("id", "root") if entry.get(key)]
        named = [n for n in ids if n in shipped_models() or (Path(n) / "processor_config.json").is_file()]
        if not given and not named:
            others = ", ".join(name for name in DIALECTS if name not in ("tokens", "relook"))
            raise UserError(
                f"how {self.name!r} at {self.url} looks is not known; give processor=NAME (--processor) for a relook "
                f"model, or dialect= (--dialect) {others}"
            )
        folder = resolve(given or named[0])
        processor = load_processor(folder)
        if "region" not in processor.looks:
            raise UserError(
                f"{folder.name} has no region look, and an endpoint offers no other; load it in this process"
            )
        return processor, read_json(folder / "config.json").get("domain")

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What the client raises, as a sentence; the key is in none."""
        import openai

        try:
            yield
        except openai.APITimeoutError as error:
            raise RelookError(
                f"{self.url} said nothing for {self.timeout:g} s; ask for less, or wait longer"
            ) from error
        except openai.APIConnectionError as error:
            why = error.__cause__ or error
            raise RelookError(f"{self.url} cannot be reached ({why}); check the address and the server") from error
        except openai.RateLimitError as error:
            seconds = error.response.headers.get("retry-after", "")
            wait = float(seconds) if seconds.isdigit() else 1.0
            raise EngineBusy(f"{self.url} is busy ({_words(error)}); ask again later", wait) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            said = f"{self.url} refuses the key ({_words(error)}); set RELOOK_API_KEY or OPENAI_API_KEY"
            raise RelookError(said) from error
        except openai.APIStatusError as error:
            kind = Refused if error.status_code in (400, 413, 422) else RelookError
            raise kind(f"{self.url} answers {error.status_code}: {_words(error)}") from error
        except openai.OpenAIError as error:  # also one that comes in the middle of a stream
            raise RelookError(f"{self.url} failed: {_words(error)}") from error
        except (ValueError, TypeError, AttributeError, KeyError) as error:  # a reply in no shape of the API
            raise RelookError(f"the reply of {self.url} cannot be read ({type(error).__name__}: {error})") from error


def _words(error: Exception) -> str:
    """What the server says, without the body around it."""
    body = getattr(error, "body", None)
    said = body.get("message") or body.get("detail") if isinstance(body, Mapping) else None
    return " ".join(str(said or getattr(error, "message", None) or error).split())[:300]
