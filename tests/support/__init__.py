"""Helpers of the tests, named after what they build; and where things lie."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent  # of the checkout
SHARED = ROOT.parent / "shared"  # real data beside the checkout; may be absent
