"""Browser pages of canned and real servers."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack

import pytest
from support.page_actions import WIDE, pick
from support.page_server import canned_app, served


@pytest.fixture(scope="module")
def addresses():
    """The address of a canned server, one for each set of options, kept for the whole file."""
    with ExitStack() as stack:
        known = {}

        def address(**options):
            name = json.dumps(options)
            if name not in known:
                app = canned_app(**options)
                known[name] = stack.enter_context(served(app)), app.state.asked
            known[name][1].clear()
            return known[name]

        yield address


@pytest.fixture
def visit(chromium, addresses, request):
    """Opens the page of a canned server. A script error, a message on the console, a dialog or a request to another
    address fails the test (`refused=True`: the browser notes there what it was not given)."""
    heard: list[str] = []

    def visit(viewport=WIDE, refused=False, color_scheme="light", reduced_motion="reduce", **options):
        url, asked = addresses(**options)
        phone = viewport["width"] < 600
        wishes = {"color_scheme": color_scheme, "reduced_motion": reduced_motion}
        context = chromium.new_context(viewport=viewport, has_touch=phone, is_mobile=phone, **wishes)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        context.set_default_timeout(20_000)
        request.addfinalizer(context.close)
        page = context.new_page()
        noted = re.compile("Failed to load resource.*(status of 4|ERR_FAILED)" if refused else "$^")
        page.on("console", lambda note: None if noted.search(note.text) else heard.append(f"console: {note.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (heard.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else heard.append(r.url))
        page.goto(url)
        page.asked = asked
        return page

    yield visit
    assert heard == []


@pytest.fixture
def card(visit):
    """A page with the example of colored boxes, not asked about yet."""

    def card(*args, **options):
        page = visit(*args, **options)
        pick(page)
        return page

    return card
