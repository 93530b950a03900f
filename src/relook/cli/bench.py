"""`relook bench`."""

from typing import Annotated

from typer import Option

from relook.cli.common import AsJson, print_result, show_status


def bench(
    repeats: Annotated[int, Option(min=1, metavar="N", help="Rounds; each measures every case once.")] = 7,
    seed: Annotated[int, Option(metavar="N", help="Of the random weights, the image and the intervals.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure what a look costs, as ratios within one run on this machine (some minutes)."""
    from relook.bench import run

    done = run(repeats, seed, status=show_status)
    show_status("")
    print_result(done, as_json)
