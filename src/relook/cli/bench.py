"""`relook bench` and `relook bench load`."""

import signal
from typing import Annotated

import typer
from typer import Option

from relook.cli.common import AsJson, print_result, show_status

app = typer.Typer(invoke_without_command=True)

Seed = Annotated[int, Option(metavar="N", help="Of the random weights, the images and the intervals.")]


@app.callback()
def bench(
    context: typer.Context,
    repeats: Annotated[int, Option(min=1, metavar="N", help="Rounds; each measures every case once.")] = 7,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure what a look costs, as ratios within one run on this machine (some minutes)."""
    if context.invoked_subcommand is not None:
        return
    from relook.bench.cost import run

    done = run(repeats, seed, status=show_status)
    show_status("")
    print_result(done, as_json)


@app.command("load")
def load(
    model: Annotated[
        str | None, Option("--model", "-m", metavar="NAME", help="What to serve; default: a random model.")
    ] = None,
    clients: Annotated[str, Option(metavar="N,N,...", help="Numbers of clients that ask at once.")] = "1,4,16,64",
    rounds: Annotated[int, Option(min=1, metavar="N", help="Measurements of each.")] = 3,
    questions: Annotated[int, Option(min=1, metavar="N", help="Questions of a client in one of them.")] = 2,
    tokens: Annotated[int, Option(min=2, metavar="N", help="Tokens of an answer.")] = 64,
    look: Annotated[str, Option(metavar="LOOK", help="The look that relook's server is asked for.")] = "none",
    transformers_serve: Annotated[
        str | None,
        Option(metavar="PYTHON", help="Compare with `transformers serve`, run by this Python (docs/serving.md)."),
    ] = None,
    url: Annotated[
        str | None, Option(metavar="URL", help="Measure this server of OpenAI's API instead (its key: RELOOK_API_KEY).")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure relook's server under load, beside itself without batching, and `transformers serve`.

    Requests per second, time to the first token and per token, at several numbers of clients, on this machine. The
    default takes some 20 minutes on two cores.
    """
    from relook.errors import UserError

    try:
        counts = [int(each) for each in clients.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1 or len({*counts}) < len(counts):
        raise UserError(f"--clients {clients}: expected different whole numbers from 1 on, such as 1,4,16,64")
    if url is not None and (model or transformers_serve):
        raise UserError("--url measures a server that runs; leave --model and --transformers-serve out")
    try:
        from relook.bench.servers import run, run_at
    except ImportError as error:
        raise UserError(f"relook bench load needs {error.name}: pip install 'relook[serve]'") from error

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the servers end with it
    if url is not None:
        done = run_at(url, counts, rounds, questions, tokens, look, seed, show_status)
    else:
        done = run(model, counts, rounds, questions, tokens, look, transformers_serve, seed, show_status)
    show_status("")
    print_result(done, as_json)
