"""Reading and writing times: where they were taken is part of their key, so none is taken twice."""

from collections.abc import Sequence
from dataclasses import dataclass

from store.database import Store, lasting
from store.queries import key_of, rows_of
from store.tables import CellTime, MapTime


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
    return rows_of(store, CellTime, keys)


def map_times(store: Store, keys: Sequence[str]) -> dict[str, MapTime]:
    """Those of the keys that are in the store."""
    return rows_of(store, MapTime, keys)


@lasting
def save_time(store: Store, row: CellTime | MapTime) -> None:
    """Keep a time; a later one of the same key replaces it."""
    with store.session() as session:
        session.merge(row)
