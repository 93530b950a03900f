"""A server with the page and canned answers, for what a browser shows; `served(app)` runs any app on a free port.

The words of a question choose what happens: "refuse" 400, "busy" 429, "break" an error in the middle of the answer,
"zoom" a second look inside the first,
"vanish" an end without one, "wait" an answer that stops after three letters until the client goes, "nowhere" a look
that was not taken, "crops" a crop in the text, "warn" another warning, "pieces" events cut anywhere. Every request's
body is kept in `app.state.asked`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image

from relook.regions import cells_to_box, widen
from relook.serve import page

GRID, CELLS = 8, (5, 6, 6, 6)
WARNING = "the canned model reads nothing; its answers mean nothing."
USAGE = {"lm_positions": 1234, "sequence_length": 600, "vision_patches": 640, "generated_tokens": 7,
         "cached_tokens": 0, "seconds": {"vision": 0.1, "decode": 0.2}}  # fmt: skip


def canned_app(
    answer: str = "164", looks: tuple[str, ...] = ("region", "clip"), key: str | None = None, **model
) -> FastAPI:
    app = FastAPI()
    page.mount(app)
    app.state.asked = []

    def refused(status: int, message: str, **headers: str) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "type": "x", "code": None}}, status, headers)

    def barred(request: Request) -> bool:
        return key is not None and request.headers.get("authorization") != f"Bearer {key}"

    @app.get("/v1/models", response_model=None)
    def models(request: Request):
        if barred(request):
            return refused(401, "the API key is wrong" if "authorization" in request.headers else "a key is needed")
        about = {"looks": looks, "grid": GRID, "domain": None, "warnings": [WARNING], **model}
        return {"object": "list", "data": [{"id": "canned", "object": "model", "relook": about}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request):
        body = json.loads(await request.body())
        app.state.asked.append(body)
        question = _question(body)
        if barred(request):
            return refused(401, "the API key is wrong")
        if "refuse" in question:
            return refused(400, f"the question {question!r} is refused; ask another")
        if "busy" in question:
            return refused(429, "32 requests are waiting.", **{"Retry-After": "7"})
        if not body.get("stream"):
            choices = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}]
            return {"object": "chat.completion", "id": "1", "created": 0, "model": "canned", "choices": choices}
        stream = _stream(body, question, answer)
        return StreamingResponse(_in_pieces(stream) if "pieces" in question else stream, media_type="text/event-stream")

    return app


def _question(body: dict) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def opened(body: dict) -> Image.Image:
    """The image of the first message."""
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _look(body: dict) -> dict | None:
    wanted, image = body.get("relook", {}), opened(body)
    empty = {"kind": "clip", "cells": None, "crop": None, "map": None, "attention": None, "problem": None}
    if wanted.get("look") == "none":
        return None
    if "nowhere" in _question(body):
        return {**empty, "kind": "region", "box": None, "problem": "the region names no cells"}
    if wanted.get("look") == "clip":
        heat = Image.linear_gradient("L").resize(image.size)
        colored = Image.merge("RGBA", (heat.point(lambda v: 255), heat, heat.point(lambda v: 0), heat))
        return {**empty, "box": [0, 0, *image.size], "map": _png(colored), "crop": _png(image)}
    cells = tuple(wanted.get("region", CELLS))
    box = cells_to_box(widen(cells, 1, GRID), image.size, GRID)
    frame = (0, 0, *image.size)
    return {**empty, "kind": "region", "cells": cells, "frame": frame, "box": box, "crop": _png(image.crop(box))}


async def _stream(body: dict, question: str, answer: str):
    def chunk(delta: dict, finish: str | None = None, **more) -> str:
        choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
        said = {"object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(said, ensure_ascii=False)}\n\n"

    look, image = _look(body), opened(body)
    looks = [look] if look else []
    if look and "zoom" in question:
        left, top, right, bottom = look["box"]
        w, h = right - left, bottom - top  # cells 0,4 to 3,7 of the view before: its lower left quarter
        box = (left, top + h // 2, left + w // 2, bottom)
        looks.append({**look, "cells": (0, 4, 3, 7), "frame": look["box"], "box": box, "crop": _png(image.crop(box))})
    yield chunk({"role": "assistant", "content": ""})
    if look:
        yield chunk({"content": "Let me see. "})
        for each in looks:
            yield chunk({}, relook={"look": each})
    if look and "crops" in question:
        yield chunk({"content": f"![region look]({look['crop']})\n\n"})
    if "break" in question:
        yield f"data: {json.dumps({'error': {'message': 'the deadline of 120 s has passed'}})}\n\n"
        return
    for i in range(0, len(answer), 3):
        yield chunk({"content": answer[i : i + 3]})
        await asyncio.sleep(60 if "wait" in question else 0.01)
    if "vanish" in question:
        return
    size = {"width": image.width, "height": image.height}
    warnings = [WARNING, "the image was turned."] if "warn" in question else [WARNING]
    turns = [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    kept = {"looks": [{"kind": each["kind"], "cells": each["cells"], "turn": 0} for each in looks]}
    yield chunk({"relook": kept}, "stop", relook={"looks": looks, "image": size, "grid": GRID, "warnings": warnings,
                                    "usage": USAGE, "transcript": turns})  # fmt: skip
    yield "data: [DONE]\n\n"


async def _in_pieces(stream):
    """The events with other line ends and comments between, cut without regard to lines and letters."""
    async for event in stream:
        data = (": waiting\n\n" + event).replace("\n", "\r\n").encode()
        for cut in range(0, len(data), 1 + len(data) // 5):
            yield data[cut : cut + 1 + len(data) // 5]
            await asyncio.sleep(0.002)


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of `app`, run by uvicorn in a thread on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server has not started")
        threading.Event().wait(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


if __name__ == "__main__":
    with served(canned_app()) as address:
        print(address, flush=True)
        threading.Event().wait()
