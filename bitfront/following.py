"""Commands that follow jobs, on a server or, without one, in the store itself."""

import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from bitfront.options import (
    JobArgument,
    JsonOption,
    StoreOption,
    bytes_of,
    joules_of,
    numbers_of,
    open_store,
    seconds_of,
    sizes_of,
)
from quantization.errors import BitfrontError

ServerOption = Annotated[
    str | None,
    typer.Option(
        help="A server's URL; its token is $BITFRONT_TOKEN. Default: $BITFRONT_SERVER, unless a "
        "store is named."
    ),
]
POLL_S = 1.0
WATCHING_PATIENCE_S = 900.0
LAST_LOOKS = 2
"""After a job has ended: what it found is told last."""
ENDED = ("done", "failed", "cancelled")


def desk(server: str | None, store: str | None, patience_s: float | None = None) -> Any:
    """Where jobs are handed in and asked for: a `service.Desk`."""
    if server := server_of(server, store):
        from bitfront.client import Client

        return Client(server, patience_s=patience_s) if patience_s else Client(server)
    from bitfront.service import Service

    return Service(open_store(store))


def server_of(given: str | None, store: str | None) -> str | None:
    """The server that is meant, if any: a store that is named is not a server's."""
    return given or (None if store else os.environ.get("BITFRONT_SERVER"))


def submitting(search: Callable[..., None]) -> Callable[..., None]:
    """The command `submit`: all options of `search` but those of running it here."""
    left_out = {"command", "address", "dry_run", "workers"}
    parameters = [
        p for p in inspect.signature(search).parameters.values() if p.name not in left_out
    ]
    more = {
        "workers": Annotated[int | None, typer.Option(min=1, help="Model replicas.")],
        "cpus": Annotated[float | None, typer.Option(help="Cores of each worker.")],
        "gpus": Annotated[float | None, typer.Option(help="GPUs of each worker.")],
        "accelerator_type": Annotated[str | None, typer.Option(help="Such as H100, Ray's name.")],
        "memory": Annotated[str | None, typer.Option(help="Of each worker, to reserve: 8GiB.")],
        "once": Annotated[
            str | None, typer.Option(help="A word: a submission repeated with it is the same job.")
        ],
        "server": ServerOption,
    }

    def submit(**given: Any) -> None:
        """Submit a search for MODEL to a server, or to whoever serves the store."""
        launch = {
            "workers": given.pop("workers"), "cpus": given.pop("cpus"), "gpus": given.pop("gpus"),
            "accelerator_type": given.pop("accelerator_type"),
        }  # fmt: skip
        memory = given.pop("memory")
        launch["memory_bytes"] = bytes_of(memory) if memory else None
        once, server, store, as_json = (
            given.pop(n) for n in ("once", "server", "store", "as_json")
        )
        from bitfront.job_options import job_config

        config = job_config(given)
        wanted = {name: value for name, value in launch.items() if value is not None}
        found = desk(server, store).submit(config, wanted, once)
        if as_json:
            _json(found)
            return
        typer.echo(found["id"])
        there = f" --server {server}" if server else ""
        sys.stderr.write(
            f"job {found['id']} is {found['state']}; bitfront watch {found['id']}{there}\n"
        )

    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in more.items()
    ]
    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    submit.__signature__ = inspect.Signature([*keyword, *added])  # type: ignore[attr-defined]
    submit.__annotations__ = {p.name: p.annotation for p in (*keyword, *added)}
    return submit


