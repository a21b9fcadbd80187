"""Strategies on a model small enough to know: errors that meet, text that is noisy, a loss that saturates."""

import sys

import numpy as np
import pytest

from search.errors import SearchError
from search.exact import sweep
from search.problem import Problem
from search.strategies import Setting, check_strategy, make_strategy
from search.strategies.optuna_study import WIDTH as WIDTH_OF_TRIALS
from search.strategies.surrogate import best_of

UNITS, SCHEMES, WIDTH, CHUNKS = 24, 4, 12, 8
BITS = np.array([2, 3, 4, 6])


class Model:
    """loss = log(1 + |J_c sum_u dW_u|^2 / 2): cross terms between units, and each chunk its J."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        scale = rng.lognormal(-1, 0.7, (UNITS, 1, 1)) * 2.0 ** -BITS[None, :, None]
        self.errors = scale * rng.standard_normal((UNITS, SCHEMES, WIDTH)) * 2
        self.mean = rng.standard_normal((WIDTH, WIDTH))
        self.maps = self.mean + 0.2 * rng.standard_normal((CHUNKS, WIDTH, WIDTH))
        prior = 0.5 * np.square(self.errors @ self.mean.T).sum(-1)
        self.cost = rng.integers(1, 5, (UNITS, 1)) * 1000 * BITS
        self.problem = Problem(prior, {"bits": self.cost}, np.ones((UNITS, SCHEMES), bool))
        low, high = self.cost.min(1).sum(), self.cost.max(1).sum()
        self.budgets = [int(low + f * (high - low)) for f in (0.2, 0.5)]

    def loss(self, choice, jacobian):
        total = self.errors[np.arange(UNITS), choice].sum(0)
        return float(np.log1p(0.5 * np.square(jacobian @ total).sum()))

    def slopes(self, choice, chunk):
        jacobian = self.maps[chunk]
        own = self.errors[np.arange(UNITS), choice]
        gradient = jacobian.T @ jacobian @ own.sum(0) / np.exp(self.loss(choice, jacobian))
        return self.errors @ gradient

    def tell(self, strategy, question):
        loss = self.loss(question.choice, self.maps[question.chunk])
        slopes = self.slopes(question.choice, question.chunk) if question.slopes else None
        strategy.tell(question, loss, slopes)

    def refine(self, questions, seed=0, strategy="refine"):
        starts = dict(zip(self.budgets, sweep(self.problem, "bits", self.budgets), strict=True))
        setting = Setting(
            self.problem, "bits", {b: [s.choice] for b, s in starts.items()}, CHUNKS, seed
        )
        refinement = make_strategy(strategy, setting)
        for _ in range(questions):
            question = refinement.ask()
            if question is None:
                break
            self.tell(refinement, question)
        return refinement, {b: s.choice for b, s in starts.items()}


@pytest.mark.parametrize("seed", range(4))
def test_measured_maps_beat_the_estimators_optimum_on_every_text(seed):
    """On the chunks that were searched, and on what they are noisy copies of."""
    model = Model(seed)
    refinement, starts = model.refine(300)
    for budget in model.budgets:
        best, start = refinement.best(budget), starts[budget]
        assert model.problem.breaks(best, {"bits": budget}) is None
        measured = np.mean([model.loss(best, j) for j in model.maps])
        assert measured < 0.8 * np.mean([model.loss(start, j) for j in model.maps])
        assert model.loss(best, model.mean) < model.loss(start, model.mean)


def test_one_question_at_a_time_is_deterministic_and_another_seed_is_another_search():
    model = Model(0)
    runs = [model.refine(60, seed)[0] for seed in (1, 1, 2)]
    logs = [[tuple(entry.values()) for entry in run.log] for run in runs]
    assert logs[0] == logs[1] != logs[2]


def test_many_questions_may_be_open_at_once():
    """As workers ask for them; every one is asked once, and answers may come in any order."""
    model, rng = Model(1), np.random.default_rng(0)
    refinement, starts = model.refine(0)
    open_, seen = [], set()
    for _ in range(200):
        while len(open_) < 5 and (question := refinement.ask()):
            key = (question.choice.tobytes(), question.chunk, question.slopes)
            assert key not in seen
            seen.add(key)
            open_.append(question)
        if not open_:
            break
        question = open_.pop(int(rng.integers(len(open_))))
        model.tell(refinement, question)
    for budget in model.budgets:
        assert model.loss(refinement.best(budget), model.mean) < model.loss(
            starts[budget], model.mean
        )


@pytest.mark.parametrize(
    ("strategy", "least"),
    [
        ("evolve", 0.2),
        ("surrogate", 0.1),
        ("optuna:NSGAIISampler", 0.02),
        ("optuna:TPESampler", 0.02),
    ],
)
def test_other_strategies_improve_on_their_start_within_the_budget(strategy, least):
    """None of them needs slopes; samplers need many more maps than a hundred to do more."""
    model = Model(2)
    strategy, starts = model.refine(400, strategy=strategy)
    assert strategy.log
    for budget in model.budgets:
        best = strategy.best(budget)
        assert model.problem.breaks(best, {"bits": budget}) is None
        losses = [[model.loss(m, j) for j in model.maps] for m in (starts[budget], best)]
        assert 1 - np.mean(losses[1]) / np.mean(losses[0]) > least


def test_an_optuna_study_lasts_and_starts_with_the_solvers_front(tmp_path):
    """In a database, beside our own tables' versions; a second run goes on with its trials."""
    import optuna

    model = Model(0)
    url = f"sqlite:///{tmp_path}/study.sqlite"
    starts = {b: [s.choice] for b, s in zip(
        model.budgets, sweep(model.problem, "bits", model.budgets), strict=True)}  # fmt: skip
    setting = Setting(model.problem, "bits", starts, CHUNKS)
    counts = []
    for _ in range(2):
        strategy = make_strategy("optuna:NSGAIISampler", setting, url, "study")
        for _ in range(24):
            question = strategy.ask()
            assert not question.slopes
            strategy.tell(question, model.loss(question.choice, model.maps[question.chunk]))
        study = optuna.load_study(study_name="study", storage=url)
        done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
        counts.append(len(done))
        assert study.metric_names == ["loss", "bits"]  # what optuna-dashboard calls them
        costs = [model.problem.total_cost(starts[b][0], "bits") for b in model.budgets]
        assert [t.values[1] for t in done[:2]] == costs
        assert all(t.constraints for t in done)
    assert counts[1] > counts[0] >= 5


