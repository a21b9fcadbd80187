"""The bank: quantized once, mapped and never copied, whole or absent."""

import errno
import os
from dataclasses import replace

import pytest
import torch

from evaluation.assembly import AssembledModel
from quantization import bank as bank_module
from quantization.adapter import describe
from quantization.bank import Bank
from quantization.checkpoints import load_model
from quantization.errors import BankError, QuantizationError
from quantization.formats import FORMATS
from quantization.kernels.packed_weight import PackedWeight
from quantization.quantizers import QUANTIZERS
from quantization.quantizers.gptq import GPTQ
from quantization.schemes import Scheme
from quantization.statistics import NOTHING_KNOWN, Statistics
from tests.conftest import MENU, choices_of

RTN = QUANTIZERS["rtn"]


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_entries_are_what_the_quantizer_gives(make_bank, family):
    """Packed and transposed experts included."""
    bank = make_bank(family)
    parameters = load_model(bank.checkpoint, torch.float32).state_dict()
    for unit in bank.layout.units:
        for scheme in MENU if unit.layer is not None else []:
            for site in unit.stored:
                weight = parameters[site.parameter]
                weight = weight.mT if site.transposed else weight
                expected = RTN.quantize(weight, FORMATS[scheme.weight]).dequantize()
                found = bank.tensors(unit, scheme)[site.parameter]
                assert torch.equal(found.mT if site.transposed else found, expected)


def test_statistics_are_asked_for_read_and_named(make_bank, tmp_path, monkeypatch):
    """Only for entries that need them; another text makes another entry."""
    monkeypatch.setenv("BITFRONT_CACHE", str(tmp_path))
    source = make_bank("llama")
    choices = choices_of(source.layout, [Scheme("int3-g32"), Scheme("squeezellm3")])

    def bank(quantizer, text):
        known = Statistics(text)
        return Bank(
            source.checkpoint, source.layout, QUANTIZERS[quantizer], torch.float32, tmp_path, known
        )

    plain, gptq, other = bank("rtn", "a"), bank("gptq", "a"), bank("gptq", "b")
    inside = [s for u in source.layout.units if u.layer is not None for s in u.stored]
    assert plain.wanted(choices) == {"fisher": inside}
    assert gptq.wanted(choices) == {"fisher": inside, "second-moment": inside}
    assert set(gptq.missing(choices)) & set(other.missing(choices)) == {
        path for path in gptq.missing(choices) if "@" not in path.name
    }
    for site in inside:
        moment = torch.eye(site.shape[-1]) + torch.rand(site.shape[-1], 1)
        moment = moment @ moment.T
        gptq.statistics.save(site, "second-moment", {"second_moment": moment})
    assert gptq.wanted(choices) == {"fisher": inside}
    gptq.build(choices)
    plain.build(choices)
    unit = next(u for u in source.layout.units if u.layer is not None)
    name, scheme = unit.stored[0].parameter, Scheme("int3-g32")
    assert not torch.equal(gptq.tensors(unit, scheme)[name], plain.tensors(unit, scheme)[name])


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_packed_bank_holds_exactly_the_formats_bytes_and_the_same_values(
    make_bank, tmp_path, family
):
    values = make_bank(family)
    packed = Bank(values.checkpoint, values.layout, RTN, torch.float32, tmp_path, packed=True)
    choices = choices_of(values.layout)
    packed.build(choices)
    for unit in values.layout.units:
        for scheme in MENU if unit.layer is not None else []:
            found, expected = packed.tensors(unit, scheme), values.tensors(unit, scheme)
            for site in unit.stored:
                weight = found[site.parameter]
                assert isinstance(weight, PackedWeight)
                assert weight.packed_bytes == FORMATS[scheme.weight].nbytes(site.shape)
                assert torch.equal(weight.dequantize(), expected[site.parameter])
    models = [AssembledModel(bank, torch.device("cpu")) for bank in (values, packed)]
    ids = torch.arange(2, 40)[None]
    for scheme in (*MENU, None):
        logits = []
        for model in models:
            rows = None if scheme is None else [scheme if len(r) > 1 else r[0] for r in choices]
            model.assign(rows)
            with torch.inference_mode():
                logits.append(model.module(ids).logits)
        assert torch.allclose(*logits, rtol=1e-3, atol=1e-4)


