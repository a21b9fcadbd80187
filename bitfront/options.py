"""Options that several commands take, and how their texts are read."""

from typing import Annotated, Any

import typer

from quantization.errors import BitfrontError

JobArgument = Annotated[int | None, typer.Argument(metavar="[JOB]", help="Default: the latest.")]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", metavar="URL", help="SQLAlchemy URL. Default: $BITFRONT_STORE."),
]
AddressOption = Annotated[
    str, typer.Option(help="Ray cluster's address; 'local' starts one, 'none' uses no Ray.")
]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="How many model replicas.")]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        "--target",
        help="Serve with: llama.cpp, torch, vllm, … Its rules and bytes count, and its speed.",
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Serve on: local (measured), or one that `devices` lists.")
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Of the CPU that serves.")]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Sequences side by side.")]
ContextOption = Annotated[
    int | None, typer.Option(min=1, help="Tokens in the KV cache of each. Default: 4096.")
]
PromptOption = Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt. Default: 512.")]
GeneratedOption = Annotated[int | None, typer.Option(min=1, help="Tokens of an answer.")]
DevicesOption = Annotated[
    int | None, typer.Option(min=1, help="Devices that share every layer; memory is each one's.")
]
BUDGETS = "3.25,3.5,3.75,4.25,4.75,5.25"
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def bytes_of(text: str) -> int:
    """A size such as 80MB in bytes."""
    from bitfront.sizes import parse_bytes

    return parse_bytes(text)


def seconds_of(text: str | None) -> float | None:
    """A time such as 8ms, in seconds."""
    from bitfront.sizes import parse_seconds

    return parse_seconds(text) if text else None


def joules_of(text: str | None) -> float | None:
    """An energy such as 40mJ, in joules."""
    from bitfront.sizes import parse_joules

    return parse_joules(text) if text else None


def serving_of(
    engine: str | None,
    device: str | None,
    threads: int | None,
    batch: int | None,
    context: int | None,
    prompt: int | None,
) -> dict[str, Any]:
    """Where maps are to be served, as overrides of a job's configuration."""
    given = {
        "engine": engine, "device": device, "threads": threads, "batch": batch,
        "context": context, "prompt": prompt,
    }  # fmt: skip
    return {f"serving.{name}": value for name, value in given.items()}


def sizes_of(text: str | None) -> list[int] | None:
    """Sizes, comma-separated."""
    return [bytes_of(part) for part in text.split(",")] if text else None


def numbers_of(text: str | None) -> list[float] | None:
    """Numbers, comma-separated; BitfrontError where they are none."""
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        raise BitfrontError(f"'{text}' is not a list of numbers such as 3.5,4.25") from None


def names_of(text: str | None) -> list[str] | None:
    """Names, comma-separated."""
    return [part.strip() for part in text.split(",") if part.strip()] if text else None


def open_store(url: str | None) -> Any:
    """The store at an address, its schema checked."""
    from store.database import Store, default_url

    return Store(url or default_url()).open()
