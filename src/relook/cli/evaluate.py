"""`relook evaluate`, `matter`, `judge`, `report`: measure a model and its looks, score answers, compare evaluations."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from relook.cli.common import (
    DEFAULT_MODEL,
    SERVED_HELP,
    BaseUrl,
    Dialect,
    Dtype,
    Model,
    Processor,
    ResultsAsJson,
    open_model,
    print_result,
    progress_bars,
)
from relook.errors import UserError

By = Annotated[
    list[str] | None,
    Option(
        metavar="KEY",
        help="Results by groups of questions, too: by a key of their records, a bound or both: 'field,width<880'; "
        "may be repeated.",
    ),
]


Tasks = Annotated[
    list[str] | None,
    Option(metavar="TASK...", help="cards, receipts, receipts-real, docvqa, gqa, ..., or files of questions."),
]
Number = Annotated[int | None, Option("--n", "--limit", min=1, metavar="N", help="Questions of each task.")]
Seed = Annotated[int, Option(metavar="N", help="Of pages drawn, random regions, intervals.")]
Batch = Annotated[str, Option(metavar="N", help="Questions per batch; auto: measure, and take the fastest.")]
EngineName = Annotated[
    str | None,
    Option(metavar="NAME", help="local, ray (needs relook[ray]) or processes (torchrun); detected by default."),
]
Replicas = Annotated[
    int | None, Option(min=1, metavar="N", help="Copies of the model, with ray; default: one per GPU or CPU.")
]
ProtocolName = Annotated[
    str, Option(metavar="NAME", help="default (greedy, all items), or as published: paper, paper-224.")
]
Data = Annotated[Path | None, Option(metavar="FOLDER", help="With Visual-CoT's benchmark files, for docvqa, gqa, ...")]
Images = Annotated[
    list[str] | None, Option(metavar="SET=FOLDER...", help="Folders of images, as in `relook data remap`.")
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace a finished evaluation in --out.")]
TokenPrices = Annotated[
    tuple[float, float] | None,
    Option(metavar="IN OUT", help="Price of a million input and output tokens, to report the cost."),
]


def evaluate(
    model: Model = None,
    tasks: Tasks = None,
    looks: Annotated[
        list[str] | None,
        Option(
            metavar="LOOK...",
            help="auto, none, region, clip, detection, seg, oracle (annotated), random, blank, once, "
            "clip-unconditioned, ..., auto-blank, other, blurred, moved, image-only, text-only.",
        ),
    ] = None,
    n: Number = None,
    out: Annotated[Path | None, Option(metavar="FOLDER", help="Where results and a record of each answer go.")] = None,
    seed: Seed = 0,
    batch: Batch = "8",
    dtype: Dtype = None,
    engine: EngineName = None,
    replicas: Replicas = None,
    protocol: ProtocolName = "default",
    data: Data = None,
    images: Images = None,
    base_url: BaseUrl = None,
    processor: Processor = None,
    dialect: Dialect = None,
    by: By = None,
    overwrite: Overwrite = False,
    as_json: ResultsAsJson = False,
) -> None:
    """Measure a model: tasks x ways to look, with 95 % intervals."""
    from relook.data.published import parse_folders
    from relook.evaluate import Places
    from relook.evaluate import evaluate as run
    from relook.evaluate.executors import is_main_process

    places = Places(data, parse_folders(images or []))
    asked = model or DEFAULT_MODEL if base_url is None else open_model(model, base_url, processor, dialect)
    with progress_bars() as progress:
        done = run(asked, tasks or [], looks or ["auto", "none"], n=n, out=out, seed=seed,
                   batch=_batch(batch), protocol=protocol, places=places, dtype=dtype, engine=engine, replicas=replicas,
                   progress=progress, overwrite=overwrite, by=by or ())  # fmt: skip
    if is_main_process():
        print_result(done, as_json, ensure_ascii=False)


def matter(
    model: Annotated[str | None, Argument(metavar="MODEL", help=SERVED_HELP)] = None,
    tasks: Tasks = None,
    out: Annotated[Path, Option(metavar="FOLDER", help="Where the report, results and records go.")] = Path(
        "out/matter"
    ),
    n: Number = None,
    seed: Seed = 0,
    batch: Batch = "8",
    dtype: Dtype = None,
    engine: EngineName = None,
    replicas: Replicas = None,
    protocol: ProtocolName = "default",
    data: Data = None,
    images: Images = None,
    base_url: BaseUrl = None,
    processor: Processor = None,
    dialect: Dialect = None,
    prices: TokenPrices = None,
    pictures: Annotated[int, Option(min=0, metavar="N", help="Pictures in report.html, some 50 kB each.")] = 100,
    overwrite: Overwrite = False,
    as_json: ResultsAsJson = False,
) -> None:
    """Did the look matter? Every question with it, without, and with parts of it taken away (docs/matter.md)."""
    from relook.data.published import parse_folders
    from relook.evaluate import Places
    from relook.evaluate import matter as run

    places = Places(data, parse_folders(images or []))
    asked = model or DEFAULT_MODEL if base_url is None else open_model(model, base_url, processor, dialect)
    with progress_bars() as progress:
        found = run(asked, tasks or [], out, prices, pictures, dtype, engine, overwrite, n=n, seed=seed,
                    batch=_batch(batch), replicas=replicas, protocol=protocol, places=places,
                    progress=progress)  # fmt: skip
    if found is not None:
        print_result(found, as_json, ensure_ascii=False)


def _batch(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--batch {text}: expected a number from 1 on, or auto")
    return int(text)


def judge(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="What `relook evaluate --out` wrote.")],
    model: Annotated[str, Option("--model", "-m", metavar="NAME", help="The judge's name at the endpoint.")],
    url: Annotated[
        str | None,
        Option(metavar="URL", help="An OpenAI-compatible endpoint; default: OPENAI_BASE_URL, else OpenAI's."),
    ] = None,
    cache: Annotated[Path, Option(metavar="FILE", help="Stored replies, so that none is paid for twice.")] = Path(
        "~/.cache/relook/judged.jsonl"
    ),
    concurrency: Annotated[int, Option(min=1, metavar="N", help="Concurrent requests.")] = 8,
    timeout: Annotated[float, Option(min=0.1, metavar="SECONDS", help="Time limit of one request.")] = 60.0,
    retries: Annotated[
        int, Option(min=0, metavar="N", help="Retries of a failed request, with exponential back-off.")
    ] = 5,
    prices: TokenPrices = None,
    as_json: ResultsAsJson = False,
) -> None:
    """Let a language model score an evaluation's answers (key: OPENAI_API_KEY); what fails is unscored, never 0."""
    from relook.evaluate.judge import Judge, judge_folder

    with progress_bars() as progress:
        judged_by = Judge(model, url, cache.expanduser(), concurrency, timeout, retries)
        done = judge_folder(folder, judged_by, progress, prices)
    print_result(done, as_json, ensure_ascii=False)
    if not as_json:
        usage = done.run["judge"]
        cost = f", cost {usage['cost']:.4f}" if "cost" in usage else ""
        print(
            f"\njudged by {', '.join(usage['judged_by'])}: {usage['unscored']} unscored, "
            f"{usage['cached']} known before, {usage['tokens_in']} + {usage['tokens_out']} tokens{cost}"
        )


def report(
    sources: Annotated[
        list[Path],
        Argument(metavar="SOURCE...", help="A YAML file of rows (zoo/receipts/arms.yaml), or folders of evaluations."),
    ],
    out: Annotated[
        Path | None,
        Option(metavar="FOLDER", help="Where table.md, table.csv, cost.png, fields.png and report.html go."),
    ] = None,
    keep: Annotated[
        Path | None, Option(metavar="FOLDER", help="Also keep the folders' records here, in a small form.")
    ] = None,
    by: By = None,
    images: Annotated[int, Option(min=0, metavar="N", help="Pictures in report.html, some 50 kB each.")] = 100,
    no_images: Annotated[bool, Option("--no-images", help="No pictures in report.html.")] = False,
    no_page: Annotated[bool, Option("--no-page", help="No report.html.")] = False,
) -> None:
    """Compare evaluations: tables, figures, a page to browse the records; without --out, only print the tables."""
    from relook.evaluate.records import keep_all
    from relook.evaluate.report import collect, table_md, write

    found = collect(sources, by or ())
    written = write(found, out, None if no_page else 0 if no_images else images) if out else []
    written += keep_all(found.folders, keep) if keep else []
    print("\n".join(f"written: {path}" for path in written) if written else table_md(found))
