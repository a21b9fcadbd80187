"""What all routes of a server share."""

from typing import Annotated, cast

from fastapi import Depends, Path, Request

from bitfront.server.settings import Settings
from bitfront.service import Service
from store.database import Store

MOST_ID = 2**31 - 1
JobId = Annotated[int, Path(ge=1, le=MOST_ID, description="A job's number.")]
PointId = Annotated[int, Path(ge=1, le=MOST_ID, description="A point's number.")]
ExportId = Annotated[int, Path(ge=1, le=MOST_ID, description="An export's number.")]


class Context:
    """Of an application: its settings, its store, and what is done with it.

    Attributes:
        streams: of events that are open.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings, self.store = settings, store
        self.service = Service(store)
        self.streams = 0


async def context_of(request: Request) -> Context:
    """The context of the application that got a request; not worth a thread, so it isn't `def`."""
    return cast("Context", request.app.state.context)


Here = Annotated[Context, Depends(context_of)]
