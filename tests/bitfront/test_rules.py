"""What a menu's rules promise, seen on the maps of a whole search."""

import numpy as np
import pytest

from bitfront.config import ConfigError
from bitfront.fronts import load_front
from bitfront.pipeline import run_search
from bitfront.plan import make_plan
from bitfront.progress import Silent
from search.errors import InfeasibleBudgetError
from store.database import Store
from store.queries import candidates_of, find_job
from tests.bitfront.test_pipeline import small_config
from workers.pool import InProcessPool

SCHEMES = ["int2-g32", "int3-g32", "int4-g32", "int8-g32", "bf16"]
FULL = {"embedding": "bf16", "head": "bf16"}


def test_every_map_of_a_search_obeys(tiny_folders, tmp_path):
    rules = {
        "schemes": SCHEMES,
        "pinned": FULL,
        "forbidden": {"*.mlp.down_proj": ["int2-g32", "int3-g32"]},
        "most_formats": 2,
        "left_alone": 0.25,
    }
    plan = make_plan(small_config(tiny_folders("llama"), menu=rules))
    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    job = run_search(plan, store, InProcessPool, Silent())
    candidates = candidates_of(store, job)
    names = [unit.name for unit in plan.layout.units]
    open_ = np.flatnonzero(plan.open_units)
    assert any(c.origin.startswith("fisher") for c in candidates)
    for candidate in candidates:
        schemes = candidate.schemes
        assert len(set(schemes) - {"bf16"}) <= 2
        assert sum(schemes[u] == "bf16" for u in open_) >= 0.25 * len(open_)
        downs = [s for name, s in zip(names, schemes, strict=True) if "down_proj" in name]
        assert not {"int2-g32", "int3-g32"} & set(downs)
    assert load_front(store, find_job(store, job)).points


def test_a_job_without_rules_keeps_its_key(tiny_folders):
    """And one with a rule has another."""
    folder = tiny_folders("llama")
    menu = {"schemes": SCHEMES, "pinned": FULL}
    plain, silent, ruled = (
        make_plan(small_config(folder, menu={**menu, **more}))
        for more in ({}, {"left_alone": 0.0, "forbidden": {}}, {"most_formats": 3})
    )
    assert plain.key == silent.key != ruled.key


@pytest.mark.parametrize(
    ("rules", "error", "words"),
    [
        ({"forbidden": {"*.absent": ["int2-g32"]}}, ConfigError, "forbids schemes for '.*absent'"),
        ({"forbidden": {"linear": SCHEMES}}, ConfigError, "forbidden ones left out"),
        ({"schemes": SCHEMES[:4], "left_alone": 0.5}, ConfigError, "add bf16 to the menu"),
        ({"most_formats": 0}, ConfigError, "most_formats"),
        ({"left_alone": 0.5, "budgets": [4.0]}, InfeasibleBudgetError, "the smallest has"),
    ],
)
def test_rules_that_cannot_hold_are_one_line(tiny_folders, rules, error, words):
    budgets = {"budgets": rules.pop("budgets")} if "budgets" in rules else {}
    menu = {"schemes": SCHEMES, "pinned": FULL, **rules}
    with pytest.raises(error, match=words) as caught:
        make_plan(small_config(tiny_folders("llama"), menu=menu, **budgets))
    assert "\n" not in str(caught.value)
