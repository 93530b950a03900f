"""Test helpers, one module per kind of object they build, and the folders of the checkout."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent  # the checkout
SHARED = ROOT.parent / "shared"  # real data beside the checkout; may be absent
