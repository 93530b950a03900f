"""Are the tests of the core able to fail? Each row of mutants.yaml spoils one line, and one of its tests must notice.

    python tools/mutants.py [PART ...]      the mutants whose names hold one of these parts; all of them without

Works on a scratch copy of the checkout. Prints caught, MISSED, or that the line is not there any more; exit code 1
where a mutant was missed. A minute or less each: some twenty minutes in all on one core.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def run(tree: Path, row: dict) -> str:
    """What became of one mutant, in a copy of the checkout that is put right again."""
    path = tree / "src/relook" / row["file"]
    text = path.read_text(encoding="utf-8")
    if row["old"] not in text:
        return "NOT THERE: the line has changed; write the mutant anew"
    path.write_text(text.replace(row["old"], row["new"]), encoding="utf-8")
    tests = [f"tests/{name}.py" for name in row["tests"]]
    env = {**os.environ, "PYTHONPATH": f"{tree / 'src'}{os.pathsep}{tree}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)
    path.write_text(text, encoding="utf-8")
    if done.returncode == 0:
        return "MISSED"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return f"caught by {failed[0].split(' ')[1]}" if failed else "caught"


def main() -> None:
    rows = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    chosen = [row for row in rows if not sys.argv[1:] or any(part in row["name"] for part in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "relook"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "out", "__pycache__"))
        results = []
        for row in chosen:
            results.append(run(tree, row))
            print(f"{row['name']:56} {results[-1]}", flush=True)
    caught = sum(result.startswith("caught") for result in results)
    print(f"{caught} of {len(results)} caught")
    sys.exit(caught < len(results))


if __name__ == "__main__":
    main()
