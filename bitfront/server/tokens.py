"""Routes of tokens, for those who may do everything."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict, Field

from bitfront.documents import when
from bitfront.server.context import Here
from bitfront.server.problems import responses
from bitfront.server.security import ADMIN
from store.tokens import create_token, list_tokens, revoke_token

router = APIRouter(
    prefix="/tokens",
    tags=["tokens"],
    dependencies=[ADMIN],
    responses=responses(401, 403, 404, 409, 422, 503),
)
NAME = r"^[\w@+][\w.@+-]{0,79}$"  # no "..", which no address can end in


class NewToken(BaseModel):
    """A token to make."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=NAME)
    role: Literal["read", "submit", "admin"] = "submit"


@router.get("")
def list_all(context: Here) -> dict[str, Any]:
    """All tokens, without their words."""
    return {
        "tokens": [
            {
                "name": token.name, "role": token.role, "created_at": when(token.created_at),
                "revoked_at": token.revoked_at and when(token.revoked_at),
            }
            for token in list_tokens(context.store)
        ]
    }  # fmt: skip


@router.post("", status_code=201, responses=responses(400, 413))
def create(context: Here, wanted: NewToken) -> dict[str, Any]:
    """Make a token; its word is shown this once."""
    word = create_token(context.store, wanted.name, wanted.role)
    return {"name": wanted.name, "role": wanted.role, "token": word}


@router.delete("/{name}", status_code=204)
def revoke(context: Here, name: Annotated[str, Path(pattern=NAME)]) -> None:
    """Revoke a token."""
    revoke_token(context.store, name)