class Tipping(type(RTN)):
    """Gives other codes at each call, as feedback does when sums are made in another order."""

    name, calls = "tipping", 0

    def quantize(self, weight, format, statistics=NOTHING_KNOWN):
        found = super().quantize(weight, format, statistics)
        Tipping.calls += 1
        codes = found.codes.clone()
        codes[..., 0, Tipping.calls % 7] = 0
        return replace(found, codes=codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int3-g32", "int8-g32", "nf4-g32", "squeezellm3", "mxfp4"])
def test_bytes_stand_for_the_values_that_were_measured(make_bank, tmp_path, name, dtype):
    """Whatever the quantizer gives the second time; another model's values are still refused."""
    source, scheme = make_bank("llama"), Scheme(name)
    bank = Bank(source.checkpoint, source.layout, Tipping(), dtype, tmp_path)
    bank.build(choices_of(bank.layout, [scheme]))
    unit = next(u for u in bank.layout.units if u.layer is not None)
    parameter = unit.stored[0].parameter
    before = Tipping.calls
    packed = bank.packed_parameters(unit, scheme, parameter)
    assert Tipping.calls == before + 1
    values = FORMATS[name].decode(*FORMATS[name].unpack(packed)).to(dtype)
    assert torch.equal(values, bank.tensors(unit, scheme)[parameter])
    bank._weights = {**bank._weights, parameter: 1.7 * bank._weights[parameter]}
    with pytest.raises(BankError, match="quantized otherwise than it was measured"):
        bank.packed_parameters(unit, scheme, parameter)


def test_bytes_of_measured_values_take_no_second_sweep(make_bank, tmp_path, monkeypatch):
    source, scheme = make_bank("llama"), Scheme("int3-g32")
    bank = Bank(source.checkpoint, source.layout, QUANTIZERS["gptq"], torch.float32, tmp_path)
    bank.build(choices_of(bank.layout, [scheme]))
    unit = next(u for u in bank.layout.units if u.layer is not None)
    parameter = unit.stored[0].parameter
    monkeypatch.setattr(GPTQ, "quantize_alike", None)  # calling it would be an error
    packed = bank.packed_parameters(unit, scheme, parameter)
    values = FORMATS["int3-g32"].decode(*FORMATS["int3-g32"].unpack(packed))
    assert torch.equal(values, bank.tensors(unit, scheme)[parameter])


def test_a_second_build_loads_and_quantizes_nothing(make_bank, monkeypatch):
    bank = make_bank("llama")
    again = Bank(bank.checkpoint, bank.layout, RTN, bank.dtype)
    monkeypatch.setattr(bank_module, "open_weights", None)  # calling it would be an error
    again.build(choices_of(bank.layout))
    assert again.missing(choices_of(bank.layout)) == []


def test_a_bank_is_built_in_pieces_and_none_is_made_twice(make_bank, tmp_path):
    source = make_bank("llama")
    bank = Bank(source.checkpoint, source.layout, RTN, torch.float32, tmp_path)
    choices = choices_of(bank.layout)
    expected = {path.name for path in bank.missing(choices)}
    missing, written = [len(expected)], {}
    for _ in bank.building(choices):
        missing.append(len(bank.missing(choices)))
        files = {f.name: f.stat().st_mtime_ns for f in bank.folder.iterdir()}
        assert all(files[name] == at for name, at in written.items())
        written = files
    assert len(missing) > len(MENU)
    assert missing == sorted(set(missing), reverse=True)
    assert bank.missing(choices) == []
    written = {f.name for f in bank.folder.iterdir()}
    assert written == expected
    for name in written:
        assert (bank.folder / name).read_bytes() == (source.folder / name).read_bytes()


def test_a_larger_menu_adds_only_what_is_new(make_bank, tmp_path):
    source = make_bank("llama")
    bank = Bank(source.checkpoint, source.layout, RTN, torch.float32, tmp_path)
    bank.build(choices_of(bank.layout))
    before = {f: f.stat().st_mtime_ns for f in bank.folder.iterdir()}
    larger = choices_of(bank.layout, [*MENU, Scheme("int6-g64")])
    open_units = sum(len(row) > 1 for row in larger)
    assert len(bank.missing(larger)) == open_units
    bank.build(larger)
    after = {f: f.stat().st_mtime_ns for f in bank.folder.iterdir()}
    assert len(after) == len(before) + open_units
    assert all(after[f] == before[f] for f in before)


def test_reading_maps_the_file(make_bank):
    """The tensor's memory belongs to a mapping of the bank's file, not to a copy."""
    bank = make_bank("llama")
    unit = next(unit for unit in bank.layout.units if unit.layer == 0)
    address = bank.tensors(unit, MENU[0])[unit.sites[0].parameter].data_ptr()
    with open("/proc/self/maps") as maps:
        owner = next(
            line
            for line in maps
            if int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16)
        )
    assert str(bank.folder) in owner