def test_a_second_run_of_a_study_knows_the_best_of_the_first(tmp_path):
    model, url = Model(2), f"sqlite:///{tmp_path}/study.sqlite"
    solved = zip(model.budgets, sweep(model.problem, "bits", model.budgets), strict=True)
    setting = Setting(model.problem, "bits", {b: [s.choice] for b, s in solved}, CHUNKS)

    def loss(choice):
        return np.mean([model.loss(choice, j) for j in model.maps[:WIDTH_OF_TRIALS]])

    def run(questions):
        strategy = make_strategy("optuna:NSGAIISampler", setting, url, "study")
        for _ in range(questions):
            question = strategy.ask()
            strategy.tell(question, model.loss(question.choice, model.maps[question.chunk]))
        return [loss(strategy.best(b)) for b in model.budgets], strategy

    first, _ = run(400)
    starts = [loss(setting.starts[b][0]) for b in model.budgets]
    assert all(found < start for found, start in zip(first, starts, strict=True))
    again, resumed = run(0)
    assert again == first
    assert not [t for t in resumed.study.trials if t.state.name == "RUNNING"]
    later, _ = run(100)
    assert all(now <= before for now, before in zip(later, first, strict=True))


@pytest.mark.parametrize("sampler", ["GridSampler", "CmaEsSampler"])
def test_samplers_that_cant_search_two_objectives_are_refused_at_once(sampler):
    with pytest.raises(SearchError, match=sampler):
        check_strategy(f"optuna:{sampler}")


def test_a_package_of_optunahub_is_loaded_by_its_name(monkeypatch):
    """Its network is out of reach here, so its loader is stood in for."""
    import optuna

    class Hub:
        @staticmethod
        def load_module(package):
            if package != "samplers/mine":
                raise OSError("offline")
            return type("Package", (), {"Mine": optuna.samplers.RandomSampler})

    monkeypatch.setitem(sys.modules, "optunahub", Hub)
    check_strategy("optuna:samplers/mine:Mine")
    with pytest.raises(SearchError, match="offline"):
        check_strategy("optuna:samplers/absent:Mine")


def test_a_lossless_start_is_left_alone_and_the_others_are_searched():
    """A budget with room for full precision beside one that has to choose."""
    model = Model(1)
    model.problem.loss[:, -1] = 0.0
    model.errors[:, -1] = 0.0
    model.budgets[1] = int(model.cost.max(1).sum())
    refinement, starts = model.refine(120)
    low, high = model.budgets
    assert (refinement.best(high) == SCHEMES - 1).all()
    assert model.loss(refinement.best(low), model.mean) < model.loss(starts[low], model.mean)


def test_scores_below_zero_are_no_free_choices():
    """Differences of measurements, such as flips from a quantized base, may come out negative."""
    model = Model(2)
    model.problem.loss[:4, -1] = -1e-3
    refinement, starts = model.refine(200)
    for budget in model.budgets:
        best = refinement.best(budget)
        assert model.loss(best, model.mean) < model.loss(starts[budget], model.mean)


def test_a_search_that_gains_no_more_ends():
    """Where text is left, too: no more questions once steps buy next to nothing."""
    model = Model(3)
    refinement, _ = model.refine(5000)
    assert refinement.ask() is None


@pytest.mark.parametrize("name", ["absent", "optuna:AbsentSampler", "optuna:optuna.samplers:Study"])
def test_unknown_strategies_are_named(name):
    model = Model(0)
    setting = Setting(model.problem, "bits", {b: [np.zeros(UNITS, int)] for b in model.budgets}, 2)
    with pytest.raises(SearchError, match="no (strategy|sampler) '"):
        make_strategy(name, setting)


@pytest.mark.parametrize("count", [1, 5, 20])
def test_the_fittest_are_the_first_fronts(count):
    """Nobody who is left out dominates anybody who was taken."""
    points = np.random.default_rng(count).integers(0, 8, (30, 2)).astype(float)
    taken = best_of(points, count)
    assert len(set(taken.tolist())) == count
    for out in set(range(30)) - set(taken.tolist()):
        dominated = (points[out] <= points[taken]).all(1) & (points[out] < points[taken]).any(1)
        assert not dominated.any()


def test_evolution_ends_where_a_small_model_has_no_more_maps():
    """Two units that can only swap: once both maps are known there is nothing to ask."""
    loss = np.array([[0.0, 1.0], [0.0, 2.0]])
    problem = Problem(loss, {"weight_bytes": np.array([[2, 1], [2, 1]])}, np.ones((2, 2), bool))
    start = np.array([0, 1])
    search = make_strategy(
        "evolve", Setting(problem, "weight_bytes", {3: [start]}, 2, 0, {}), "", ""
    )
    asked = 0
    while question := search.ask():
        search.tell(question, float(problem.total_loss(question.choice)))
        asked += 1
    assert 0 < asked <= 4
    assert search.best(3).tolist() == [1, 0]
