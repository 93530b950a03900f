"""Images by address: data URLs, and http(s) addresses where a server's owner has named their hosts.

An address from outside can point a server at machines that only it can reach (its own, its network's, the cloud's
metadata service). So a host must be on the list, on the scheme's own port or the one the list states, and every address
that its name resolves to must be public; the connection goes to the very address that was checked, since a second
lookup may answer otherwise (DNS rebinding). All of this holds for every redirect, too. Proxies that the environment
names are not used: they would resolve the name again.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable
from functools import partial
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import httpcore2
import httpx2
from anyio import to_thread
from pydantic import BaseModel, ConfigDict, Field

from relook.errors import UserError
from relook.files import data_url, split_page
from relook.perceive.engine import DeadlineExceeded
from relook.serve.decode import Decoders
from relook.serve.limits import Limits, hold

if TYPE_CHECKING:
    from PIL import Image

DECODERS = Decoders()
PORTS = {"http": 80, "https": 443}
# IPv6 networks that lead to an IPv4 address inside, whichever it is: mapped, compatible, NAT64, 6to4, Teredo.
EMBEDDING = ("::ffff:0:0/96", "::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")
# Not hosts of the internet, which `ipaddress` learned in later releases of Python.
SPECIAL = ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "5f00::/16", "fec0::/10", "100::/8", "2001::/23")
REFUSED = [ip_network(network) for network in EMBEDDING + SPECIAL]
HOST = r"^(\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*)(:\d{1,5})?$"


class FetchSettings(BaseModel):
    """Which image addresses a server downloads, and how much of them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    hosts: tuple[Annotated[str, Field(pattern=HOST)], ...] = ()
    """Hosts of addresses that are downloaded: "images.example.org", "*.example.org" (those below it), with a port
    ("images.example.org:8443") where it is not the scheme's own, or "*" (every public host). None: addresses are
    refused."""
    bytes: int = Field(20 * 2**20, ge=1)
    """Size of a file."""
    seconds: float = Field(10, gt=0)
    """Time for an address, with its redirects."""
    redirects: int = Field(3, ge=0)
    """Redirects that are followed."""


async def load_images(urls: Iterable[str], limits: Limits, settings: FetchSettings) -> list[Image.Image]:
    """The images of a request, upright RGB, from data URLs and (where allowed) http(s) addresses.

    Raises:
        UserError: an address that is not allowed or cannot be fetched, no image, one that is too large.
        EngineBusy: the memory for requests is used up.
        DeadlineExceeded: all of it takes longer than a request may.
    """
    opened: list[Image.Image] = []
    with anyio.move_on_after(limits.seconds) as time:
        for number, url in enumerate(urls, 1):
            seen = sum(image.width * image.height for image in opened)
            url, page = split_page(url)
            try:
                data = await image_bytes(url, settings)
                work = partial(DECODERS.open, data, seen, limits.pixels, limits.decode_seconds, page)
                opened.append(await asyncio.get_running_loop().run_in_executor(DECODERS.threads, work))
            except UserError as error:
                raise UserError(f"image {number}: {error}") from None
            hold(4 * opened[-1].width * opened[-1].height)  # as Pillow stores RGB
    if time.cancelled_caught:
        raise DeadlineExceeded(f"the images were not there and open within {limits.seconds:g} s; send fewer")
    return opened


async def image_bytes(url: str, settings: FetchSettings) -> bytes:
    """The file behind a data URL or an http(s) address."""
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        return await to_thread.run_sync(data_url, url)
    if scheme not in PORTS:
        seen = f"address of {scheme[:20]}:" if ":" in url[:20] else f"text {url[:20]!r}"
        raise UserError(f"{seen} is no image; expected a data URL (data:image/png;base64,...)")
    if not settings.hosts:
        raise UserError("this server fetches no addresses; send the image as a data URL")
    name = url[:200]
    try:
        with anyio.fail_after(settings.seconds):
            return await _download(url, settings)
    except TimeoutError:
        raise UserError(f"{name}: not fetched within {settings.seconds:g} seconds; send it as a data URL") from None
    except (
        UnicodeError,
        httpx2.InvalidURL,
        httpcore2.NetworkError,
        httpcore2.ProtocolError,
        httpcore2.TimeoutException,
    ) as error:
        raise UserError(f"{name}: cannot be fetched ({type(error).__name__}); check the address") from None


