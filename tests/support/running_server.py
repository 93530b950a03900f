"""A server on a free port of this machine, over real HTTP, and what its clients send."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from openai import OpenAI
from PIL import Image

from relook.serve.app import create_app
from relook.serve.settings import ServeSettings


@contextmanager
def running(app: Any, **config: Any) -> Iterator[str]:
    """Serve an app while the block runs; yields the address, without a slash at its end."""
    config = {"log_config": None, "access_log": False, "timeout_graceful_shutdown": 2, "lifespan": "off", **config}
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, **config))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended before it had begun"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


class Served:
    """A running server: its address, its engine and model (where there is one), and OpenAI's own client for it."""

    def __init__(self, url, engine):
        self.url, self.engine, self.vlm = url, engine, getattr(engine, "vlm", None)
        self.client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self.model = self.client.models.list().data[0].id

    def ask(self, messages, **fields):
        """A chat completion; `messages` may be (image, question)."""
        if isinstance(messages, tuple):
            messages = [user(*messages)]
        return self.client.chat.completions.create(model=self.model, messages=messages, **fields)


@contextmanager
def serving(engine, **settings) -> Iterator[Served]:
    """Serve an engine while the block runs."""
    with running(create_app(engine, ServeSettings.model_validate(settings))) as url:
        served = Served(url, engine)
        yield served
        served.client.close()


def data_url(image: Image.Image) -> str:
    """An image as clients send it."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def opened(url: str) -> Image.Image:
    """The image of a data URL, by means of Pillow alone."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def user(images, question=None):
    """A user's message about one image, or several."""
    images = [images] if isinstance(images, Image.Image) else images
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": "user", "content": [*parts, *([] if question is None else [{"type": "text", "text": question}])]}
