"""Commands that keep the store: its schema, and what may go."""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from bitfront.options import JsonOption, StoreOption, open_store
from quantization.errors import BitfrontError

database = typer.Typer(help="The store: its schema, and what may go.", no_args_is_help=True)
AGE = re.compile(r"(\d{1,5})([dh])")


@database.command("upgrade")
def upgrade(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Bring the store's schema up to date."""
    _migrate(store, None, as_json)


@database.command("downgrade")
def downgrade(
    revision: Annotated[str, typer.Argument(help="Such as 0003; `upgrade` prints them.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take the schema back, for an older program; what that has no place for is lost."""
    _migrate(store, revision, as_json)


@database.command("prune")
def prune(
    older_than: Annotated[str, typer.Option(help="Days or hours: 90d, 12h.")] = "90d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what is old and no front, export or unfinished job refers to."""
    from store.retention import prune as run

    found = AGE.fullmatch(older_than)
    if not found:
        raise BitfrontError(f"--older-than '{older_than}' is no age such as 90d or 12h")
    count, unit = int(found[1]), {"d": "days", "h": "hours"}[found[2]]
    gone = run(
        open_store(store), datetime.now(UTC) - timedelta(**{unit: count}), really=not dry_run
    ).to_json()
    if as_json:
        from bitfront.console import print_json

        print_json({**gone, "dry_run": dry_run})
        return
    verb = "would go" if dry_run else "went"
    for table, rows in gone.items():
        typer.echo(f"{table.replace('_', ' ')}: {rows:,} {verb}")


def _migrate(url: str | None, revision: str | None, as_json: bool) -> None:
    from store.database import Store, default_url

    opened = Store(url or default_url())
    before = opened.version()
    if revision is None:
        opened.upgrade()
    else:
        opened.downgrade(revision)
    after = opened.version()
    if as_json:
        from bitfront.console import print_json

        print_json({"before": before, "after": after})
    else:
        typer.echo(f"schema {before or 'empty'} -> {after}")
