"""What every test needs before torch is imported; the shared fixtures are in tests/support/fixtures.py."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads only slow tiny models down
# Scripts that tests start find `support`, too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent / "tests"), os.environ.get("PYTHONPATH")])
)

pytest_plugins = ["support.fixtures"]
