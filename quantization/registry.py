"""Registries: a name, what it stands for, and the nearest names when somebody mistypes one."""

import difflib
from collections.abc import Iterator
from typing import Generic, TypeVar

from quantization.errors import UnknownNameError

LONGEST = 200
"""Characters of a name in an error."""
T = TypeVar("T")


def shown(part: object) -> str:
    """A name or value in an error: in one line, however it is spelled, and not without end."""
    text = str(part)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}…"
    return text if text.isprintable() else text.encode("unicode_escape").decode()


class Registry(Generic[T]):
    """An ordered table of names.

    Args:
        kind: what the names stand for, in the singular; error messages use it.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> None:
        """Register `entry`; a second registration of a name is a programming error."""
        if name in self._entries:
            raise ValueError(f"{self.kind} '{name}' is registered twice")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        """Return the entry; raises `UnknownNameError` with the nearest names."""
        if name not in self._entries:
            lower = {entry.lower(): entry for entry in reversed(self._entries)}
            near = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.4)
            near = [lower[entry] for entry in near]
            choices = near or list(self._entries)[:8]
            hint = "nearest" if near else "known"
            left = 0 if near else len(self._entries) - len(choices)
            more = f" and {left} more" if left else ""
            raise UnknownNameError(
                f"unknown {self.kind} '{shown(name)}'; {hint}: {', '.join(choices)}{more}"
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
