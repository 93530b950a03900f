"""Images by address: what is fetched, from where, and what never is. Against real HTTP and HTTPS servers.

A real name would leave this machine, so the tests' own resolver answers, and 127.0.0.1 passes for a public address;
127.0.0.2 stays what it is, and a server that listens there must never see a connection.
"""

import asyncio
import datetime
import ssl

import anyio
import pytest
from pydantic import ValidationError
from support.image_servers import ImageServer, png

from relook.errors import UserError
from relook.perceive.engine import DeadlineExceeded
from relook.serve import fetch
from relook.serve.fetch import FetchSettings, image_bytes, is_public, load_images, resolve
from relook.serve.limits import Limits

NAMES = {
    "images.example": ["127.0.0.1"],
    "more.images.example": ["127.0.0.1"],
    "inside.example": ["127.0.0.2"],
    "both.example": ["127.0.0.1", "127.0.0.2"],
    "127.0.0.2": ["127.0.0.2"],
    "dead.example": ["127.0.0.1"],
}


@pytest.fixture(autouse=True)
def names(monkeypatch):
    asked = []

    async def resolver(host, port):
        asked.append(host)
        return NAMES.get(host, [])

    monkeypatch.setattr(fetch, "resolve", resolver)
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1" or is_public(address))
    return asked


@pytest.fixture(scope="module")
def servers():
    with ImageServer("127.0.0.1") as outside, ImageServer("127.0.0.2") as inside:
        yield outside, inside
        assert inside.connections == 0


def get(url, *hosts, **settings):
    return asyncio.run(image_bytes(url, FetchSettings(hosts=hosts, **settings)))


def refusal(url, *hosts, **settings):
    with pytest.raises(UserError) as caught:
        get(url, *hosts, **settings)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 500
    return sentence


def test_addresses_are_refused_until_their_host_is_named(servers):
    port = servers[0].server_port
    url = f"http://images.example:{port}/image"
    seen = len(servers[0].seen)
    assert "fetches no addresses" in refusal(url)
    assert "not fetched from images.example" in refusal(url, "other.example")
    assert "not fetched from images.example" in refusal(url, "images.example")  # the list states no such port
    assert "not fetched from images.example" in refusal(url, f"*.images.example:{port}")  # only what is below
    assert "not fetched from images.example" in refusal(url, f"mages.example:{port}")
    assert len(servers[0].seen) == seen
    assert get(url, f"images.example:{port}") == png()
    assert servers[0].seen[-1] == ("/image", f"images.example:{port}")
    assert get(f"http://more.images.example:{port}/image", f"*.images.example:{port}") == png()
    assert get(f"HTTP://Images.Example:{port}/image", f"images.EXAMPLE:{port}") == png()
    assert get(url, f"*:{port}") == png()


@pytest.mark.parametrize("entry", ["*example.org", "http://example.org", "a.*", "", "exa mple.org", "[::1]", "a.org:"])
def test_a_host_list_is_checked_when_the_server_starts(entry):
    with pytest.raises(ValidationError):
        FetchSettings(hosts=(entry,))


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "FILE:/etc/passwd", "ftp://images.example/a.png", "gopher://images.example", "/etc/passwd"]
    + ["receipt.png", "javascript:alert(1)", "", "http", "//images.example/a.png", "blob:http://images.example/1"]
    + ["iVBORw0KGgo=", "s3://bucket/a.png", "\x00http://images.example/", " http://images.example/a.png"],
)
def test_only_http_and_data_are_addresses_of_images(url):
    assert "data URL" in refusal(url, "*")


@pytest.mark.parametrize(
    "url", ["http://", "http:///a.png", "http://images.example:99999/", "http://[::1/", "http://a b/"]
)
def test_malformed_addresses(url):
    assert refusal(url, "*")


def test_user_names_and_half_characters(servers):
    port = servers[0].server_port
    assert "password" in refusal(f"http://me:secret@images.example:{port}/image", f"*:{port}")
    assert "password" in refusal(f"http://images.example:{port}@inside.example/image", "*")
    refusal(f"http://images.example:{port}/\ud800", f"*:{port}")


