"""What is known of a loss table around a map: an estimator's prior, slopes and measured differences.

Legend: U units, S schemes, M measured differences. m is a map, theta the table.

Near a map the loss is taken to be additive, with a normal prior around the estimator's table (a
factor for the unit, one for the entry). Two kinds of evidence correct it:

- slopes: the loss's gradient at a quantized map times the change of weights, for every entry at
  once. To second order a unit's change from m(u) to s adds

      theta_us - theta_um = slope_us + 1/2 dW^T H dW,     1/2 dW^T H dW ~ prior_us + prior_um

  since the rounding errors of two schemes are nearly independent. The slope knows what the prior
  can't: how a unit's error meets those of all others.
- measured differences between two whole maps, which tell of all units that differ at once.

Slopes speak of one unit each, so their posterior is S x S a unit; the few differences couple units,
and are added by M x M algebra. Draws follow Matheron's rule.
"""

from dataclasses import dataclass

import numpy as np

from search.problem import Choice, Floats

UNIT, ENTRY = 0.5, 0.4
"""Standard deviations of the prior's two factors."""
SLOPE, CURVATURE = 0.75, 0.9
"""What is found of both terms where losses saturate (measured on SmolLM2 at 3 bits)."""
SYSTEMATIC = 0.35
"""Error of the second-order model, of its curvature term; no text averages it away."""
PER_LOG_RATIO, PER_SHARE = 0.5, 0.7
"""More of it for slopes at a map whose loss is another, and which differs in a share of units."""
INTERACTION = 0.15
"""Error of a predicted difference, of the sum of its absolute terms."""


@dataclass(frozen=True)
class Slopes:
    """Mean slopes at one map.

    Args:
        choice: the map (U).
        values: U x S, nats per token; zero at the map's own schemes.
        loss: of the map, nats per token.
        chunks: how many chunks the mean is over.
    """

    choice: Choice
    values: Floats
    loss: float
    chunks: int


@dataclass(frozen=True)
class Difference:
    """A measured difference: loss of `after` less that of `before`, on the same chunks."""

    before: Choice
    after: Choice
    value: float
    variance: float


class Posterior:
    """The table around a map.

    Args:
        prior: U x S, nats per token, scaled so that the map's own entries add up to its loss.
        at: the map (U).
        loss: of the map.
        noise: variance of one chunk's slope, of its squared curvature term.
    """

    def __init__(self, prior: Floats, at: Choice, loss: float, noise: float) -> None:
        self.at, self.loss, self.noise = at, loss, noise
        self._rows = np.arange(len(prior))
        self._prior = np.maximum(prior, 1e-9 * max(loss, 1e-12))
        self._curvature = self._prior + self._prior[self._rows, at][:, None]
        outer = self._prior[:, :, None] * self._prior[:, None, :]
        eye = np.eye(prior.shape[1])
        self.covariance: Floats = outer * (UNIT**2 + ENTRY**2 * eye)
        self.mean: Floats = self._prior.copy()
        self._differences: list[Difference] = []

    def slopes(self, seen: Slopes) -> None:
        """Learn from slopes at a map, the same one or another."""
        ratio = self.loss / max(seen.loss, 1e-12)
        share = float((seen.choice != self.at).mean())
        rows, own = self._rows, seen.choice
        curvature = self._prior + self._prior[rows, own][:, None]
        found = SLOPE * ratio * seen.values + CURVATURE * curvature
        error = SYSTEMATIC**2 + (PER_LOG_RATIO * np.log(ratio)) ** 2 + (PER_SHARE * share) ** 2
        variance = curvature**2 * (error + self.noise / seen.chunks)
        for s in range(found.shape[1]):
            self._entry(s, own, found[:, s], variance[:, s], own != s)

    def _entry(self, s: int, own: Choice, found: Floats, variance: Floats, told: Floats) -> None:
        """One column: theta_us - theta_u,own(u), for the units that it tells something of."""
        rows = self._rows
        gained = self.covariance[:, :, s] - self.covariance[rows, :, own]  # U x S
        spread = gained[:, s] - gained[rows, own] + variance
        surprise = found - (self.mean[:, s] - self.mean[rows, own])
        weight = np.where(told, 1 / spread, 0.0)
        self.mean += (weight * surprise)[:, None] * gained
        self.covariance -= weight[:, None, None] * gained[:, :, None] * gained[:, None, :]

    def difference(self, seen: Difference) -> None:
        """Learn from a measured difference of two maps; after all slopes."""
        self._differences.append(seen)

    def table(self) -> Floats:
        """The mean (U x S)."""
        return self._conditioned(self.mean, None)

    def draw(self, generator: np.random.Generator, scale: float = 1.0) -> Floats:
        """A table drawn from the posterior, its deviations from the mean times `scale`."""
        values, vectors = np.linalg.eigh(self.covariance)
        normal = generator.standard_normal(values.shape) * np.sqrt(values.clip(min=0))
        deviation = np.einsum("uij,uj->ui", vectors, normal)
        drawn = self._conditioned(self.mean + deviation, generator)
        return self.table() + scale * (drawn - self.table())

    def _conditioned(self, table: Floats, generator: np.random.Generator | None) -> Floats:
        """The table given the differences (of a draw: with their noise drawn, too)."""
        if not self._differences:
            return table
        pairs = [(d.before, d.after) for d in self._differences]
        gains = np.array([self._gain(before, after) for before, after in pairs])  # M x U x S
        predicted = np.array([self._change(table, *pair) for pair in pairs])
        between = np.array([[self._change(gain, *pair) for pair in pairs] for gain in gains])
        noise = np.array([d.variance + self._additivity(d) for d in self._differences])
        found = np.array([d.value for d in self._differences])
        if generator is not None:
            found = found + generator.standard_normal(len(found)) * np.sqrt(noise)
        weights = np.linalg.solve(between + np.diag(noise), found - predicted)
        return np.asarray(table + np.einsum("m,mus->us", weights, gains))

    def _gain(self, before: Choice, after: Choice) -> Floats:
        rows = self._rows
        return self.covariance[rows, :, after] - self.covariance[rows, :, before]

    def _change(self, table: Floats, before: Choice, after: Choice) -> float:
        rows = self._rows
        return float((table[rows, after] - table[rows, before]).sum())

    def _additivity(self, seen: Difference) -> float:
        rows = self._rows
        moved = self._prior[rows, seen.after] + self._prior[rows, seen.before]
        return (INTERACTION * float(moved[seen.after != seen.before].sum())) ** 2
