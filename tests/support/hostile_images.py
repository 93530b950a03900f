"""Image files that a server must refuse, each with what its refusal says, and odd ones that it must take."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from functools import cache

from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")


def encoded(name: str, size=(48, 32), **options) -> bytes:
    """A file of a format, with some structure in its pixels."""
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    image.paste((200, 30, 30), (4, 4, 20, 20))
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, pixels: bytes = b"\0" * 100) -> bytes:
    """A grey PNG that says it has so many pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(pixels, 9)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + body


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def archive(name: str = "payload.class") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr(name, b"\xca\xfe\xba\xbe")
    return file.getvalue()


def jpeg_with_comment(comment: bytes) -> bytes:
    data = encoded("JPEG")
    return data[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + data[2:]


@cache
def bombs() -> dict[str, bytes]:
    """Small files that say they are huge, and one that is."""
    jpeg, webp, lossless = encoded("JPEG"), encoded("WEBP"), encoded("WEBP", lossless=True)
    start = jpeg.index(b"\xff\xc0")
    lossy = webp.index(b"\x9d\x01\x2a")
    sizes = 16382 | 16382 << 14
    tiff = encoded("TIFF")
    width, height = (tiff.index(struct.pack("<HHI", tag, 4, 1)) for tag in (256, 257))
    huge = struct.pack("<I", 60_000)
    return {
        "png": png(100_000, 100_000),
        "png that keeps its word": png(9000, 9000, pixels=bytes(9001 * 9000)),
        "jpeg": patched(jpeg, start + 5, struct.pack(">HH", 65500, 65500)),
        "webp": patched(webp, lossy + 3, struct.pack("<HH", 16383, 16383)),
        "webp lossless": patched(lossless, lossless.index(b"\x2f", 16) + 1, struct.pack("<I", sizes)),
        "gif": patched(encoded("GIF"), 6, struct.pack("<HH", 65535, 65535)),
        "bmp": patched(encoded("BMP"), 18, struct.pack("<ii", 60_000, 60_000)),
        "tiff": patched(patched(tiff, width + 8, huge), height + 8, huge),
    }


def tile_bomb(side: int = 20_000) -> bytes:
    """A TIFF of 16 x 16 pixels, whose only tile has `side` x `side`."""
    megabyte = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = megabyte.compress(bytes(2**20)) + megabyte.flush(zlib.Z_FULL_FLUSH)
    count = 3 * side * side // 2**20 + 1
    checksum = (count * 2**20 % 65521) << 16 | 1  # Adler-32 of zeros
    tile = b"\x78\xda" + block * count + b"\x03\x00" + struct.pack(">I", checksum)
    one = {256: 16, 257: 16, 259: 8, 262: 2, 277: 3, 284: 1, 322: side, 323: side, 325: len(tile)}
    after = 8 + 2 + 12 * (len(one) + 2) + 4
    fields = {tag: struct.pack("<HHII", tag, 4, 1, value) for tag, value in one.items()}
    fields |= {258: struct.pack("<HHII", 258, 3, 3, after), 324: struct.pack("<HHII", 324, 4, 1, after + 6)}
    directory = struct.pack("<H", len(fields)) + b"".join(fields[tag] for tag in sorted(fields)) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<HHH", 8, 8, 8) + tile


def scan_bomb(side: int = 4000, scans: int = 5000) -> bytes:
    """A progressive JPEG of a few hundred kilobytes, each of whose scans goes over all pixels."""
    file = io.BytesIO()
    Image.new("L", (side, side), 128).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    scan = data[data.rindex(b"\xff\xc4", 0, data.rindex(b"\xff\xda")) : -2]
    return data[:-2] + scan * scans + data[-2:]


def segment_bomb(megabytes: int = 8) -> bytes:
    """A JPEG with millions of empty segments, which Pillow reads one by one."""
    data = encoded("JPEG")
    return data[:2] + b"\xff\xe1\x00\x02" * (megabytes * 2**18) + data[2:]


def truncated() -> dict[str, bytes]:
    return {f"half a {name}": encoded(name)[: len(encoded(name)) // 2] for name in FORMATS}


def not_images() -> dict[str, bytes]:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'
    entity = b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>'
    return {
        "svg": svg,
        "svg with a byte order mark": b"\xef\xbb\xbf\n" + svg,
        "svg with an entity": entity,
        "web page": b"<!DOCTYPE html><html><body>sign in</body></html>",
        "pdf": b"%PDF-1.7\n1 0 obj << >> endobj\n%%EOF",
        "script": b"#!/bin/sh\nrm -rf /\n",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
        "film": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(64),
        "archive": archive(),
        "text": b"receipt.png",
        "zeros": bytes(1000),
        "signature alone": b"\x89PNG\r\n\x1a\n",
        "jpeg start alone": b"\xff\xd8\xff\xe0",
        "no width": png(0, 10),
        "photoshop": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(64),
        "portable pixmap": b"P6 2 2 255 " + bytes(12),
        "icon": b"\0\0\1\0\1\0" + bytes(40),
        "text that unpacks to gigabytes": png(
            9, 9, png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 * 2**20), 9))
        ),
    }


def polyglots() -> dict[str, bytes]:
    return {
        "png and archive": encoded("PNG") + archive(),
        "gif and archive": encoded("GIF") + archive("x.jar"),
        "jpeg and pdf": jpeg_with_comment(b"%PDF-1.7\n1 0 obj << >> endobj"),
        "gif and script": encoded("GIF", comment=b"*/=1;<script>alert(1)</script>"),
        "png and web page": png(9, 9, png_chunk(b"tEXt", b"Comment\0<html><body onload=alert(1)>")),
        "bmp and web page": encoded("BMP")[:54] + b"<HTML>" + encoded("BMP")[60:],
    }


def odd() -> dict[str, bytes]:
    """What people do send: none of it may be refused."""
    film = b"\0\0\0\x20ftypmp42\0\0\0\0mp42isom" + bytes(range(256)) * 400
    frames = [Image.new("RGB", (48, 32), (i, 0, 0)) for i in range(60)]
    moving = io.BytesIO()
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    return {
        **{name: encoded(name) for name in FORMATS},
        "photo with a film": encoded("JPEG") + film,
        "photo with a comment": jpeg_with_comment(b"a receipt, 12 < 13 %"),
        "bytes after the end": encoded("PNG") + b"\r\n\0\0PK\5\6",
        "moving picture": moving.getvalue(),
        "turned": encoded("JPEG", exif=Image.Exif()),
    }
