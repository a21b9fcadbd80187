"""Claims: who is at a task, by lease, so that nothing is done twice at the same time.

A claim lasts until its holder settles it, lets it go, or stops renewing it. What its holder brings
after that is late: `settle` says so. Time is the database's own where that is a server, so that
clocks of different machines don't matter.
"""

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import ColumnElement, delete, extract, func, literal, select, update
from sqlalchemy.orm import Session

from store.database import Store, lasting
from store.queries import KEYS_A_QUERY
from store.tables import Claim

LEASE_S = 60.0
RENEWALS = 4
"""Times that a lease is renewed before it would have expired."""
JOB, EXPORT = "job:", "export:"
"""What the claims of drivers begin with."""


def new_owner() -> str:
    """A name for this process as a holder of claims: machine, process number, and a nonce."""
    return f"{_machine()}/{os.getpid()}/{uuid4().hex}"


@lasting
def claim(store: Store, owner: str, keys: Sequence[str], lease_s: float = LEASE_S) -> set[str]:
    """Those of the keys that are the owner's now: free, expired, or its own before."""
    taken: set[str] = set()
    with store.session() as session:
        now = clock(session)
        _bury(session, keys, now)
        # SQLAlchemy has both in modules that queries needn't wait for
        dialect = session.get_bind().dialect.name
        insert: Any = import_module(f"sqlalchemy.dialects.{dialect}").insert
        for start in range(0, len(keys), KEYS_A_QUERY):
            part = keys[start : start + KEYS_A_QUERY]
            rows = [
                {"key": k, "owner": owner, "expires_at": now + lease_s} for k in sorted(set(part))
            ]
            wanted = insert(Claim)
            taking = wanted.on_conflict_do_update(
                index_elements=[Claim.key],
                set_={"owner": wanted.excluded.owner, "expires_at": wanted.excluded.expires_at},
                where=(Claim.expires_at < now) | (Claim.owner == owner),
            ).returning(Claim.key)
            taken.update(session.scalars(taking, rows))
    return taken


@lasting
def renew(store: Store, owner: str, lease_s: float = LEASE_S) -> None:
    """All of an owner's claims last for another lease from now on."""
    with store.session() as session:
        later = clock(session) + lease_s
        session.execute(update(Claim).where(Claim.owner == owner).values(expires_at=later))


@lasting
def settle(store: Store, owner: str, keys: Sequence[str]) -> set[str]:
    """Let claims go whose work is done; those that somebody else had taken over meanwhile."""
    with store.session() as session:
        mine = delete(Claim).where(Claim.owner == owner, Claim.key.in_(keys)).returning(Claim.key)
        return set(keys) - set(session.scalars(mine))


@lasting
def let_go(store: Store, owner: str) -> None:
    """Let all claims of an owner go, as when it ends or is known to be dead."""
    with store.session() as session:
        session.execute(delete(Claim).where(Claim.owner == owner))


@lasting
def holders(store: Store, keys: Sequence[str]) -> dict[str, str]:
    """The owners of those keys that somebody alive is at."""
    found: dict[str, str] = {}
    with store.reading() as session:
        for start in range(0, len(keys), KEYS_A_QUERY):
            part = keys[start : start + KEYS_A_QUERY]
            found |= _held(session, Claim.key.in_(part))
    return _living(store, found)


@lasting
def held(store: Store, prefix: str) -> dict[str, str]:
    """The owners of all keys that begin so and that somebody alive is at."""
    with store.reading() as session:
        found = _held(session, Claim.key.startswith(prefix, autoescape=True))
    return _living(store, found)


def _held(session: Session, which: ColumnElement[bool]) -> dict[str, str]:
    """The owners of claims that last, in one query: this is asked with every look at a job."""
    rows = select(Claim.key, Claim.owner).where(which, Claim.expires_at >= _now(session))
    return {key: owner for key, owner in session.execute(rows)}  # noqa: C416  # rows are no pairs


def _living(store: Store, found: dict[str, str]) -> dict[str, str]:
    """Those whose owner isn't known to be dead; the others' claims are let go."""
    dead = {owner for owner in found.values() if is_dead(owner)}
    for owner in dead:
        let_go(store, owner)
    return {key: owner for key, owner in found.items() if owner not in dead}


def is_dead(owner: str) -> bool:
    """Whether an owner was a process of this machine that is there no more."""
    machine, process, _ = owner.rsplit("/", 2)
    if machine != _machine():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _is_zombie(int(process))


def _is_zombie(process: int) -> bool:
    """Whether it has ended, and its parent doesn't know yet."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


def _bury(session: Session, keys: Sequence[str], now: float) -> None:
    """Let go what processes of this machine held that are known to be dead: no lease to wait for."""
    for start in range(0, len(keys), KEYS_A_QUERY):
        part = keys[start : start + KEYS_A_QUERY]
        owners = select(Claim.owner).where(Claim.key.in_(part), Claim.expires_at >= now).distinct()
        for owner in session.scalars(owners).all():
            if is_dead(owner):
                session.execute(delete(Claim).where(Claim.owner == owner))


def clock(session: Session) -> float:
    """Seconds since 1970, by the database's clock where it has one of its own."""
    return float(session.scalar(select(_now(session))) or 0.0)


def _now(session: Session) -> ColumnElement[Any]:
    """The same as an expression of SQL."""
    if session.get_bind().dialect.name == "sqlite":
        return literal(time.time())
    return extract("epoch", func.clock_timestamp())


@cache
def _machine() -> str:
    """Tells machines apart, and boots: process numbers mean nothing elsewhere, or afterwards."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8])
    with suppress(OSError):  # a container has process numbers of its own
        parts.append(Path("/proc/self/ns/pid").readlink().name.strip("pid:[]"))
    return ":".join(parts)
