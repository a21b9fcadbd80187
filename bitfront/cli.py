"""The command line. Results go to stdout, everything else to stderr; heavy imports wait inside."""

import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from bitfront import following, service_commands, storekeeping, studies
from bitfront.following import ServerOption
from bitfront.options import (
    AddressOption,
    BatchOption,
    ContextOption,
    DeviceOption,
    DevicesOption,
    EngineOption,
    GeneratedOption,
    JobArgument,
    JsonOption,
    PromptOption,
    StoreOption,
    ThreadsOption,
    WorkersOption,
    bytes_of,
    joules_of,
    open_store,
    seconds_of,
)
from quantization.errors import BitfrontError
from search.errors import SearchError
from store.errors import StoreError

app = typer.Typer(
    name="bitfront",
    help="Hardware-aware bit-allocation search: measured Pareto fronts of precision maps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(storekeeping.database, name="db")
app.add_typer(studies.benches, name="bench")
app.command()(studies.audit)
app.command()(studies.formats)
app.command()(studies.devices)
app.command()(studies.engines)
app.command()(studies.profile)
app.command()(service_commands.serve)
app.command(hidden=True)(service_commands.drive)
app.command("drive-export", hidden=True)(service_commands.drive_export)
app.add_typer(service_commands.tokens, name="tokens")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bitfront {version('bitfront')}")
        raise typer.Exit


@app.callback()
def common(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Hardware-aware bit-allocation search: measured Pareto fronts of precision maps."""


@app.command()
def search(  # its options are read from the context, by `job_config`
    command: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Hub id, folder, .gguf file, or 'demo' for SmolLM2-135M.")
    ],
    config: Annotated[
        Path | None, typer.Option("-c", "--config", help="A job's YAML; flags overrule it.")
    ] = None,
    menu: Annotated[
        str | None,
        typer.Option(help="A shipped menu, a YAML file, or schemes: int4-g64,int8-g64."),
    ] = None,
    kv_menu: Annotated[
        str | None,
        typer.Option(help="Formats of the KV cache, layer by layer: bf16,int8-g32,int4-g32."),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(help="Budgets as average bits, scales included: 3.5,4.25. Default: a sweep."),
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(help="Budgets as weight bytes of the model: 80MB,100MB.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="One source for all three texts: a file, or datasets:ID:CONFIG:SPLIT."),
    ] = None,
    calibration_text: Annotated[str | None, typer.Option(help="Source of one text.")] = None,
    search_text: Annotated[str | None, typer.Option(help="Source of one text.")] = None,
    heldout_text: Annotated[str | None, typer.Option(help="Source of one text.")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model folder's own code.")
    ] = False,
    quantizer: Annotated[
        str | None, typer.Option(help="rtn, rtn-mse, rtn-weighted, gptq, yaqa, hqq or autoround.")
    ] = None,
    imatrix: Annotated[
        str | None, typer.Option(help="A llama.cpp importance matrix, instead of calibration's.")
    ] = None,
    bank: Annotated[
        str | None, typer.Option(help="What workers keep of each scheme: auto, values or packed.")
    ] = None,
    estimators: Annotated[
        str | None,
        typer.Option(help="Sensitivity by these, comma-separated; auto: the model's audited best."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Arithmetic: auto, bfloat16 or float32.")
    ] = None,
    transform: Annotated[
        str | None, typer.Option(help="Rescale channels first: awq or smoothquant.")
    ] = None,
    refine: Annotated[
        int | None,
        typer.Option(help="Measurements (a map on a chunk) to refine maps with; 0 for none."),
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="How: refine, evolve, surrogate, or optuna:SAMPLER.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Refine for so long at most; 0.5 or more.", min=0.5)
    ] = None,
    interactions: Annotated[
        int | None, typer.Option(help="Units whose pairs are measured where sums predict badly.")
    ] = None,
    engine: EngineOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    batch: BatchOption = None,
    context: ContextOption = None,
    prompt: PromptOption = None,
    generated: GeneratedOption = None,
    tensor_parallel: DevicesOption = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Weights, KV cache and activations together: 2GiB.")
    ] = None,
    max_decode_latency: Annotated[
        str | None, typer.Option(help="Of a generated token: 8ms.")
    ] = None,
    max_prefill_latency: Annotated[str | None, typer.Option(help="Of a prompt: 1.5s.")] = None,
    max_decode_energy: Annotated[
        str | None,
        typer.Option(help="Of a generated token (of each sequence), all devices together: 40mJ."),
    ] = None,
    max_prefill_energy: Annotated[str | None, typer.Option(help="Of a prompt: 20J.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of random controls and refinement.")] = None,
    address: AddressOption = "local",
    workers: WorkersOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print units, menu, sizes and measurements only.")
    ] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search precision maps for MODEL, measure them, keep the front. Run again to resume."""
    from bitfront.job_options import job_config
    from bitfront.searching import dry_run as print_plan
    from bitfront.searching import run

    job = job_config(command.params)
    if dry_run:
        print_plan(job, as_json)
    else:
        run(job, open_store(store), address, workers, as_json)


app.command("submit")(following.submitting(search))
for follow in (
    following.status,
    following.watch,
    following.logs,
    following.cancel,
    following.resume,
    following.solve,
):
    app.command()(follow)


@app.command()
def front(
    job: JobArgument = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a self-contained page: front and heat map.")
    ] = None,
    server: ServerOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the measured Pareto front of JOB, its controls and what they tell."""
    if server := following.server_of(server, store):
        following.front_from(server, job, html, as_json)
        return
    from bitfront.console import errors, print_json, show_front
    from bitfront.documents import front_document
    from bitfront.fronts import load_front
    from store.queries import find_job

    opened = open_store(store)
    found = load_front(opened, find_job(opened, job))
    if html:
        from bitfront.report import write_report

        write_report(found, html)
        errors.print(f"wrote {html}", highlight=False)
    if as_json:
        print_json(found.to_json())
    else:
        show_front(front_document(found))


@app.command()
def query(
    job: JobArgument = None,
    max_size: Annotated[str | None, typer.Option(help="Weight bytes: 100MB, 1.5GiB.")] = None,
    max_bits: Annotated[float | None, typer.Option(help="Average bits.")] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Nats per token; then the smallest map is best.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Weights and KV cache of the workload: 2GiB.")
    ] = None,
    max_decode_latency: Annotated[
        str | None, typer.Option(help="Of a generated token, in the job's workload: 8ms.")
    ] = None,
    max_prefill_latency: Annotated[
        str | None, typer.Option(help="Of a prompt, in the job's workload: 1.5s.")
    ] = None,
    max_decode_energy: Annotated[
        str | None, typer.Option(help="Of a generated token: 40mJ.")
    ] = None,
    max_prefill_energy: Annotated[str | None, typer.Option(help="Of a prompt: 20J.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences side by side. Default: the job's, or 1.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens kept for each. Default: the job's, or 4096.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="All jobs of this model, by its name, instead of JOB.")
    ] = None,
    server: ServerOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the best measured map of JOB, or of all jobs of a model, under constraints."""
    from bitfront.querying import run_query

    limits = {
        "weight_bytes": bytes_of(max_size) if max_size else None,
        "average_bits": max_bits,
        "kl": max_kl,
        "memory_bytes": bytes_of(max_memory) if max_memory else None,
        "decode_s": seconds_of(max_decode_latency),
        "prefill_s": seconds_of(max_prefill_latency),
        "decode_j": joules_of(max_decode_energy),
        "prefill_j": joules_of(max_prefill_energy),
    }
    where = {"job": job, "model": model, "batch": batch, "context": context}
    run_query(following.desk(server, store), limits, where, as_json)


@app.command()
def export(
    point: Annotated[int, typer.Option(help="A point's number, as `front` shows it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    job: JobArgument = None,
    to: Annotated[
        str, typer.Option(help="One target or several: map, safetensors, gguf, packed, …")
    ] = "map",
    force: Annotated[bool, typer.Option("--force", help="Write into a folder in use.")] = False,
    server: ServerOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a point of JOB for a target, reload it with the target's loader, and compare."""
    if server := following.server_of(server, store):
        following.export_from(server, job, point, to, output, as_json)
        return
    from bitfront.console import print_json
    from bitfront.exporting import export_point, show
    from bitfront.fronts import load_front
    from store.queries import find_job

    opened = open_store(store)
    found = load_front(opened, find_job(opened, job))
    written = export_point(opened, found, point, to.split(","), output, force)
    if as_json:
        print_json(written[0] if len(written) == 1 else {"exports": written})
        return
    for line in show(written):
        typer.echo(line)


@app.command()
def apply(
    precision_map: Annotated[
        Path,
        typer.Argument(
            metavar="MAP",
            help="A map of ours, bits by layer, tensor types, a GGUF file, or a quantized model's "
            "config.json.",
        ),
    ],
    model: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or 'demo'.")] = "demo",
    job: Annotated[
        int | None, typer.Option(help="Whose front it joins. Default: the newest it can.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Source of the texts, where a new job begins.")
    ] = None,
    address: AddressOption = "local",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a map that somebody else made for MODEL: a point of a job's front."""
    from bitfront.applying import apply as apply_map
    from bitfront.console import errors, front_table, print_json, print_table
    from bitfront.documents import front_document

    front, number = apply_map(open_store(store), precision_map, model, job, address, text)
    point = next(p for p in front.to_json()["points"] if p["id"] == number)
    if as_json:
        print_json({"job": front.job.id, "model": front.model.name, "point": point})
        return
    print_table(front_table(front_document(front)))
    errors.print(
        f"The map is point {number}: KL {point['kl']:.5f} nats per token at "
        f"{point['average_bits']:.4f} bits; {'on' if point['on_front'] else 'behind'} the front.",
        highlight=False,
    )
    for finding in front.findings:
        if f"point {number})" in finding:
            errors.print(finding, highlight=False)


@app.command()
def jobs(
    server: ServerOption = None, store: StoreOption = None, as_json: JsonOption = False
) -> None:
    """List the jobs, newest first."""
    from bitfront.querying import show_jobs

    show_jobs(following.desk(server, store), as_json)


def main() -> None:
    """The command `bitfront`: errors become one line and exit status 1."""
    results = os.dup(1)  # C libraries (HiGHS) print to descriptor 1 when they like: drop that
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = os.fdopen(results, "w", encoding="utf-8", closefd=True)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except (BitfrontError, SearchError, StoreError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except _InterruptedError:
        _say_interrupted()
    except SystemError as error:  # ray's C code wraps what the handler raises in the middle of it
        if not isinstance(error.__cause__, _InterruptedError):
            raise
        _say_interrupted()
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os._exit(1)
    except OSError as error:
        sys.stderr.write(f"error: {error}; mend it, then run the same command again\n")
        sys.exit(1)


class _InterruptedError(BaseException):
    """Ctrl-C, in a form that typer doesn't turn into a bare exit."""


def _say_interrupted() -> None:
    sys.stderr.write("interrupted; run the same command again to go on\n")
    sys.exit(130)


def _interrupt(*_: object) -> None:
    raise _InterruptedError
