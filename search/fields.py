"""Interaction fields: what gradients at measured maps tell of the loss around any map.

To second order, the logarithm of a map's loss changes by a unit's errors in two ways,

    theta_us = beta_us + kappa f_us (1 + delta_us)

- f_us, a share of the map's own damage: the estimator's table, scaled so that the map's own entries
  add up to one. This is what the unit would do alone; gradients at real maps confirm it within tens
  of percent (kappa is above one, as losses grow faster than squares; delta catches the few units
  that the estimator misjudges).
- beta_us = < b_u, e_us >, how the scheme's error e_us meets the errors of all other units. At low
  bits it decides as much as f does, and no estimator at the unquantized model knows it.

The gradient at a map tells < g_u, e_us > for all units and schemes at once, which is beta_us where the
unit has another scheme, and beta_us + 2 kappa f_us (1 + delta_us) where it has this one. Divided by
sqrt(f_us), beta has the same variance s^2 for all entries, and so has the noise n^2 of one chunk of
text; how a unit's variances compare with those is learned, too (some units meet all others, most
few). Both fade as maps part: errors of different schemes are nearly uncorrelated, so two maps' fields
correlate by what they share,

    rho(m, m') = sum_{u: m_u = m'_u} f_u / sqrt(sum f_m sum f_m'),   cov(beta, beta') = s s' rho^gamma,

noise likewise if the chunk is the same. So all entries share one small Gaussian process over
observations (maps x chunks, of all budgets): kriging with gradients. Its parameters depend on the
level of the loss, begin at what SmolLM2 showed between 0.1 and 2.5 nats, and are fitted to the job's
own observations by marginal likelihood.

Legend: U units, S schemes, N observations, E entries with a loss.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from search.problem import Choice, Floats

START = np.array([np.log(0.14), 0.5, np.log(0.105), 0.1, np.log(3.3), 0.6, 1.4, 0.13])
"""log s, log n, log gamma and kappa: each at a loss of REFERENCE and its slope by log loss."""
SPREAD = np.array([0.3, 0.15, 0.3, 0.15, 0.3, 0.2, 0.15, 0.08])
FAR = 8.0  # of those, beyond which no parameter is tried: it would overflow
REFERENCE = 2.2  # nats per token
WEIGHT = 1.0  # of the parameters' prior: the likelihood's entries aren't independent
LEVELS = -5.0, 1.3  # of log losses that parameters are told apart for
POWER = 1.15  # of the loss by the estimator's sum, until two levels are seen
DELTA = 0.4  # standard deviation of delta
SIGNALS = np.linspace(-2.5, 2.5, 11)  # log of how a unit's field compares with s^2: heavy-tailed
NOISES = np.linspace(-0.7, 0.7, 5)  # and its noise with n^2
HEAVY, UNEVEN = 1.0, 0.45  # standard deviations of both
TEMPER = 0.7  # of a unit's evidence: its schemes' entries aren't quite independent
SYSTEMATIC, BENT = 0.3, 0.35  # of a step, and of its field: what changes on the way
OUTLIER = 1.5  # times the usual variance, beyond which an observation is noise
JITTER = 1e-6  # variance of every observation at least, so that equal ones can be told apart
STEPS = 15  # of the fit; it goes on where the last one ended


@dataclass(frozen=True)
class Local:
    """What is known around a map.

    Args:
        table: U x S, change of the log loss; only differences within a unit count.
        field: beta (U x S).
        unknown: variance of the field over f that observations leave open (U).
        known: share of the field's variance that they explain, over all units.
    """

    table: Floats
    field: Floats
    unknown: Floats
    known: float


@dataclass(frozen=True)
class Step:
    """A predicted change of the log loss.

    Args:
        change: expected over all texts.
        error: its standard error.
        noise: standard deviation of one chunk's change around that of all texts.
    """

    change: float
    error: float
    noise: float


class Fields:
    """Learns from gradients at maps.

    Args:
        prior: U x S, an estimator's table; only proportions count, entries of zero are lossless.
    """

    def __init__(self, prior: Floats) -> None:
        self._prior, self._rows = prior, np.arange(len(prior))
        self._entries = np.flatnonzero(prior > 0)
        self._unit = self._entries // prior.shape[1]  # of each entry
        self._choices: list[Choice] = []
        self._chunks: list[int] = []
        self._losses: list[float] = []
        self._gradients: list[Floats] = []  # N x E, of the log loss, over sqrt(f)
        self._own: list[Floats] = []  # N x E, sqrt(f) at own entries
        self._distance = np.zeros((0, 0))  # N x N, -log rho
        self._parameters = START.copy()
        self._fitted = 0

    def __len__(self) -> int:
        return len(self._choices)

    def see(self, choice: Choice, chunk: int, loss: float, gradient: Floats) -> None:
        """An observation.

        Args:
            choice: the map (U).
            chunk: the chunk's number.
            loss: of the map on the chunk, nats per token.
            gradient: U x S, < d loss / d W_u, W_us - W_u >; where a scheme isn't offered, anything.
        """
        scale = np.sqrt(self._relative(choice))
        own = np.zeros_like(self._prior)
        own[self._rows, choice] = scale[self._rows, choice]
        given = np.divide(gradient, scale, out=np.zeros_like(scale), where=scale > 0)
        far = self._distances(choice)
        self._distance = np.block([[self._distance, far[:, None]], [far[None], np.zeros((1, 1))]])
        self._choices.append(choice.copy())
        self._chunks.append(chunk)
        self._losses.append(max(loss, 1e-9))
        self._gradients.append(given.ravel()[self._entries] / self._losses[-1])
        self._own.append(own.ravel()[self._entries])

    def fit(self) -> None:
        """Take account of all observations; `around` does so by itself."""
        self._fitted = len(self)
        sums = np.log([self._sum(choice) for choice in self._choices])
        levels = np.log(self._losses)
        self._line = np.array([POWER, float(np.mean(levels - POWER * sums))])
        if np.ptp(sums) > 0.5:
            self._line = np.polyfit(sums, levels, 1)
        self._levels = np.clip(np.polyval(self._line, sums), *LEVELS)
        given, own = np.array(self._gradients), np.array(self._own)
        products = given @ given.T, given @ own.T, own @ own.T
        self._noisy = np.zeros(len(self))
        self._noisy = self._outliers(self._squares(*products, self._kappa(self._levels)))
        if len(self) > 2:
            self._parameters = minimize(
                self._unlikelihood, self._parameters, products, "L-BFGS-B",
                bounds=list(zip(START - FAR * SPREAD, START + FAR * SPREAD, strict=True)),
                options={"maxiter": STEPS},
            ).x  # fmt: skip
        signal, noise = self._covariances(self._parameters)
        # both diagonal: noise one, signal `spectrum`, so that units with other variances cost nothing
        whiten = np.linalg.inv(np.linalg.cholesky(noise))
        spectrum, turn = np.linalg.eigh(whiten @ signal @ whiten.T)
        self._spectrum, self._turn = spectrum.clip(min=0), turn.T @ whiten
        kappa = self._kappa(self._levels)[:, None]
        variance = np.diag(noise) + 0.3 * np.diag(signal)
        self._delta = np.zeros(len(self._entries))
        for _ in range(2):  # what own entries tell of delta, and then what is left of the fields
            turned = self._turn @ (given - 2 * kappa * own * (1 + self._delta))
            self._even(turned)
            self._weights = self._turn.T @ (self._gain[self._unit].T * turned)
            left = given - 2 * kappa * own - signal @ self._weights
            told = 2 * kappa * own / variance[:, None]
            self._delta = (told * left).sum(0) / ((told * 2 * kappa * own).sum(0) + DELTA**-2)

    def around(self, choice: Choice) -> Local:
        """The table around a map, given all observations; there must be one."""
        if self._fitted < len(self):
            self.fit()
        share = self._relative(choice)
        level = self._level(choice)
        s, _, gamma = self._scales(np.append(self._levels, level), self._parameters)
        fade = np.exp(-np.sqrt(gamma[-1] * gamma[:-1]) * self._distances(choice))
        towards = s[-1] * s[:-1] * fade  # N
        field, own = np.zeros(share.size), np.zeros(share.size)
        field[self._entries] = towards @ self._weights
        own[self._entries] = 1 + self._delta
        field_US = field.reshape(share.shape) * np.sqrt(share)
        kappa = self._kappa(np.array([level]))
        table = field_US + kappa * share * own.reshape(share.shape)
        explained = self._told @ np.square(self._turn @ towards)
        variance = self._signal * s[-1] ** 2
        unknown = (variance - explained).clip(min=0)
        return Local(table, field_US, unknown, float(1 - unknown.sum() / variance.sum()))

    def draw(self, choice: Choice, generator: np.random.Generator) -> Floats:
        """A table around a map that might as well be true."""
        around = self.around(choice)
        share = self._relative(choice)
        own = SYSTEMATIC * np.abs(around.table - around.field)
        unknown = share * around.unknown[:, None] + own**2
        drawn = around.table + generator.standard_normal(share.shape) * np.sqrt(unknown)
        return np.asarray(drawn)

    def step(self, before: Choice, after: Choice) -> Step:
        """What going from one map to another is predicted to change, by both ends' tables."""
        ends = [self.around(choice) for choice in (before, after)]
        change = 0.0
        for end in ends:
            change += 0.5 * float(
                (end.table[self._rows, after] - end.table[self._rows, before]).sum()
            )
        share, level = self._relative(before), self._level(before)
        sizes = np.where(before != after, share[self._rows, after] + share[self._rows, before], 0.0)
        s, n, _ = self._scales(np.array([level]), self._parameters)
        unknown = np.sqrt(sizes @ (0.5 * (ends[0].unknown + ends[1].unknown)))
        bend = np.hypot(SYSTEMATIC * change, BENT * s[0] * np.sqrt(sizes @ self._signal))
        noise = n[0] * np.sqrt(sizes @ self._noise)
        return Step(change, float(np.hypot(unknown, bend)), float(noise))

    def _even(self, turned: Floats) -> None:
        """How far to believe each unit: its signal and noise beside the common ones.

        Averages over a grid of both, by prior and evidence. Sets `_gain` (U x N, from turned
        observations to weights), `_told` (U x N, variance explained), `_signal` and `_noise` (U).
        """
        units = len(self._prior)
        power = np.zeros((units, len(turned)))
        np.add.at(power, self._unit, np.square(turned).T)
        counts = np.bincount(self._unit, minlength=units)[:, None]
        a, b = (x.ravel() for x in np.meshgrid(SIGNALS, NOISES, indexing="ij"))
        prior = -0.5 * ((a / HEAVY) ** 2 + (b / UNEVEN) ** 2)
        a, b = np.exp(a - 0.5 * HEAVY**2), np.exp(b - 0.5 * UNEVEN**2)
        total = a[:, None] * self._spectrum + b[:, None]  # G x N
        evidence = -0.5 * (counts * np.log(total).sum(1) + power @ (1 / total).T)  # U x G
        logs = prior + TEMPER * evidence
        weights = np.exp(logs - logs.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        self._gain = weights @ (a[:, None] / total)
        self._told = weights @ (a[:, None] ** 2 / total)
        self._signal, self._noise = weights @ a, weights @ b

    def _sum(self, choice: Choice) -> float:
        return float(self._prior[self._rows, choice].sum()) or 1e-300

    def _level(self, choice: Choice) -> float:
        return float(np.clip(np.polyval(self._line, np.log(self._sum(choice))), *LEVELS))

    def _relative(self, choice: Choice) -> Floats:
        return self._prior / self._sum(choice)

    def _distances(self, choice: Choice) -> Floats:
        """-log rho to all maps seen."""
        found = []
        for other in self._choices:
            shared = float(self._prior[self._rows, choice][choice == other].sum())
            found.append(shared / np.sqrt(self._sum(choice) * self._sum(other)))
        return -np.log(np.clip(found, 1e-3, 1.0)) if found else np.zeros(0)

    @staticmethod
    def _scales(levels: Floats, parameters: Floats) -> tuple[Floats, Floats, Floats]:
        x, p = levels - np.log(REFERENCE), parameters
        gamma = np.clip(np.exp(p[4] + p[5] * x), 1.0, 4.0)
        return np.exp(p[0] + p[1] * x), np.exp(p[2] + p[3] * x), gamma

    def _kappa(self, levels: Floats, parameters: Floats | None = None) -> Floats:
        p = self._parameters if parameters is None else parameters
        return np.asarray(p[6] + p[7] * (levels - np.log(REFERENCE)))

    def _covariances(self, parameters: Floats) -> tuple[Floats, Floats]:
        """Of the fields, and of the noise (N x N)."""
        s, n, gamma = self._scales(self._levels, parameters)
        fade = np.exp(-np.sqrt(np.outer(gamma, gamma)) * self._distance)
        same = np.equal.outer(self._chunks, self._chunks)
        return np.outer(s, s) * fade, np.outer(n, n) * fade * same + np.diag(self._noisy + JITTER)

    def _squares(self, given: Floats, cross: Floats, own: Floats, kappa: Floats) -> Floats:
        """Products of residuals, given those of gradients and own entries (N x N)."""
        mixed = 2 * kappa[None, :] * cross
        return given - mixed - mixed.T + 4 * np.outer(kappa, kappa) * own

    def _outliers(self, squares: Floats) -> Floats:
        """Variance of an observation beyond the usual at its level: a model about to break."""
        found = np.diag(squares) / max(1, len(self._entries))
        usual = sum(np.diag(c) for c in self._covariances(self._parameters))
        usual = usual * np.exp(np.median(np.log(found / usual + 1e-12))) if len(self) > 3 else usual
        return np.where(found > OUTLIER * usual, found - usual, 0.0)

    def _unlikelihood(self, parameters: Floats, given: Floats, cross: Floats, own: Floats) -> float:
        signal, noise = self._covariances(parameters)
        squares = self._squares(given, cross, own, self._kappa(self._levels, parameters))
        try:
            factor = np.linalg.cholesky(signal + noise)
            inverse = np.linalg.inv(signal + noise)
        except np.linalg.LinAlgError:
            return 1e12
        fit = float((inverse * squares).sum())
        spread = 2 * float(np.log(np.diag(factor)).sum())
        prior = float((((parameters - START) / SPREAD) ** 2).sum())
        return 0.5 * (fit + len(self._entries) * spread) + WEIGHT * prior
