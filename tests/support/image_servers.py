"""Local HTTP servers that hand out images, or misbehave, as the tests of fetching need them."""

from __future__ import annotations

import io
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def png(size=(40, 30), color=(200, 30, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


class ImageHandler(BaseHTTPRequestHandler):
    """The path says what happens; `server.seen` has (path, Host header) of every request."""

    def do_GET(self):
        self.server.seen.append((self.path, self.headers["Host"]))
        word, _, rest = self.path.lstrip("/").partition("/")
        with suppress(ConnectionError):  # the client has had enough
            getattr(self, f"send_{word}")(rest)

    def send(self, status, data=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def send_image(self, _):
        self.send(200, png(), Content_Type="image/png")

    def send_text(self, _):
        self.send(200, b"<html><body>sign in, please</body></html>", Content_Type="image/png")

    def send_to(self, address):
        self.send(302, Location=address)

    def send_loop(self, number):
        self.send(302, Location=f"/loop/{int(number) + 1}")

    def send_status(self, number):
        self.send(int(number), png())

    def send_endless(self, _):
        self.send_response(200)
        self.end_headers()
        while not self.server.ending.is_set():
            self.wfile.write(b"\0" * 65536)

    def send_drip(self, _):
        self.send_response(200)
        self.end_headers()
        while not self.server.ending.wait(0.05):
            self.wfile.write(b"\x89")
            self.wfile.flush()

    def send_silence(self, _):
        self.server.ending.wait(60)

    def send_half(self, _):
        self.send(200, png()[:40], Content_Length=len(png()))

    def send_gzip(self, _):
        import gzip

        self.send(200, gzip.compress(png()), Content_Encoding="gzip")

    def send_garbage(self, _):
        self.wfile.write(b"\x00\x01 this is not HTTP\r\n\r\n")

    def log_message(self, *_):
        pass


class ImageServer(ThreadingHTTPServer):
    """Serves in a thread until the block ends."""

    daemon_threads = True

    def __init__(self, host="127.0.0.1", tls=None):
        super().__init__((host, 0), ImageHandler)
        self.seen, self.ending, self.connections = [], threading.Event(), 0
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def get_request(self):
        self.connections += 1
        return super().get_request()

    def handle_error(self, request, client_address):
        pass

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.ending.set()
        self.shutdown()
        self.server_close()
