"""The documentation: its code runs, its file names exist, and the command reference equals the output of --help."""

import re
from pathlib import Path

import pytest
from support import ROOT

from relook.cli.reference import reference
from relook.train.objective import OBJECTIVES
from relook.train.recipe import load_recipe

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# a reader's own files, what commands leave, another package's
ELSEWHERE = re.compile(r"own[./]|shapes\.(py|yaml)|run\.py|(dist|final|img|viscot_benchmark|receipts)/|\.\.\.")
PAGES += sorted([*(ROOT / "zoo").rglob("*.md"), *(ROOT / "src/relook/weights").glob("*/README.md")])


def test_command_reference_is_current() -> None:
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == reference(), "run `make docs`"


def test_readme_python_runs(tmp_path, monkeypatch) -> None:
    """As it stands, in a folder that holds nothing but examples/."""
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = [line for line in block.splitlines() if line.strip()]
    assert len(code) <= 12
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    values: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), values)
    assert values["answer"].text and (tmp_path / "receipt.png").is_file()  # type: ignore[attr-defined]


def test_readme_recipe_loads(tmp_path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "own.yaml").write_text(block)
    recipe = load_recipe(tmp_path / "own.yaml")
    assert all(stage.objective in OBJECTIVES for stage in recipe.stages)


def tree() -> list[str]:
    """Paths of the README's file tree: indented names lie in the folder above them."""
    (block,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    paths, folder = [], ""
    for line in block.splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            paths.append(folder + name)
        else:
            folder = name
            paths.append(name)
    return paths


@pytest.mark.parametrize("path", tree())
def test_readme_tree_names_what_exists(path: str) -> None:
    place = ROOT / path
    assert place.is_dir() if path.endswith("/") else place.is_file()


def test_readme_tree_names_all_of_the_package() -> None:
    package = ROOT / "src" / "relook"
    there = {
        f"src/relook/{p.name}{'/' * p.is_dir()}"
        for p in package.iterdir()
        if not p.name.startswith(("_", ".")) and p.suffix in ("", ".py")
    }
    assert there <= set(tree())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "log.md"], ids=lambda page: page.name)
def test_files_named_in_backticks_exist(page: Path) -> None:
    """`train/recipe.py`, `recipes/`, `report.html.jinja`: below the checkout, the package, the zoo, or the page."""
    roots = (ROOT, ROOT / "src/relook", ROOT / "zoo", page.parent)
    endings = r"\.py|/|\.jinja|\.css|\.js|\.sh|\.yaml"
    for name in re.findall(rf"`([A-Za-z0-9_./-]*(?:{endings}))`", page.read_text(encoding="utf-8")):
        if not ELSEWHERE.match(name):
            assert any((base / name).exists() for base in roots), name


def test_each_change_of_the_design_names_one_file() -> None:
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    table = text.split("## Where to change what")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!to add)([^|]*) \| ([^|]*) \|$", table, re.MULTILINE)
    assert len(rows) >= 20
    for what, where in rows:
        (name,) = re.findall(r"`([^`]*)`", where)
        assert any((base / name).is_file() for base in (ROOT, ROOT / "src/relook")), (what, name)


def test_make_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    promised = {"help", "setup", "demo", "test", "test-slow", "lint", "bench", "clean", "cards-tiny", "receipts-tiny"}
    described = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())  # type: ignore[index]
    assert promised <= described == phony


def test_versions_agree() -> None:
    import relook

    assert f"version: {relook.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {relook.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
