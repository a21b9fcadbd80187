"""Commands that study rather than search: audits, formats, devices, profiles, comparisons."""

from pathlib import Path
from typing import Annotated

import typer

from bitfront.options import (
    BUDGETS,
    AddressOption,
    ContextOption,
    JobArgument,
    JsonOption,
    PromptOption,
    StoreOption,
    ThreadsOption,
    WorkersOption,
    numbers_of,
    open_store,
    serving_of,
)
from quantization.errors import BitfrontError

benches = typer.Typer(help="Comparisons with others.", no_args_is_help=True)


def audit(
    job: JobArgument = None,
    estimators: Annotated[
        str | None, typer.Option(help="Names, comma-separated. Default: all that there are.")
    ] = None,
    maps: Annotated[int, typer.Option(min=3, help="Random maps of all sizes.")] = 50,
    equal_maps: Annotated[int, typer.Option(min=0, help="Random maps of each equal size.")] = 30,
    between: Annotated[
        str | None, typer.Option(help="Average bits of the maps of all sizes: 3,5.")
    ] = None,
    equal_bits: Annotated[
        str | None, typer.Option(help="The equal sizes, in average bits: 3.25,4.25.")
    ] = None,
    flips: Annotated[int, typer.Option(min=0, help="Single flips.")] = 30,
    pairs: Annotated[
        int, typer.Option(min=0, help="Measure all pairs among so many sensitive units.")
    ] = 0,
    address: AddressOption = "local",
    workers: WorkersOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how well each sensitivity estimator predicts, on JOB's model, menu and texts.

    The best becomes the default of later searches of this model. Run again to resume.
    """
    from bitfront.auditing import AuditOptions
    from bitfront.searching import audit as run

    ends = numbers_of(between)
    if ends is not None and len(ends) != 2:
        raise BitfrontError(f"--between takes two numbers such as 3,5, not '{between}'")
    options = AuditOptions(
        tuple(estimators.split(",")) if estimators else (),
        maps,
        equal_maps,
        flips,
        pairs,
        (ends[0], ends[1]) if ends else None,
        tuple(numbers_of(equal_bits) or ()),
    )
    run(open_store(store), job, options, address, workers, as_json)


def formats(
    pattern: Annotated[
        str, typer.Argument(help="Names to show: 'int4-*', 'gguf-*', or a family such as mixture.")
    ] = "*",
    shape: Annotated[
        str, typer.Option(help="ROWSxCOLUMNS of a weight, outputs x inputs.")
    ] = "4096x4096",
    store: StoreOption = None,  # noqa: ARG001  # every command takes it
    as_json: JsonOption = False,
) -> None:
    """List weight formats: exact bytes for a shape, and who multiplies by them packed.

    The store isn't needed.
    """
    from bitfront.querying import show_formats

    show_formats(pattern, shape, as_json)


def devices(
    name: Annotated[
        str | None, typer.Argument(help="One in detail; 'local' finds out what this machine is.")
    ] = None,
    store: StoreOption = None,  # noqa: ARG001  # every command takes it
    as_json: JsonOption = False,
) -> None:
    """List the devices whose costs are known, or show one. The store isn't needed."""
    from bitfront.device_views import show_devices

    show_devices(name, as_json)


def engines(
    name: Annotated[str | None, typer.Argument(help="One's rules in full.")] = None,
    store: StoreOption = None,  # noqa: ARG001  # every command takes it
    as_json: JsonOption = False,
) -> None:
    """List who serves maps (for --engine), or show what one has kernels for."""
    from bitfront.engine_views import show_engines

    show_engines(name, as_json)


def profile(
    model: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or 'demo'.")] = "demo",
    engine: Annotated[str, typer.Option(help="Whose kernels: llama.cpp or torch.")] = "llama.cpp",
    device: Annotated[str, typer.Option(help="Where: local is the only one to measure.")] = "local",
    menu: Annotated[
        str | None, typer.Option(help="Schemes to time. Default: the engine's menu.")
    ] = None,
    threads: ThreadsOption = None,
    context: ContextOption = None,
    prompt: PromptOption = None,
    address: AddressOption = "local",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time every product that MODEL needs with the kernels that would serve it, each once.

    Run again to resume; searches with --engine use what is there.
    """
    from bitfront.config import load_config
    from bitfront.profile_views import run

    overrides = {"menu": menu, **serving_of(engine, device, threads, None, context, prompt)}
    run(load_config(model, None, overrides), open_store(store), address, as_json)


@benches.command("allocators")
def bench_allocators(
    maps: Annotated[list[Path], typer.Argument(help="Files of linear name -> bits or format.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file, or 'demo'.")] = "demo",
    text: Annotated[str, typer.Option(help="A file to measure on.")] = "python-docs",
    bits: Annotated[str, typer.Option(help="Budgets that maps compete at.")] = BUDGETS,
    chunks: Annotated[int, typer.Option(min=2)] = 24,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a chunk.")] = 512,
    quantizer: Annotated[str, typer.Option(help="The same for all maps.")] = "rtn",
    calibration_text: Annotated[str | None, typer.Option(help="For the quantizer.")] = None,
    random: Annotated[int, typer.Option(min=0, help="Random maps at each budget.")] = 3,
    address: AddressOption = "local",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare MAPS at equal bytes: KL, paired differences, random maps and finer uniform ones.

    Where a map says bits, they are symmetric integers in groups of 64: b bits cost b + 0.25.
    """
    from bitfront.allocators import Contest, run

    contest = Contest(
        model, text, tuple(maps), tuple(numbers_of(bits) or ()), chunks, length, quantizer,
        calibration_text, random=random,
    )  # fmt: skip
    run(contest, open_store(store), address, as_json)
