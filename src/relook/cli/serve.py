"""`relook serve`: a model behind OpenAI's API."""

import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from relook.cli.common import SERVED_HELP, BaseUrl, Device, Dialect, Dtype, Processor, open_model


def serve(
    model: Annotated[str | None, Argument(metavar="MODEL", help=SERVED_HELP)] = None,
    host: Annotated[
        str, Option(metavar="HOST", help="Address to listen on; the default is reached from this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, metavar="PORT", help="0: a free one.")] = 8000,
    name: Annotated[str | None, Option(metavar="NAME", help="What the API calls the model.")] = None,
    keys: Annotated[
        Path | None,
        Option(metavar="FILE", help="API keys, one a line; default: RELOOK_API_KEYS. Without any, everybody may ask."),
    ] = None,
    origins: Annotated[
        list[str] | None, Option("--origin", metavar="URL", help="Web pages elsewhere that may ask (CORS).")
    ] = None,
    image_hosts: Annotated[
        list[str] | None, Option("--image-host", metavar="HOST", help="Fetch images from this host; '*': from any.")
    ] = None,
    server_names: Annotated[
        list[str] | None,
        Option("--server-name", metavar="HOST", help="Name by which a proxy passes requests on to a loopback address."),
    ] = None,
    max_tokens: Annotated[
        int, Option(min=1, metavar="N", help="Tokens of an answer where a request does not say.")
    ] = 256,
    rows: Annotated[int, Option(min=1, metavar="N", help="Requests answered side by side.")] = 8,
    waiting: Annotated[int, Option(min=0, metavar="N", help="Requests that may wait for a place.")] = 64,
    cache: Annotated[int, Option(min=0, metavar="MB", help="Memory for conversations that go on.")] = 256,
    seconds: Annotated[float, Option(min=0.1, metavar="S", help="Time for a request.")] = 120,
    body: Annotated[int, Option(min=1, metavar="MB", help="Size of a request.")] = 32,
    context: Annotated[
        int | None, Option(min=1, metavar="N", help="Tokens of a conversation; default: the model's own.")
    ] = None,
    pixels: Annotated[int, Option(min=1, metavar="N", help="Pixels of a request's images together.")] = 64_000_000,
    limits: Annotated[
        list[str] | None,
        Option("--limit", metavar="NAME=N", help="Another limit, such as images=32 (docs/safety.md names them)."),
    ] = None,
    drain: Annotated[float, Option(min=0, metavar="S", help="Time to finish answers on SIGTERM.")] = 30,
    crops_in_text: Annotated[
        bool, Option("--crops-in-text", help="Show crops in the answer's text, for chat front ends.")
    ] = False,
    collect: Annotated[
        Path | None, Option(metavar="FILE", help="Append what is answered by hand on the page: JSON lines.")
    ] = None,
    queue: Annotated[
        Path | None, Option(metavar="FILE", help="With --collect: questions to answer, the least sure first.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    base_url: BaseUrl = None,
    processor: Processor = None,
    dialect: Dialect = None,
) -> None:
    """Serve a model over HTTP, in the shape of OpenAI's API: chat completions at /v1, documentation at /docs.

    SIGTERM or Ctrl-C ends it: answers that have begun are finished, new requests get status 503.
    """
    from relook.errors import UserError

    try:
        from relook.serve.collect import collecting
        from relook.serve.run import bind, serve
        from relook.serve.security import LOOPBACK, read_keys
        from relook.serve.settings import ServeSettings
    except ImportError as error:
        raise UserError(f"relook serve needs {error.name}: pip install 'relook[serve]'") from error
    from relook.io import validate

    security: dict[str, Any] = {"keys": read_keys(keys), "origins": origins or ()}
    security["hosts"] = (*LOOPBACK, *(name.lower() for name in server_names or ())) if host in LOOPBACK else ("*",)
    stated = {
        "name": name,
        "max_tokens": max_tokens,
        "crops_in_text": crops_in_text,
        "limits": {
            "seconds": seconds,
            "body_bytes": body * 2**20,
            "pixels": pixels,
            "context_tokens": context,
            **dict(each.partition("=")[::2] for each in limits or ()),
        },
        "fetch": {"hosts": image_hosts or ()},
        "security": security,
    }
    settings = validate(ServeSettings, stated, "serve", "option")
    bound = bind(host, port)
    if host not in LOOPBACK and not settings.security.keys:
        more = "" if collect is None else f", and write to {collect}"
        print(f"relook: whoever reaches {host} may ask{more}; --keys FILE asks for a key", file=sys.stderr)

    from relook.perceive.local import LocalEngine

    with collecting(collect, queue) as collection:
        if collection and (left := collection.left_out):
            print(f"relook: {len(left)} records of the queue left out; the first: {left[0]}", file=sys.stderr)
        vlm = open_model(model, base_url, processor, dialect, device=device, dtype=dtype)
        if base_url is None:
            vlm.context_limit = settings.limits.context_tokens
            engine = LocalEngine(vlm, max_rows=rows, max_waiting=waiting, cache_bytes=cache * 2**20)
        else:  # which has its own limits and cache
            engine = vlm.engine
            engine.max_rows = rows + waiting
        for warning in engine.warnings:
            print(f"relook: {warning}", file=sys.stderr)
        serve(engine, settings, bound, drain, collection)
