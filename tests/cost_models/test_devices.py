"""The catalogue of devices, and what is found out about this machine."""

import json
from fnmatch import fnmatchcase

import pytest
from pydantic import ValidationError

from bitfront.device_views import show_devices
from cost_models import probing
from cost_models.devices import DEVICES, Device, DeviceError, load_device
from quantization.errors import UnknownNameError
from quantization.formats import FORMATS

WANTED = {
    "h100-sxm", "h100-pcie", "h200", "a100-80", "a100-40", "l40s", "rtx-4090", "rtx-5090", "b200",
    "mi300x", "jetson-agx-orin", "m3-max", "m4-max", "xeon-amx",
}  # fmt: skip
ENGINES = {"vllm", "tensorrt-llm", "llama.cpp", "torchao", "mlx"}


def a_device(**changes) -> Device:
    """A device of round numbers, whose times can be computed in the head."""
    plain = {
        "name": "round", "title": "Round numbers", "kind": "gpu", "memory_bytes": 10**10,
        "bandwidth_bytes_per_s": 1e12, "peaks": {"bf16": 1e14, "int8": 2e14},
        "vector_ops_per_s": 1e13, "launch_s": 0.0, "tile": {"m": 1, "n": 1, "units": 10**9},
        "efficiency": {"compute": {"bf16": 1.0, "int8": 1.0}, "memory": 1.0},
        "sources": ("made up",),
    }  # fmt: skip
    return Device.model_validate({**plain, **changes})


def test_the_catalogue_has_the_named_devices_and_engines():
    assert set(DEVICES) == WANTED
    assert {engine for name in DEVICES for engine in DEVICES[name].engines} == ENGINES


@pytest.mark.parametrize("name", sorted(WANTED))
def test_a_device_is_complete_or_says_why_not(name):
    device = DEVICES[name]
    assert device.name == name
    assert device.sources
    assert all("http" in source for source in device.sources)
    for field in ("memory_bytes", "bandwidth_bytes_per_s", "vector_ops_per_s"):
        assert device.need(field) > 0
    assert {"fp32", "fp16", "bf16"} <= set(device.peaks)
    for field in ("tdp_w", "idle_w", "energy", "link"):
        assert getattr(device, field) is not None or device.unknown[field]


@pytest.mark.parametrize("name", sorted(WANTED))
def test_rules_name_formats_that_exist(name):
    for rules in DEVICES[name].engines.values():
        for rule in rules:
            weights = rule.formats.partition("/")[0]
            assert any(fnmatchcase(format, weights) for format in FORMATS), rule


@pytest.mark.parametrize("name", sorted(WANTED))
def test_peaks_are_dense(name):
    """Halving a type's bits doubles its rate; a sparse peak would quadruple it."""
    peaks = DEVICES[name].peaks
    assert peaks["fp16"] == peaks["bf16"] or name == "xeon-amx"
    for narrow, wide in (("fp8", "fp16"), ("int4", "int8"), ("fp4", "fp8")):
        if narrow in peaks and wide in peaks and (name, narrow) != ("rtx-5090", "fp4"):
            assert peaks[narrow] == pytest.approx(2 * peaks[wide], rel=0.03), (narrow, wide)


def test_fp8_is_twice_fp16_on_hopper_and_missing_before_ada():
    hopper = DEVICES["h100-sxm"].peaks
    assert hopper["fp8"] == pytest.approx(2 * hopper["fp16"], rel=1e-3)
    assert "fp8" not in DEVICES["a100-80"].peaks
    assert "int4" not in hopper  # Hopper dropped Ampere's INT4 tensor cores


def test_engines_fall_back_to_wider_arithmetic():
    """FP8 weights and inputs: native on an H100, 16-bit arithmetic on an A100."""
    assert DEVICES["h100-sxm"].rule("vllm", "fp8-e4m3", "fp8").arithmetic == "fp8"
    fallback = DEVICES["a100-80"].rule("vllm", "fp8-e4m3", "fp8")
    assert (fallback.arithmetic, "falls back" in fallback.remark) == ("bf16", True)
    assert DEVICES["a100-80"].rule("vllm", "int3-g64", "bf16") is None
    with pytest.raises(UnknownNameError, match=r"nearest: vllm"):
        DEVICES["a100-80"].rule("vlm", "bf16", "bf16")


def test_an_unknown_device_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown device 'h100'; nearest: .*h100-sxm"):
        load_device("h100")


def test_a_device_is_a_closed_model():
    with pytest.raises(ValidationError, match=r"Extra inputs"):
        a_device(bandwith=1)
    with pytest.raises(ValidationError, match=r"must name the types of peaks"):
        a_device(peaks={"bf16": 1e14})
    with pytest.raises(ValidationError, match=r"computes in fp8, which has no peak"):
        a_device(engines={"x": ({"formats": "*", "arithmetic": "fp8"},)})


def test_what_is_unknown_is_refused_with_its_reason():
    device = a_device(bandwidth_bytes_per_s=None, unknown={"bandwidth_bytes_per_s": "no ruler"})
    with pytest.raises(DeviceError, match=r"'round' has no bandwidth_bytes_per_s \(no ruler\)"):
        device.need("bandwidth_bytes_per_s")
    assert a_device().arithmetic("fp16") == "bf16"
    with pytest.raises(DeviceError, match=r"no peak for fp16"):
        a_device(peaks={}, efficiency={"compute": {}, "memory": 1}).arithmetic("fp16")


def test_this_machine_is_found_out(monkeypatch):
    """Whatever it is: numbers or reasons, never an exception."""
    monkeypatch.setattr(probing, "MOST_BYTES", 2**24)  # a quick look instead of a good one
    monkeypatch.setattr(probing, "LEAST_BYTES", 2**22)
    device = load_device("local")
    assert device.name == "local"
    for field in ("memory_bytes", "bandwidth_bytes_per_s", "vector_ops_per_s", "tdp_w"):
        assert getattr(device, field) or device.unknown[field]
    assert device.peaks or device.unknown["peaks"]
    assert {"rapl", "nvml"} <= set(device.facts)


def test_limits_of_a_container_count(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr(probing, "CGROUPS", tmp_path)
    assert probing.memory_limit_bytes() == 1_000_000
    assert probing.core_limit() == 0.5
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert probing.core_limit() >= 1
    assert probing.memory_limit_bytes() != 1_000_000


def test_a_machine_that_tells_nothing_is_still_a_device(monkeypatch, tmp_path):
    monkeypatch.setattr(probing, "_cpuinfo", lambda: ("mystery", set(), None))
    monkeypatch.setattr(probing, "memory_limit_bytes", lambda: None)
    monkeypatch.setattr(probing, "RAPL", tmp_path / "intel-rapl:0" / "energy_uj")
    monkeypatch.setattr(probing, "MOST_BYTES", 2**22)
    device = probing._processor()
    assert (device.peaks, device.memory_bytes) == ({}, None)
    assert device.unknown["peaks"] == "the system doesn't tell the clock"
    assert "doesn't exist" in device.facts["rapl"]


def test_devices_are_printed_and_dumped(capsys):
    show_devices(None, as_json=True)
    assert {device["name"] for device in json.loads(capsys.readouterr().out)} == WANTED
    show_devices("h100-sxm", as_json=True)
    assert json.loads(capsys.readouterr().out)["peaks"]["fp8"] == 1.9789e15
    show_devices(None, as_json=False)
    show_devices("m3-max", as_json=False)
    shown = capsys.readouterr().out
    assert "Apple publishes none" in shown
    assert "mlx" in shown
