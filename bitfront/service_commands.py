"""Commands of the service: `serve`, tokens, and the drivers that a server starts."""

import os
import socket
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from bitfront.options import JsonOption, StoreOption, open_store

tokens = typer.Typer(help="Bearer tokens of the service.", no_args_is_help=True)
DataOption = Annotated[
    Path | None,
    typer.Option(help="Folder of exports and drivers' logs. Default: beside the store."),
]


def serve(
    host: Annotated[str, typer.Option(help="Address to bind to.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8400,
    ray: Annotated[
        str,
        typer.Option(
            help="Where searches run: local (a Ray on this machine for each), none, or a cluster: "
            "http://HEAD:8265, ray://HEAD:10001, auto."
        ),
    ] = "local",
    allow: Annotated[
        list[Path] | None,
        typer.Option(help="A folder that models and texts may lie in; may be given several times."),
    ] = None,
    auth: Annotated[
        str, typer.Option(help="Tokens: auto (needed unless bound to loopback), on or off.")
    ] = "auto",
    most_running: Annotated[
        int, typer.Option("--most-running", min=1, help="Jobs and exports at the same time.")
    ] = 2,
    data: DataOption = None,
    store: StoreOption = None,
) -> None:
    """Serve the HTTP API and the page, and run what is submitted. Ends with Ctrl-C."""
    from bitfront.server.serving import default_data
    from bitfront.server.serving import serve as run
    from bitfront.server.settings import ServerError, Settings, needs_tokens
    from store.database import absolute, default_url

    roots = tuple(folder.resolve() for folder in allow or ())
    for folder in roots:
        if not folder.is_dir():
            raise ServerError(f"--allow {folder} is no folder")
    if auth not in {"auto", "on", "off"}:
        raise ServerError(f"--auth {auth}: it is auto, on or off")
    if cache := os.environ.get("BITFRONT_CACHE"):
        os.environ["BITFRONT_CACHE"] = str(Path(cache).resolve())
    settings = Settings(
        store_url=absolute(store or default_url()),  # drivers work in a folder of their own
        data=(data or default_data()).resolve(),
        ray=ray,
        roots=roots,
        auth=needs_tokens(host, auth),
        most_running=most_running,
        version=version("bitfront"),
    )
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerError(
                f"can't serve at {host}:{port} ({error.strerror}); --port names another"
            ) from error
    needed = "tokens are needed" if settings.auth else "no token is needed"
    sys.stderr.write(f"Bitfront at http://{host}:{port} ({needed}); Ctrl-C ends it\n")
    run(settings, host, port)


def drive(
    job: Annotated[int, typer.Argument(help="A submitted job.")],
    address: Annotated[str, typer.Option()] = "local",
    data: DataOption = None,  # noqa: ARG001  # all drivers get the same
    store: StoreOption = None,
) -> None:
    """Run a submitted job: what a server starts, here or as a Ray job."""
    from bitfront.driving import drive_job

    drive_job(_patient(store), job, address, os.environ.get("BITFRONT_CACHE"))


def drive_export(
    export: Annotated[int, typer.Argument(help="An export that was ordered.")],
    address: Annotated[str, typer.Option()] = "local",  # noqa: ARG001  # all drivers get the same
    data: DataOption = None,
    store: StoreOption = None,
) -> None:
    """Make an export that was ordered of a server."""
    from bitfront.driving import drive_export as drive
    from bitfront.server.serving import default_data

    drive(_patient(store), export, (data or default_data()) / "exports")


def _patient(url: str | None) -> Any:
    from bitfront.pipeline import PATIENCE_S
    from store.database import Store, default_url

    opened = Store(url or default_url(), away_patience_s=PATIENCE_S)
    return opened.open()


@tokens.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    role: Annotated[str, typer.Option(help="read, submit or admin.")] = "submit",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a token and print it, this once."""
    from bitfront.console import print_json
    from store.tokens import create_token

    word = create_token(open_store(store), name, role)
    if as_json:
        print_json({"name": name, "role": role, "token": word})
    else:
        typer.echo(word)


@tokens.command("list")
def list_all(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List tokens, without their words."""
    from rich.table import Table

    from bitfront.console import print_json, print_table
    from store.tokens import list_tokens

    rows: list[dict[str, Any]] = [
        {
            "name": token.name, "role": token.role, "created_at": token.created_at.isoformat(),
            "revoked_at": token.revoked_at and token.revoked_at.isoformat(),
        }
        for token in list_tokens(open_store(store))
    ]  # fmt: skip
    if as_json:
        print_json(rows)
        return
    table = Table("name", "role", "created", "revoked")
    for row in rows:
        cells = (row["name"], row["role"], row["created_at"][:19], (row["revoked_at"] or "")[:19])
        table.add_row(*cells)
    print_table(table)


@tokens.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a token worthless."""
    from bitfront.console import print_json
    from store.tokens import revoke_token

    revoke_token(open_store(store), name)
    if as_json:
        print_json({"name": name, "revoked": True})
    else:
        typer.echo(f"{name} is revoked")