async def _download(url: str, settings: FetchSettings) -> bytes:
    address = httpx2.URL(url)
    for _ in range(settings.redirects + 1):
        _check(address, settings)
        headers = [(b"Host", address.netloc), (b"User-Agent", b"relook"), (b"Accept-Encoding", b"identity")]
        at = httpcore2.URL(scheme=address.raw_scheme, host=address.raw_host, port=address.port, target=address.raw_path)
        async with (
            httpcore2.AsyncConnectionPool(network_backend=_PublicOnly()) as pool,
            pool.stream("GET", at, headers=headers) as response,
        ):
            answered = {name.lower(): value for name, value in response.headers}
            if response.status in (301, 302, 303, 307, 308) and b"location" in answered:
                address = address.join(answered[b"location"].decode("latin-1"))
                continue
            if response.status != 200:
                raise UserError(f"{address}: answered with status {response.status}; expected an image")
            return await _read(response, str(address), settings.bytes)
    raise UserError(f"{url[:200]}: more than {settings.redirects} redirects; give the address they lead to")


async def _read(response: Any, name: str, limit: int) -> bytes:
    data = bytearray()
    async for piece in response.aiter_stream():
        hold(len(piece))
        data += piece
        if len(data) > limit:
            raise UserError(f"{name}: more than {limit:,} bytes, which is what this server takes; send a smaller image")
    return bytes(data)


def _check(address: httpx2.URL, settings: FetchSettings) -> None:
    """Refuse an address (the one given, or where a redirect leads) that is not on the list."""
    host = address.raw_host.decode("ascii").lower().rstrip(".")
    port = PORTS.get(address.scheme)
    if port is None or not host:
        raise UserError(f"{str(address)[:200]}: not an http or https address; expected one, or a data URL")
    if address.userinfo:
        raise UserError(f"{host}: an address with a user's name or password is not fetched; leave it out")
    port = None if address.port in (None, port) else address.port
    for entry in settings.hosts:
        listed, _, stated = entry.lower().partition(":")
        below = listed.startswith("*") and host.endswith(listed[1:])
        if (below or host == listed) and stated == ("" if port is None else str(port)):
            return
    place = host if port is None else f"{host}:{port}"
    raise UserError(f"images are not fetched from {place}; allowed: {', '.join(settings.hosts)}")


class _PublicOnly(httpcore2.AsyncNetworkBackend):
    """Connects to a host by an address that was checked; TLS and the Host header keep the name."""

    async def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> httpcore2.AsyncNetworkStream:
        found = await resolve(host, port)
        if not found or not all(map(is_public, found)):
            raise UserError(f"{host}: no public address on the internet; images are fetched from there only")
        for address in found[:-1]:
            try:
                return await httpcore2.AnyIOBackend().connect_tcp(address, port, *args, **kwargs)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        return await httpcore2.AnyIOBackend().connect_tcp(found[-1], port, *args, **kwargs)


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, in the resolver's order; none where there is no such name."""
    try:
        found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(text: str) -> bool:
    """Whether an IP address is one host of the public internet.

    >>> [is_public(a) for a in ("8.8.8.8", "127.0.0.1", "169.254.169.254", "::ffff:8.8.8.8", "64:ff9b::7f00:1")]
    [True, False, False, False, False]
    """
    try:
        address = ip_address(text)
    except ValueError:
        return False
    special = address.is_multicast or address.is_reserved or address.is_loopback or address.is_link_local
    return address.is_global and not special and not any(address in network for network in REFUSED)
