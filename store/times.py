"""Reading and writing times: where they were taken is part of their key, so none is taken twice."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import select

from store.database import Store
from store.queries import KEYS_A_QUERY, key_of
from store.tables import CellTime, MapTime

Row = TypeVar("Row", CellTime, MapTime)


@dataclass(frozen=True)
class Place:
    """Where times were taken.

    Args:
        device: what tells the machine from others.
        engine: whose kernels they are.
        kernels: the version of its kernels.
        threads: of the CPU; 1 on GPUs.
    """

    device: str
    engine: str
    kernels: str
    threads: int

    def of(self, *what: object) -> str:
        """The key of a time that was taken here."""
        return key_of(self.device, self.engine, self.kernels, self.threads, *what)


def cell_times(store: Store, keys: Sequence[str]) -> dict[str, CellTime]:
    """Those of the keys that are in the store."""
    return _rows(store, CellTime, keys)


def map_times(store: Store, keys: Sequence[str]) -> dict[str, MapTime]:
    """Those of the keys that are in the store."""
    return _rows(store, MapTime, keys)


def save_time(store: Store, row: CellTime | MapTime) -> None:
    """Keep a time; a later one of the same key replaces it."""
    with store.session() as session:
        session.merge(row)


def cells_at(store: Store, place: Place) -> list[CellTime]:
    """All products that were timed at a place."""
    with store.session() as session:
        query = select(CellTime).filter_by(**_columns(place)).order_by(
            CellTime.batch, CellTime.rows, CellTime.columns, CellTime.kernel
        )  # fmt: skip
        return list(session.scalars(query))


def _columns(place: Place) -> dict[str, Any]:
    return dict(vars(place))


def _rows(store: Store, table: type[Row], keys: Sequence[str]) -> dict[str, Row]:
    found: dict[str, Row] = {}
    with store.session() as session:
        for start in range(0, len(keys), KEYS_A_QUERY):
            part = keys[start : start + KEYS_A_QUERY]
            for row in session.scalars(select(table).where(table.key.in_(part))):
                found[row.key] = row
    return found
