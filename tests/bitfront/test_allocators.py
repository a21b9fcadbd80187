"""`bitfront bench allocators` on a tiny model: what is compared, with what, and refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from bitfront.allocators import (
    CONTROL,
    GIVEN,
    NULL,
    Contest,
    compare,
    leaderboard,
    leaderboard_json,
)
from bitfront.progress import Silent
from quantization.errors import BitfrontError
from store.database import Store

TEXT = "".join(
    f"The {n}th sentence says that {n} and {n + 1} make {2 * n + 1}. " for n in range(900)
)
LINEARS = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]  # fmt: skip


def written(folder, name, **bits):
    """A map of three bits but for those of some linears, by the end of their names."""
    found = {n: next((b for e, b in bits.items() if n.endswith(e)), 3) for n in LINEARS}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(found))
    return path


@pytest.fixture(scope="module")
def contest(tiny_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    text = folder / "text.txt"
    text.write_text(TEXT)
    maps = (written(folder, "down", down_proj=4), written(folder, "output", o_proj=2))
    return Contest(
        str(tiny_folders("llama")), str(text), maps, (3.5, 3.9), chunks=3, length=64,
        bits=(2, 3, 4), group=32, finer=(16,), random=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def entries(contest, tmp_path_factory):
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('bench')}/s.sqlite").open()
    return compare(contest, store, "none", Silent()), store


def test_maps_compete_with_null_and_control_at_the_budget_that_they_fit(contest, entries):
    found, _ = entries
    by_budget = {b: [e for e in found if e.budget == b] for b in contest.budgets}
    assert {e.name for e in by_budget[3.5] if e.kind == GIVEN} == {"output"}
    assert {e.name for e in by_budget[3.9] if e.kind == GIVEN} == {"down"}
    assert {e.name for e in by_budget[3.5] if e.kind == CONTROL} == {"uniform int3-g32"}
    for budget, rows in by_budget.items():
        null = [e for e in rows if e.kind == NULL]
        assert len(null) == 2
        assert all(budget - 0.15 < e.average_bits <= budget for e in null)
        kl = [e.kl.mean for e in rows]
        assert kl == sorted(kl)
        best = next(e for e in rows if e.kind == GIVEN)
        assert best.over_best is None
        for entry in rows:
            if entry is not best:
                assert entry.over_best.mean == pytest.approx(entry.kl.mean - best.kl.mean)
                assert entry.over_best.low <= entry.over_best.mean <= entry.over_best.high


def test_a_second_comparison_measures_nothing_and_says_the_same(contest, entries, monkeypatch):
    found, store = entries
    from workers.session import Session

    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(Session, "measure", refuse)
    assert compare(contest, store, "none", Silent()) == found


def test_leaderboard_and_json_name_everybody(contest, entries):
    found, _ = entries
    assert leaderboard(contest, found).row_count == len(found)
    document = json.loads(json.dumps(leaderboard_json(contest, found)))
    assert {e["name"] for e in document["entries"]} == {e.name for e in found}
    assert np.isfinite([e["kl"]["mean"] for e in document["entries"]]).all()


def test_maps_that_nobody_could_load_are_refused(contest, tmp_path):
    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    cases = {
        "fused": written(tmp_path, "fused", q_proj=4),
        "outside the menu": written(tmp_path, "eight", down_proj=8),
        "more than the largest": written(tmp_path, "large", proj=4),
        "no map of": tmp_path / "absent.json",
    }
    partial = tmp_path / "partial.json"
    partial.write_text(json.dumps({LINEARS[0]: 3}))
    for words, path in {**cases, "says nothing of": partial}.items():
        with pytest.raises(BitfrontError, match=words):
            compare(replace(contest, maps=(path,)), store, "none", Silent())


def test_a_map_of_formats_meets_maps_of_bits(contest, tmp_path):
    named = tmp_path / "named.json"
    given = json.loads(contest.maps[0].read_text())
    wider = {n: "nf4-g32" if n.endswith("down_proj") else f"int{b}-g32" for n, b in given.items()}
    named.write_text(json.dumps(wider))
    both = replace(contest, maps=(contest.maps[0], named), random=0)
    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    found = {e.name: e for e in compare(both, store, "none", Silent()) if e.kind == GIVEN}
    assert found["named"].average_bits == found["down"].average_bits
    assert found["named"].kl.mean != found["down"].kl.mean
    named.write_text(json.dumps(dict.fromkeys(given, "int3-g31")))
    with pytest.raises(BitfrontError, match="int3-g31"):
        compare(both, store, "none", Silent())


def test_what_maps_say_of_other_linears_is_nobodys_business(contest, tmp_path):
    """Files of other tools list the head, too; and a budget named twice is one."""
    given = json.loads(contest.maps[0].read_text())
    path = tmp_path / "head.json"
    path.write_text(json.dumps({**given, "lm_head": 16}))
    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    asked = replace(contest, maps=(path,), budgets=(3.9, 3.9), random=0)
    assert [e.name for e in compare(asked, store, "none", Silent()) if e.kind == GIVEN] == ["head"]


def test_a_quantizer_that_learns_needs_another_text_than_the_one_it_is_judged_by(contest, tmp_path):
    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    with pytest.raises(BitfrontError, match="--calibration-text"):
        compare(replace(contest, quantizer="gptq"), store, "none", Silent())
