"""`relook train`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from relook.cli.common import print_result, show_status
from relook.errors import UserError


def train(
    recipe: Annotated[Path, Argument(metavar="RECIPE.yaml", help="A recipe; recipes/ holds those of the models.")],
    overrides: Annotated[
        list[str] | None, Argument(metavar="KEY=VALUE", help="Keys to change, such as seed=2 or out=FOLDER.")
    ] = None,
    dry_run: Annotated[
        bool,
        Option("--dry-run", help="Check data and model; report trainable parameters, tokens, steps, memory and time."),
    ] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Start over where the folder holds a run.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the dry run as JSON.")] = False,
) -> None:
    """Train a model by a recipe; a rerun continues an interrupted run. SIGTERM and Ctrl-C save first."""
    if dry_run:
        _dry_run(recipe, overrides or [], as_json)
        return
    from relook.train import distributed, run

    done = run(recipe, overrides or [], overwrite=overwrite)
    if distributed.main():
        print(f"written: {done}")


def _dry_run(recipe: Path, overrides: list[str], as_json: bool) -> None:
    from relook.train.dry_run import dry_run

    def say(text: str) -> None:
        show_status("")
        print(text, flush=True)

    found = dry_run(recipe, overrides, show_status, (lambda text: None) if as_json else say)
    show_status("")
    if as_json:
        print_result(found, True)
    if not found.ok:
        counts = [f"{n} x {kind}" for stage in found.stages if stage.items for kind, n in stage.items.problems.items()]
        raise UserError(f"the data will not do: {', '.join(dict.fromkeys(counts))}; see above, or relook data check")
