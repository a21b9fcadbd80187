"""Bearer tokens: random words whose SHA-256 is kept, each with a role."""

import hashlib
import secrets

from sqlalchemy import select

from store.database import Store, lasting
from store.errors import ConflictError, NotFoundError, StoreError
from store.tables import Token, now

ROLES = ("read", "submit", "admin")
"""Each may what those before it may."""
PREFIX = "bf_"


def create_token(store: Store, name: str, role: str) -> str:
    """A new token, which is shown this once.

    Raises:
        StoreError: no such role.
        ConflictError: the name is taken.
    """
    if role not in ROLES:
        raise StoreError(f"no role '{role}'; there are {', '.join(ROLES)}")
    word = PREFIX + secrets.token_urlsafe(32)
    _insert(store, name, _hash(word), role)
    return word


def revoke_token(store: Store, name: str) -> None:
    """A token opens nothing any more.

    Raises:
        NotFoundError: no such token, or none that is still good.
    """
    if not _revoke(store, name):
        raise NotFoundError(f"no token '{name}' that is still good; see `bitfront tokens list`")


@lasting
def list_tokens(store: Store) -> list[Token]:
    """All tokens, oldest first; revoked ones too."""
    with store.reading() as session:
        return list(session.scalars(select(Token).order_by(Token.created_at, Token.name)))


@lasting
def find_token(store: Store, word: str) -> tuple[str, str] | None:
    """Name and role of the token that a word is, if it is good.

    Looked up by hash: time tells nothing of others.
    """
    query = select(Token.name, Token.role)
    with store.reading() as session:
        found = session.execute(
            query.where(Token.hash == _hash(word), Token.revoked_at.is_(None))
        ).one_or_none()
        return found and (found.name, found.role)


def allows(role: str, wanted: str) -> bool:
    """Whether a role may what another one may."""
    return ROLES.index(role) >= ROLES.index(wanted)


@lasting
def _insert(store: Store, name: str, hashed: str, role: str) -> None:
    with store.session() as session:
        found = session.get(Token, name)
        if found is not None and found.hash != hashed:
            raise ConflictError(f"there is a token '{name}' already; choose another name")
        session.merge(Token(name=name, hash=hashed, role=role))


@lasting
def _revoke(store: Store, name: str) -> bool:
    with store.session() as session:
        found = session.get(Token, name)
        if found is None or found.revoked_at is not None:
            return False
        found.revoked_at = now()
        return True


def _hash(word: str) -> str:
    # a random word of 256 bits can't be guessed, so a slow hash would protect nothing
    return hashlib.sha256(word.encode()).hexdigest()
