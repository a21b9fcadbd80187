"""What `devices` prints: the catalogue, or one device in full."""

from typing import Any

from rich.table import Table

from bitfront.console import print_json, print_table
from bitfront.sizes import show_bytes
from cost_models.devices import DEVICES, LOCAL, Device, load_device


def show_devices(name: str | None, as_json: bool) -> None:
    """Print the catalogue, or the device `name` in full; `local` is this machine.

    Raises:
        UnknownNameError: no such device, with the nearest.
        DeviceError: a file of the catalogue is wrong.
    """
    if name is not None:
        _show_one(load_device(name), as_json)
        return
    devices = [DEVICES[entry] for entry in DEVICES]
    if as_json:
        print_json([document(device) for device in devices])
        return
    table = Table(
        "name", "device", "memory", "bandwidth", "bf16", "fp8", "int8", "fp4", "TDP", "engines",
        caption=f"Peaks are dense TFLOPS or TOPS. '{LOCAL}' is this machine: bitfront devices "
        f"{LOCAL}. Sources and rules: bitfront devices NAME.",
        caption_justify="left",
    )  # fmt: skip
    for device in devices:
        table.add_row(
            device.name, device.title,
            _size(device.memory_bytes), _rate(device.bandwidth_bytes_per_s),
            *(_tera(device.peaks.get(kind)) for kind in ("bf16", "fp8", "int8", "fp4")),
            "" if device.tdp_w is None else f"{device.tdp_w:g} W", ", ".join(device.engines),
        )  # fmt: skip
    print_table(table)


def _show_one(device: Device, as_json: bool) -> None:
    if as_json:
        print_json(document(device))
        return
    table = Table("what", "value", title=device.title, title_justify="left")
    for label, value in _rows(device):
        table.add_row(label, value)
    print_table(table)
    if not device.engines:
        return
    rules = Table("engine", "weights/inputs", "computed in", "remark", title="Kernels")
    for engine, entries in device.engines.items():
        for rule in entries:
            rules.add_row(engine, rule.formats, rule.arithmetic, rule.remark or "")
    print_table(rules)


def _rows(device: Device) -> list[tuple[str, str]]:
    def known(field: str, shown: str | None) -> str:
        return shown or f"unknown: {device.unknown.get(field, 'not in its description')}"

    compute = device.efficiency.compute
    return [
        ("name", device.name),
        ("kind", device.kind),
        ("memory", known("memory_bytes", _size(device.memory_bytes))),
        ("bandwidth", known("bandwidth_bytes_per_s", _rate(device.bandwidth_bytes_per_s))),
        ("reached of it", f"{device.efficiency.memory:.0%}"),
        *(
            (f"peak {kind}", f"{_tera(peak)} Tera/s, {compute[kind]:.0%} of it reached")
            for kind, peak in device.peaks.items()
        ),
        *([] if device.peaks else [("peaks", known("peaks", None))]),
        ("vector units", known("vector_ops_per_s", _tera(device.vector_ops_per_s))),
        ("a launch", f"{device.launch_s * 1e6:g} us"),
        ("power limit", known("tdp_w", f"{device.tdp_w:g} W" if device.tdp_w else None)),
        ("energy", known("energy", device.energy.source if device.energy else None)),
        (
            "link",
            known(
                "link",
                f"{_rate(device.link.bandwidth_bytes_per_s)} one way, up to {device.link.ranks}"
                if device.link
                else None,
            ),
        ),
        *((label, _plain(value)) for label, value in device.facts.items()),
        *(("source", source) for source in device.sources),
    ]


def document(device: Device) -> dict[str, Any]:
    """A device, as `bitfront devices --json` prints it."""
    return device.model_dump(mode="json")


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _size(count: int | None) -> str:
    return "" if count is None else show_bytes(count)


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{show_bytes(rate)}/s"


def _tera(rate: float | None) -> str:
    return "" if rate is None else f"{rate / 1e12:.4g}"