def test_private_addresses_are_refused_whatever_leads_there(servers):
    outside, inside = servers
    hosts = [f"*:{outside.server_port}", f"*:{inside.server_port}"]
    for url in (
        f"http://127.0.0.2:{inside.server_port}/image",
        f"http://inside.example:{inside.server_port}/image",
        f"http://both.example:{outside.server_port}/image",  # one bad address among good ones
        f"http://images.example:{outside.server_port}/to/http://127.0.0.2:{inside.server_port}/image",
        f"http://images.example:{outside.server_port}/to/http://inside.example:{inside.server_port}/image",
        f"http://images.example:{outside.server_port}/to///inside.example:{inside.server_port}/image",
        f"http://unknown.example:{outside.server_port}/image",
    ):
        assert "no public address" in refusal(url, *hosts), url
    assert inside.connections == 0


def test_redirects_are_checked_and_bounded(servers):
    outside = servers[0]
    base = f"http://images.example:{outside.server_port}"
    listed = f"images.example:{outside.server_port}"
    assert get(f"{base}/to//image", listed) == png()
    assert get(f"{base}/to/{base}/to/{base}/image", listed) == png()
    assert "more than 3 redirects" in refusal(f"{base}/loop/0", listed)
    assert "more than 0 redirects" in refusal(f"{base}/to//image", listed, redirects=0)
    assert "not fetched from more.images.example" in refusal(
        f"{base}/to/http://more.images.example:{outside.server_port}/image", listed
    )
    assert "not an http" in refusal(f"{base}/to/file:///etc/passwd", listed, "*")
    assert "password" in refusal(f"{base}/to/http://me:secret@images.example:{outside.server_port}/image", listed)
    assert "not fetched from images.example:22" in refusal(f"{base}/to/http://images.example:22/", listed)


def test_the_address_connected_to_is_the_one_that_was_checked(servers, monkeypatch):
    """DNS rebinding: the name's second answer is a private address."""
    outside, inside = servers
    answers = [["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2"]]
    asked = []

    async def rebinding(host, port):
        asked.append(host)
        return answers[len(asked) - 1]

    monkeypatch.setattr(fetch, "resolve", rebinding)
    looked_up = []
    getaddrinfo = asyncio.base_events.BaseEventLoop.getaddrinfo

    async def counted(self, host, *args, **kwargs):
        looked_up.append(host)
        return await getaddrinfo(self, host, *args, **kwargs)

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", counted)
    port = outside.server_port
    assert get(f"http://images.example:{port}/image", f"*:{port}") == png()
    assert asked == ["images.example"] and set(looked_up) <= {"127.0.0.1"}  # no second lookup of the name
    asked.clear()
    assert "no public address" in refusal(f"http://images.example:{port}/to//image", f"*:{port}")  # a second connection
    assert inside.connections == 0


def test_the_next_address_is_tried_where_one_does_not_answer(servers, monkeypatch):
    monkeypatch.setitem(NAMES, "images.example", ["127.0.0.3", "127.0.0.1"])
    monkeypatch.setattr(fetch, "is_public", lambda address: address in ("127.0.0.3", "127.0.0.1"))
    port = servers[0].server_port
    assert get(f"http://images.example:{port}/image", f"*:{port}") == png()
    monkeypatch.setitem(NAMES, "images.example", ["127.0.0.3"])
    assert "cannot be fetched (ConnectError)" in refusal(f"http://images.example:{port}/image", f"*:{port}")


def test_slow_servers_are_left(servers):
    port = servers[0].server_port
    for path in ("drip", "silence"):
        assert "within 0.5 seconds" in refusal(f"http://images.example:{port}/{path}", f"*:{port}", seconds=0.5)


def test_a_request_has_its_time_for_all_images(servers):
    port = servers[0].server_port
    urls = [f"http://images.example:{port}/image", f"http://images.example:{port}/silence"]
    with pytest.raises(DeadlineExceeded, match=r"0\.4 s"):
        asyncio.run(load_images(urls, Limits(seconds=0.4), FetchSettings(hosts=(f"*:{port}",))))