def test_a_full_disk_is_one_line_and_loses_nothing(make_bank, tmp_path, monkeypatch):
    source = make_bank("llama")
    bank = Bank(source.checkpoint, source.layout, RTN, torch.float32, tmp_path)
    real, written = bank_module.save_file, []

    def full(tensors, path):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        real(tensors, path)

    monkeypatch.setattr(bank_module, "save_file", full)
    with pytest.raises(BankError, match="No space left on device.*what is complete stays"):
        bank.build(choices_of(bank.layout))
    assert len(list(bank.folder.iterdir())) == 5  # no half-written file beside the whole ones
    monkeypatch.setattr(bank_module, "save_file", real)
    bank.build(choices_of(bank.layout))
    assert bank.missing(choices_of(bank.layout)) == []


def test_too_small_a_disk_is_refused_before_the_first_byte(make_bank, tmp_path, monkeypatch):
    source = make_bank("llama")
    bank = Bank(source.checkpoint, source.layout, RTN, torch.float32, tmp_path)
    monkeypatch.setattr(
        bank_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})
    )
    with pytest.raises(BankError, match="it needs .* and 0 MiB are free"):
        bank.build(choices_of(bank.layout))


def test_damage_is_named(make_bank, tmp_path):
    source = make_bank("llama")
    bank = Bank(source.checkpoint, source.layout, RTN, torch.float32, tmp_path)
    bank.build(choices_of(bank.layout))
    unit = bank.layout.units[1]
    file = bank._path(unit, MENU[0])
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(BankError, match="remove it and run the same command again"):
        bank.tensors(unit, MENU[0])


def test_a_weight_that_cannot_be_quantized_names_its_layer(tiny_folders, tmp_path):
    import transformers

    from quantization.checkpoints import resolve

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folders("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    checkpoint = resolve(str(tmp_path / "nan"))
    layout = describe(checkpoint)
    bank = Bank(checkpoint, layout, RTN, torch.float32, tmp_path / "bank")
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.down_proj in int2-g32"):
        bank.build(choices_of(layout))


def test_a_new_revision_of_the_quantizers_has_banks_of_its_own(make_bank, monkeypatch):
    bank = make_bank("llama")
    monkeypatch.setattr("quantization.quantizers.base.REVISION", 2)
    newer = Bank(bank.checkpoint, bank.layout, bank.quantizer, bank.dtype)
    assert newer.folder != bank.folder
