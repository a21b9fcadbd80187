"""Fields on a model whose errors meet: what gradients teach, and how sure predictions are."""

import numpy as np
import pytest

from search import fields as fields_module
from search.fields import Fields
from tests.search.test_strategies import CHUNKS, SCHEMES, UNITS
from tests.search.test_strategies import Model as Saturating

ROWS = np.arange(UNITS)


class Model(Saturating):
    """Losses grow faster than squares of errors, as language models' do below some three nats."""

    def _half(self, choice, jacobian):
        total = self.errors[ROWS, choice].sum(0)
        return 0.5 * np.square(jacobian @ total).sum()

    def loss(self, choice, jacobian):
        return float(0.03 * self._half(choice, jacobian) ** 1.2)

    def slopes(self, choice, chunk):
        jacobian, half = self.maps[chunk], self._half(choice, self.maps[chunk])
        total = self.errors[ROWS, choice].sum(0)
        return self.errors @ (0.036 * half**0.2 * jacobian.T @ jacobian @ total)


def change(model, before, after):
    """True change of the log loss, on the text that all chunks are noisy copies of."""
    return np.log(model.loss(after, model.mean) / model.loss(before, model.mean))


def learned(model, maps, prior=None):
    fields = Fields(model.problem.loss if prior is None else prior)
    for i, (choice, chunk) in enumerate(maps):
        loss = model.loss(choice, model.maps[chunk])
        fields.see(choice, chunk, loss, model.slopes(choice, chunk))
        assert len(fields) == i + 1
    fields.fit()
    return fields


def nearby(rng, choice, changes):
    """A map of so many changes."""
    other = choice.copy()
    at = rng.choice(UNITS, changes, replace=False)
    other[at] = (other[at] + rng.integers(1, SCHEMES, changes)) % SCHEMES
    return other


@pytest.mark.parametrize("seed", range(3))
def test_gradients_tell_single_changes_better_than_the_estimator_can(seed):
    model = Model(seed)
    at = np.full(UNITS, 1)
    prior = model.problem.loss / model.problem.loss[ROWS, at].sum()
    table = learned(model, [(at, c) for c in range(CHUNKS)]).around(at).table
    errors = {"prior": [], "fields": []}
    for u in range(UNITS):
        for s in (0, 2, 3):
            changed = at.copy()
            changed[u] = s
            true = change(model, at, changed)
            errors["prior"].append(prior[u, s] - prior[u, 1] - true)
            errors["fields"].append(table[u, s] - table[u, 1] - true)
    assert np.abs(errors["fields"]).mean() < 0.7 * np.abs(errors["prior"]).mean()


@pytest.mark.parametrize("seed", range(3))
def test_steps_lie_within_their_errors(seed):
    """Of steps of three changes, most within two standard errors; and they are told in order."""
    model, rng = Model(seed), np.random.default_rng(seed)
    at = np.full(UNITS, 1)
    fields = learned(model, [(at, c) for c in range(CHUNKS)])
    steps, true = [], []
    for _ in range(60):
        after = nearby(rng, at, 3)
        steps.append(fields.step(at, after))
        true.append(change(model, at, after))
    misses = np.array([abs(s.change - t) / s.error for s, t in zip(steps, true, strict=True)])
    assert (misses < 2).mean() > 0.75
    assert np.corrcoef([s.change for s in steps], true)[0, 1] > 0.9


def test_more_text_and_nearer_maps_make_a_field_known():
    model, rng = Model(0), np.random.default_rng(0)
    at = np.full(UNITS, 1)
    one = learned(model, [(at, 0)])
    four = learned(model, [(at, c) for c in range(4)])
    assert 0 < one.around(at).known < four.around(at).known < 1
    known = [four.around(nearby(rng, at, n)).known for n in (2, 6, 12)]
    assert four.around(at).known > known[0] > known[1] > known[2] > 0


def test_without_observations_of_a_region_the_table_is_the_estimators():
    """Fields fade with distance: far away nothing is left but the unit's own damage."""
    model = Model(1)
    at, far = np.full(UNITS, 0), np.full(UNITS, 3)
    around = learned(model, [(at, c) for c in range(3)]).around(far)
    share = model.problem.loss / model.problem.loss[ROWS, far].sum()
    assert np.abs(around.field).max() < 0.05 * np.abs(around.table).max()
    assert np.corrcoef(around.table[:, 1:].ravel(), share[:, 1:].ravel())[0, 1] > 0.97


def test_a_unit_that_the_estimator_underrates_is_found_where_it_is_used():
    model = Model(2)
    at = np.full(UNITS, 1)
    prior = model.problem.loss.copy()
    unit = int(np.argmax(prior[:, 1]))
    prior[unit] /= 5
    maps = [(at, c) for c in range(CHUNKS)]
    table = learned(model, maps, prior).around(at).table
    own = prior / prior[ROWS, at].sum()
    ratio = table[:, 1] / own[:, 1]
    assert ratio[unit] > 2 * np.median(np.delete(ratio, unit))


def test_a_model_about_to_break_does_not_drown_what_is_known():
    """One observation with gradients a hundred times too large."""
    model = Model(0)
    at = np.full(UNITS, 1)
    maps = [(at, c) for c in range(CHUNKS)]
    fields = learned(model, maps)
    before = fields.around(at).table
    fields.see(at, CHUNKS, 1.0, 100 * model.slopes(at, 0))
    fields.fit()
    assert fields.around(at).table == pytest.approx(before, abs=0.1 * np.abs(before).max())


@pytest.mark.parametrize("seed", range(3))
def test_units_that_meet_no_others_are_believed_less_than_those_that_meet_all(seed, monkeypatch):
    """Gradients of six chunks, where a few units have nearly all of the signal."""
    rng = np.random.default_rng(seed)
    units, chunks = 60, 6
    prior = rng.lognormal(0, 1, (units, SCHEMES))
    at = np.ones(units, dtype=int)
    share = prior / prior[np.arange(units), at].sum()
    strong = rng.random(units) < 0.1
    field = rng.standard_normal(prior.shape) * np.where(strong, 0.4, 0.02)[:, None]
    own = np.zeros_like(prior)
    own[np.arange(units), at] = 2 * 1.4 * np.sqrt(share[np.arange(units), at])
    seen = [field + own + 0.1 * rng.standard_normal(prior.shape) for _ in range(chunks)]
    errors = []
    for heavy in (fields_module.HEAVY, 1e-6):
        monkeypatch.setattr(fields_module, "HEAVY", heavy)
        fields = Fields(prior)
        for chunk, scaled in enumerate(seen):
            fields.see(at, chunk, 2.2, 2.2 * scaled * np.sqrt(share))
        found = fields.around(at)
        other = np.ones(prior.shape, bool)
        other[np.arange(units), at] = False
        errors.append(np.square(found.field / np.sqrt(share) - field)[other].mean())
    assert errors[0] < 0.75 * errors[1]