def test_a_slow_resolver_is_left(servers, monkeypatch):
    async def resolver(host, port):
        await anyio.sleep(60)

    monkeypatch.setattr(fetch, "resolve", resolver)
    port = servers[0].server_port
    assert "within 0.2 seconds" in refusal(f"http://images.example:{port}/image", f"*:{port}", seconds=0.2)


def test_large_files_are_left(servers):
    base, listed = f"http://images.example:{servers[0].server_port}", f"*:{servers[0].server_port}"
    for path in ("endless", "image"):
        assert "more than 50 bytes" in refusal(f"{base}/{path}", listed, bytes=50)


def test_what_is_no_image_is_said(servers):
    base, listed = f"http://images.example:{servers[0].server_port}", f"*:{servers[0].server_port}"
    assert "status 404" in refusal(f"{base}/status/404", listed)
    assert "status 500" in refusal(f"{base}/status/500", listed)
    assert "status 206" in refusal(f"{base}/status/206", listed)
    assert "cannot be fetched" in refusal(f"{base}/half", listed)
    assert "cannot be fetched" in refusal(f"{base}/garbage", listed)
    for path in ("text", "gzip"):  # gzip: not asked for, not decoded, so it cannot unpack to more than was counted
        with pytest.raises(UserError, match="image 1"):
            asyncio.run(load_images([f"{base}/{path}"], Limits(), FetchSettings(hosts=(listed,))))
    [image] = asyncio.run(load_images([f"{base}/image"], Limits(), FetchSettings(hosts=(listed,))))
    assert image.size == (40, 30) and image.getpixel((0, 0)) == (200, 30, 30)


def certificate(folder, name):
    """A self-signed certificate for `name`, as (file, file of the key)."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = folder / f"{name}.pem", folder / f"{name}.key"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    kind = serialization.PrivateFormat.TraditionalOpenSSL
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption()))
    return files


def test_tls_is_checked_against_the_name_and_not_the_address(tmp_path, monkeypatch):
    file, key = certificate(tmp_path, "images.example")
    asked_for = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)
    context.sni_callback = lambda connection, name, _: asked_for.append(name)
    with ImageServer(tls=context) as server:
        port = server.server_port
        url = f"https://images.example:{port}/image"
        assert "cannot be fetched" in refusal(url, f"*:{port}")  # nobody vouches for the certificate
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        assert get(url, f"*:{port}") == png()
        assert asked_for[-1] == "images.example" and server.seen == [("/image", f"images.example:{port}")]
        assert "cannot be fetched" in refusal(f"https://more.images.example:{port}/image", f"*:{port}")  # other name


PUBLIC = """
8.8.8.8 1.1.1.1 93.184.216.34 2606:4700:4700::1111 2001:4860:4860::8888 2a00:1450:4001:80b::200e
"""
NOT_PUBLIC = """
0.0.0.0 10.0.0.1 100.64.0.1 127.0.0.1 127.255.255.254 169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.8 192.0.2.1
192.168.1.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255
:: ::1 fe80::1 fe80::1%eth0 fc00::1 fd12:3456::1 fec0::1 ff02::1 2001:db8::1 100::1 3fff::1
::ffff:127.0.0.1 ::ffff:8.8.8.8 ::7f00:1 64:ff9b::7f00:1 64:ff9b::808:808 64:ff9b:1::a00:1 2002:7f00:1:: 2001::1
nonsense 1.2.3 ::g
"""


def test_public_addresses():
    assert [address for address in PUBLIC.split() if not is_public(address)] == []
    assert [address for address in [*NOT_PUBLIC.split(), ""] if is_public(address)] == []


@pytest.mark.parametrize(
    "host", ["127.1", "2130706433", "0x7f000001", "0177.0.0.1", "localhost", "0", "::1", "①②⑦.0.0.1"]
)
def test_other_spellings_of_loopback(host):
    """Through the system's own resolver."""
    found = asyncio.run(resolve(host, 80))
    assert not any(map(is_public, found))


def test_environment_proxies_are_not_used(servers, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.2:{servers[1].server_port}")
    port = servers[0].server_port
    assert get(f"http://images.example:{port}/image", f"*:{port}") == png()
    assert servers[1].connections == 0
