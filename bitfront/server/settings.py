"""What a server is told when it starts."""

from dataclasses import dataclass
from pathlib import Path

from quantization.errors import BitfrontError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_BODY_BYTES = 2**20


class ServerError(BitfrontError):
    """A server that can't be started like that."""


@dataclass(frozen=True)
class Settings:
    """Of a server.

    Args:
        store_url: an SQLAlchemy URL; drivers get it too, so it must hold on their machines.
        data: folder of exports, of drivers' logs, and of nothing else.
        ray: `local`, `none`, or the address of a cluster.
        roots: folders that models and texts may lie in, beside those of the hub.
        auth: whether every route but health needs a token.
        most_running: jobs and exports that run at the same time.
        version: of the program.
    """

    store_url: str
    data: Path
    ray: str = "local"
    roots: tuple[Path, ...] = ()
    auth: bool = True
    most_running: int = 2
    version: str = "0"


def needs_tokens(host: str, wanted: str) -> bool:
    """Whether routes need a token: unless it is bound to loopback, or somebody says otherwise.

    Raises:
        ServerError: it would be open to the network.
    """
    if wanted == "auto":
        return host not in LOOPBACK
    if wanted == "off" and host not in LOOPBACK:
        raise ServerError(
            f"--auth off opens the server at {host} to everybody who reaches it; bind it to "
            "127.0.0.1, or leave out --auth and make tokens with `bitfront tokens create`"
        )
    return wanted == "on"
