"""Who may do what: bearer tokens with roles on every route but health and the page itself."""

from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException

from bitfront.server.context import Context, context_of
from store.tokens import allows, find_token

bearer = HTTPBearer(auto_error=False, description="Made by `bitfront tokens create`.")
LONGEST_TOKEN = 200


class Caller:
    """Who asks: a token's name and role; nobody in particular where none is needed."""

    def __init__(self, name: str | None, role: str) -> None:
        self.name, self.role = name, role


def caller(
    request: Request,
    context: Annotated[Context, Depends(context_of)],
    given: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
) -> Caller:
    """The caller; 401 without a good token where one is needed.

    A token that is given is checked even where none is needed: a wrong one is a mistake.
    """
    request.state.word = given.credentials if given else None
    if given is None:
        if context.settings.auth:
            raise _unauthorized("this server needs a token")
        return Caller(None, "admin")
    word = given.credentials
    token = None
    if len(word) <= LONGEST_TOKEN and word.isprintable() and word.isascii():
        token = find_token(context.store, word)
    if token is None:
        raise _unauthorized("this token is unknown or revoked")
    return Caller(*token)


def still_known(context: Context, request: Request) -> bool:
    """Whether the token of a request that goes on has not been revoked since."""
    word = request.state.word
    return word is None or find_token(context.store, word) is not None


def _unauthorized(what: str) -> HTTPException:
    return HTTPException(
        401,
        f"{what}: send `Authorization: Bearer TOKEN`; `bitfront tokens create NAME` makes one on "
        "the server's store, and the commands and the Python client send $BITFRONT_TOKEN",
        {"WWW-Authenticate": "Bearer"},
    )


class _Needs:
    """A role that a route needs."""

    def __init__(self, role: str) -> None:
        self._role = role

    async def __call__(self, request: Request, who: Annotated[Caller, Depends(caller)]) -> Caller:
        if not allows(who.role, self._role):
            raise HTTPException(
                403,
                f"{request.method} here needs the role '{self._role}', and the token '{who.name}' "
                f"has '{who.role}'; ask for another token",
            )
        return who


Known = Annotated[Caller, Depends(caller)]
READ, ADMIN = Depends(_Needs("read")), Depends(_Needs("admin"))
"""Of routers: what all their routes need."""
Submitter = Annotated[Caller, Depends(_Needs("submit"))]
