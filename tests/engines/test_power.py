"""Counters of energy: they rise, start again at their maximum, and say why they can't be read."""

from engines.power import Rapl, processor_counter


def package(root, name, microjoules, most=1000):
    folder = root / name
    folder.mkdir()
    (folder / "energy_uj").write_text(str(microjoules))
    (folder / "max_energy_range_uj").write_text(str(most))
    return folder


def test_packages_are_summed_and_their_parts_are_not(tmp_path):
    one, two = package(tmp_path, "intel-rapl:0", 100), package(tmp_path, "intel-rapl:1", 5)
    package(tmp_path, "intel-rapl:0:0", 50)  # a part of the first
    counter, where = processor_counter(tmp_path)
    assert where == "RAPL of 2 packages"
    before = counter.read_j()
    (one / "energy_uj").write_text("400")
    (two / "energy_uj").write_text("8")
    assert round((counter.read_j() - before) * 1e6) == 303


def test_a_counter_that_starts_again_goes_on(tmp_path):
    folder = package(tmp_path, "intel-rapl:0", 900)
    counter = Rapl((folder,))
    (folder / "energy_uj").write_text("100")
    assert round(counter.read_j() * 1e6) == 200


def test_what_cant_be_read_is_said(tmp_path, monkeypatch):
    none, why = processor_counter(tmp_path)
    assert none is None
    assert "no RAPL counters" in why
    package(tmp_path, "intel-rapl:0", 1)

    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(Rapl, "_microjoules", staticmethod(refused))
    none, why = processor_counter(tmp_path)
    assert none is None
    assert "only be read by root" in why