def status(
    job: JobArgument = None,
    server: ServerOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a job: state, progress, time left."""
    from rich.table import Table

    from bitfront.console import print_table
    from bitfront.sizes import show_seconds

    found = desk(server, store).job(job)
    if as_json:
        _json(found)
        return
    table = Table("what", "value", title=f"Job {found['id']}: {found['model']}, {found['state']}")
    at = found["progress"]
    rows = {
        "driver": "lives" if found["alive"] else "none",
        "stage": f"{at['stage']} {at['done']}/{at['steps']}" if at else "",
        "done": f"{at['share']:.0%}" if at else "",
        "left": show_seconds(at["left_s"]) if at and at["left_s"] is not None else "",
        "points": str(found["points"]),
        "engine": found["engine"] or "",
        "submitted by": found["submitted_by"] or "",
        "updated": found["updated_at"][:19],
        "error": found["error"] or "",
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    print_table(table)


def watch(
    job: JobArgument = None,
    server: ServerOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Watch a job until it ends: progress on stderr, the job as it ended on stdout."""
    number = desk(server, store).job(job)["id"]
    where = desk(server, store, WATCHING_PATIENCE_S)  # jobs outlive their server, and so do we
    with _bar() as show:
        while (found := where.job(number))["state"] not in ENDED:
            show(found)
            time.sleep(POLL_S)
    if as_json:
        _json(found)
    else:
        typer.echo(f"job {number} is {found['state']}")
    if found["state"] == "failed":
        raise BitfrontError(f"job {number} failed: {found['error']}")


def logs(
    job: JobArgument = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Until the job ends.")] = False,
    server: ServerOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a job's log."""
    from bitfront.documents import log_line

    where = desk(server, store)
    found = where.job(job)
    events, after = where.log(found["id"])
    if as_json:
        whole = events
        while events:
            events, after = where.log(found["id"], after)
            whole = [*whole, *events]
        _json(whole)
        return
    over = 0
    while True:
        for event in events:
            typer.echo(log_line(event))
        sys.stdout.flush()
        over = 0 if events or found["state"] not in ENDED else over + 1
        if (not follow and not events) or over > LAST_LOOKS:
            return
        if not events:
            time.sleep(POLL_S)
            found = where.job(found["id"])
        events, after = where.log(found["id"], after)


def cancel(
    job: Annotated[int, typer.Argument()],
    server: ServerOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stop a job; what was measured stays, and it can be resumed."""
    _said(desk(server, store).cancel(job), as_json)


def resume(
    job: Annotated[int, typer.Argument()],
    server: ServerOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a server go on with a job that failed, was cancelled, or lost its shell."""
    _said(desk(server, store).resume(job), as_json)


def solve(
    job: JobArgument = None,
    bits: Annotated[str | None, typer.Option(help="Average bits: 4.1 or 3.9,4.1.")] = None,
    max_size: Annotated[str | None, typer.Option(help="Weight bytes of the model: 90MB.")] = None,
    max_decode_latency: Annotated[str | None, typer.Option(help="Of a token: 8ms.")] = None,
    max_prefill_latency: Annotated[str | None, typer.Option(help="Of a prompt: 1.5s.")] = None,
    max_decode_energy: Annotated[str | None, typer.Option(help="Of a token: 40mJ.")] = None,
    max_prefill_energy: Annotated[str | None, typer.Option(help="Of a prompt: 20J.")] = None,
    server: ServerOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict the best maps of JOB for other budgets, from its tables, with no model loaded."""
    from rich.table import Table

    from bitfront.console import print_table
    from bitfront.sizes import show_bytes

    if not bits and not max_size:
        raise BitfrontError("give a budget: --bits 4.1 or --max-size 90MB")
    where = desk(server, store)
    number = job if job is not None else where.job(None)["id"]
    limits = {
        "decode_s": seconds_of(max_decode_latency), "prefill_s": seconds_of(max_prefill_latency),
        "decode_j": joules_of(max_decode_energy), "prefill_j": joules_of(max_prefill_energy),
    }  # fmt: skip
    given = {name: value for name, value in limits.items() if value is not None}
    found = where.solve(number, numbers_of(bits) or (), sizes_of(max_size) or (), given)
    if as_json:
        _json(found)
        return
    table = Table(
        "budget", "size", "bits", "predicted KL", "schemes", "measured as",
        title=f"Job {number} solved again, by {found['estimator']}",
    )  # fmt: skip
    for s in found["solutions"]:
        table.add_row(
            show_bytes(s["budget_bytes"]),
            show_bytes(s["weight_bytes"] + s.get("cache_bytes", 0)),
            f"{s['average_bits']:.3f}", f"{s['predicted_kl']:.4f}",
            ", ".join(f"{n} {name}" for name, n in s["schemes"].items()),
            f"point {s['measured_as']}" if s["measured_as"] else "not measured",
        )  # fmt: skip
    print_table(table)


def front_from(server: str, job: int | None, html: Path | None, as_json: bool) -> None:
    """`front` with a server: the same table, and the figure without the heat map."""
    from bitfront.client import Client
    from bitfront.console import errors, show_front

    client = Client(server)
    found = client.front(client.job(None)["id"] if job is None else job)
    if html:
        if not found["points"]:
            raise BitfrontError(f"job {found['job']} has no measured points yet: nothing to draw")
        try:
            html.parent.mkdir(parents=True, exist_ok=True)
            found.figure().write_html(html, include_plotlyjs=True)
        except OSError as error:
            raise BitfrontError(f"can't write '{html}' ({error}); name another file") from error
        errors.print(f"wrote {html}; the server's own page has more: {server}", highlight=False)
    if as_json:
        _json(found)
    else:
        show_front(found)


def export_from(
    server: str, job: int | None, point: int, to: str, output: Path, as_json: bool
) -> None:
    """Have a server export a point, and download it."""
    from bitfront.client import Client
    from bitfront.sizes import show_bytes

    client = Client(server)
    number = job if job is not None else client.job(None)["id"]
    found = client.export(number, point, to.split(","), output)
    if as_json:
        _json(found)
        return
    for file in found["files"]:
        typer.echo(f"{output / file['name']}  {show_bytes(file['bytes'])}")


@contextmanager
def _bar() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on a terminal, a line whenever the stage changes elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from bitfront.console import errors
    from bitfront.sizes import show_seconds

    last = ""
    with Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
        console=errors, disable=not errors.is_terminal, transient=True,
    ) as bars:  # fmt: skip
        task = bars.add_task("queued", total=1.0, left="")

        def show(found: dict[str, Any]) -> None:
            nonlocal last
            at = found["progress"]
            label = f"{at['stage']} {at['done']}/{at['steps']}" if at else found["state"]
            left = f"left {show_seconds(at['left_s'])}" if at and at["left_s"] is not None else ""
            bars.update(task, description=label, completed=at["share"] if at else 0.0, left=left)
            stage = at["stage"] if at else found["state"]
            if not errors.is_terminal and stage != last:
                errors.print(f"{at['share'] if at else 0:4.0%}  {stage}", highlight=False)
                last = stage

        yield show


def _said(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _json(found)
    else:
        typer.echo(f"job {found['id']} is {found['state']}")


def _json(document: Any) -> None:
    from bitfront.console import print_json

    print_json(document)
