"""The errors of the store, each with what to do next."""


class StoreError(Exception):
    """Base: the database can't be used, in one line."""


class NotFoundError(StoreError):
    """No such job or point."""


class StoreAwayError(StoreError):
    """The database server can't be reached just now."""


class StoreLockedError(StoreError):
    """Another program writes to the same SQLite file."""


class ConflictError(StoreError):
    """What is asked doesn't fit the state that something is in."""
