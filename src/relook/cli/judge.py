"""`relook judge`: a finished evaluation put before a judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from relook.cli.work import bars


def judge(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="What `relook evaluate --out` wrote.")],
    model: Annotated[str, Option("--model", "-m", metavar="NAME", help="The judge, as the endpoint calls it.")],
    url: Annotated[
        str | None,
        Option(metavar="URL", help="An OpenAI-compatible endpoint; OPENAI_BASE_URL, else OpenAI's, unless given."),
    ] = None,
    cache: Annotated[Path, Option(metavar="FILE", help="What was judged before, and is not paid for again.")] = Path(
        "~/.cache/relook/judged.jsonl"
    ),
    concurrency: Annotated[int, Option(min=1, metavar="N", help="Requests under way at once.")] = 8,
    timeout: Annotated[float, Option(min=0.1, metavar="SECONDS", help="That one request may take.")] = 60.0,
    retries: Annotated[int, Option(min=0, metavar="N", help="Of a request that failed, with growing pauses.")] = 5,
    prices: Annotated[
        tuple[float, float] | None,
        Option(metavar="IN OUT", help="Of a million tokens asked and answered, so that the cost is told."),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Let a language model score an evaluation's answers (key: OPENAI_API_KEY); what fails is unscored, never 0."""
    from relook.evaluate.judge import Judge, judge_folder

    with bars() as progress:
        judged_by = Judge(model, url, cache.expanduser(), concurrency, timeout, retries)
        done = judge_folder(folder, judged_by, progress, prices)
    print(json.dumps(done.to_dict(), indent=2, ensure_ascii=False) if as_json else done)
    if not as_json:
        account = done.run["judge"]
        cost = f", cost {account['cost']:.4f}" if "cost" in account else ""
        print(
            f"\njudged by {', '.join(account['judged_by'])}: {account['unscored']} unscored, "
            f"{account['cached']} known before, {account['tokens_in']} + {account['tokens_out']} tokens{cost}"
        )
