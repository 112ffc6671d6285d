"""Fits of L = E + A/(N + t1)^α + B/(D + t2)^β + C/(T + t3)^γ (paper, Appendix D).

The paper does not say how it fitted. Here: least squares with analytic derivatives, from the best
of many random starts. Errors come from refitting to the fit plus its residuals with random signs,
one sign for all points of a run, since points of one run err together. On synthetic losses (five
sizes, four T, noise of a point or of a run) their 95 % intervals held the planted coefficient in
85 to 100 % of cases.

P points, K = 3 terms (N, D, T).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ouro_jax.errors import ConfigError

FORMULA = "E + A/(N + t1)^alpha + B/(D + t2)^beta + C/(T + t3)^gamma"
VARIABLES = ("parameters N", "tokens D", "loops T")
NAMES = (("A", "alpha", "t1"), ("B", "beta", "t2"), ("C", "gamma", "t3"))
NUM_COEFFICIENTS, BETWEEN_RUNS = 10, 7  # in all, and those that only differences of runs tell
STARTS, POLISHED, RESAMPLES = 200, 4, 100
CONFIDENCE = 0.95
# What the points leave open (T, say, after two values of it) is settled by a weak pull towards this
# exponent and a shift of a tenth of the smallest value: being off by a factor of e costs this share
# of the squared error of a fit that was hardly pulled, and at first this share of the spread.
PULL, FIRST_PULL, USUAL_EXPONENT = 0.01, 1e-3, 0.5
PULLED = np.array([0, 0, 1, 1, 0, 1, 1, 0, 1, 1], float)  # exponents and shifts of theta
# Exponents looked for, and shifts t as shares of the smallest and the largest value.
EXPONENTS, SHIFTS = (0.02, 4.0), (1e-3, 10.0)


@dataclass(frozen=True)
class Law:
    """A fitted law. `theta` is [E, then ln height, ln exponent, ln shift of each term].

    A term's height is its value at `reference_K`, the geometric mean of its variable: A itself is
    hardly determined apart from α. `pull` is how many nats being off by a factor of e counts.
    """

    theta: np.ndarray
    reference_K: np.ndarray
    pull: float

    def __call__(self, x_PK: np.ndarray) -> np.ndarray:
        """The loss at points (N, D, T): [P, 3] → [P]."""
        return self.theta[0] + _terms(self.theta, x_PK, self.reference_K).sum(1)

    def coefficients(self) -> dict[str, float]:
        """E, A, alpha, t1, … of the formula."""
        height_K, exponent_K, shift_K = np.exp(self.theta[1:].reshape(3, 3).T)
        scale_K = height_K * (self.reference_K + shift_K) ** exponent_K
        values = {"E": float(self.theta[0])}
        for names, *of_term in zip(NAMES, scale_K, exponent_K, shift_K, strict=True):
            values |= dict(zip(names, map(float, of_term), strict=True))
        return values


def fit_law(x_PK: np.ndarray, loss_P: np.ndarray, seed: int = 0) -> Law:
    """The law of least squares through points (N, D, T) [P, 3] with their losses [P].

    ConfigError if there are fewer points than coefficients, or a variable has one value only.
    """
    if complaint := too_few(x_PK):
        raise ConfigError(f"the scaling law cannot be fitted: {complaint}.")
    reference_K = np.exp(np.log(x_PK).mean(0))
    bounds = _bounds(x_PK, loss_P)
    starts = _starts(x_PK, loss_P, reference_K, bounds, np.random.default_rng(seed))
    usual, pull = _usual(x_PK), FIRST_PULL * float(loss_P.std())
    fits = [_polish(start, x_PK, loss_P, reference_K, bounds, usual, pull) for start in starts]
    pull = max(pull, float(np.sqrt(2 * PULL * min(fit.cost for fit in fits))))
    fits = [_polish(fit.x, x_PK, loss_P, reference_K, bounds, usual, pull) for fit in fits]
    return Law(min(fits, key=lambda fit: fit.cost).x, reference_K, pull)


def too_few(x_PK: np.ndarray) -> str:
    """What these points lack for a fit, or an empty string."""
    if len(x_PK) <= NUM_COEFFICIENTS:
        return f"{len(x_PK)} points, expected more than its {NUM_COEFFICIENTS} coefficients"
    for name, values_P in zip(VARIABLES, x_PK.T, strict=True):
        if len(np.unique(values_P)) < 2:
            return f"all points have {name} = {values_P[0]:g}, expected at least two values"
    return ""


def weak_variables(x_PK: np.ndarray) -> list[str]:
    """Variables of fewer than four values: E and a term's three coefficients can fit those alone.

    Their coefficients are settled by the pull towards usual ones, and the intervals are too
    narrow; the loss at other values is a guess.
    """
    return [
        name
        for name, values_P in zip(VARIABLES, x_PK.T, strict=True)
        if len(np.unique(values_P)) < 4
    ]


def r_squared(loss_P: np.ndarray, predicted_P: np.ndarray) -> float:
    """1 - Σ(L - L̂)² / Σ(L - mean L)²; negative where the mean predicts better."""
    spread = np.sum((loss_P - loss_P.mean()) ** 2)
    return float(1 - np.sum((loss_P - predicted_P) ** 2) / spread) if spread else float("nan")


def intervals(
    law: Law, x_PK: np.ndarray, loss_P: np.ndarray, runs_P: Sequence[str], seed: int = 0
) -> dict[str, list[float]]:
    """The 95 % interval of each coefficient, from refits to residuals whose signs are drawn by run.

    Where the points leave a coefficient open, it is as wide as what was looked for. It knows
    nothing of what the formula itself cannot express.
    """
    rng = np.random.default_rng(seed)
    names, run_P = np.unique(np.asarray(runs_P), return_inverse=True)
    predicted_P, bounds = law(x_PK), _bounds(x_PK, loss_P)
    # A fit leaves residuals smaller than the errors were, the more so the fewer runs there are.
    freedom = np.sqrt(len(names) / max(len(names) - BETWEEN_RUNS, 1))
    residual_P = (loss_P - predicted_P) * freedom
    found = []
    for _ in range(RESAMPLES):
        sign_P = rng.choice([-1.0, 1.0], len(names))[run_P]
        # Pulled to another place each time, so that what is open comes out as wide.
        again_P, usual = predicted_P + sign_P * residual_P, rng.uniform(*bounds)
        fit = _polish(law.theta, x_PK, again_P, law.reference_K, bounds, usual, law.pull)
        found.append(Law(fit.x, law.reference_K, law.pull).coefficients())
    tail = 100 * (1 - CONFIDENCE) / 2
    return {
        name: np.percentile([each[name] for each in found], [tail, 100 - tail]).tolist()
        for name in found[0]
    }


def _terms(theta: np.ndarray, x_PK: np.ndarray, reference_K: np.ndarray) -> np.ndarray:
    height_K, exponent_K, shift_K = np.exp(theta[1:].reshape(3, 3).T)
    return height_K * ((x_PK + shift_K) / (reference_K + shift_K)) ** -exponent_K


def _usual(x_PK: np.ndarray) -> np.ndarray:
    """A theta with the exponents and shifts that are taken where the points say nothing."""
    usual = np.zeros(NUM_COEFFICIENTS)
    usual[2::3], usual[3::3] = np.log(USUAL_EXPONENT), np.log(0.1 * x_PK.min(0))
    return usual


def _polish(start, x_PK, loss_P, reference_K, bounds, usual, pull) -> Any:
    """Least squares from one start, exponents and shifts pulled a little towards `usual`."""
    least_squares = _optimize().least_squares
    pulls = np.diag(pull * PULLED)

    def residual_P(theta):
        error_P = theta[0] + _terms(theta, x_PK, reference_K).sum(1) - loss_P
        return np.concatenate([error_P, pulls @ (theta - usual)])

    def jacobian(theta):
        terms_PK = _terms(theta, x_PK, reference_K)
        _, exponent_K, shift_K = np.exp(theta[1:].reshape(3, 3).T)
        far_PK, near_K = x_PK + shift_K, reference_K + shift_K
        by_exponent_PK = -exponent_K * np.log(far_PK / near_K) * terms_PK
        by_shift_PK = -exponent_K * shift_K * (1 / far_PK - 1 / near_K) * terms_PK
        by_term = np.stack([terms_PK, by_exponent_PK, by_shift_PK], -1)
        by_all = np.concatenate([np.ones((len(x_PK), 1)), by_term.reshape(len(x_PK), 9)], 1)
        return np.concatenate([by_all, pulls])

    # trf finds the valley and then crawls in it for 200 steps; dogbox, alone often stuck at a
    # bound, goes down it in 20.
    theta = np.clip(start, *bounds)
    theta = least_squares(residual_P, theta, jacobian, bounds, method="trf", max_nfev=15).x
    return least_squares(residual_P, theta, jacobian, bounds, method="dogbox", max_nfev=30)


def _bounds(x_PK: np.ndarray, loss_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low_K, high_K = np.log(SHIFTS[0] * x_PK.min(0)), np.log(SHIFTS[1] * x_PK.max(0))
    scale = float(np.abs(loss_P).max())
    terms = [
        [(np.log(1e-6 * scale), np.log(scale)), tuple(np.log(EXPONENTS)), (low, high)]
        for low, high in zip(low_K, high_K, strict=True)
    ]
    pairs = np.array([(0.0, scale), *(pair for term in terms for pair in term)])
    return pairs[:, 0], pairs[:, 1]


def _starts(x_PK, loss_P, reference_K, bounds, rng) -> list[np.ndarray]:
    """Random exponents and shifts, with the E and the heights that suit each best; the best few."""
    nnls = _optimize().nnls
    starts = []
    for _ in range(STARTS):
        theta = rng.uniform(*bounds)
        theta[1::3] = 0.0
        columns = np.concatenate([np.ones((len(x_PK), 1)), _terms(theta, x_PK, reference_K)], 1)
        basis, small = np.linalg.qr(columns)
        amounts, error = nnls(small, basis.T @ loss_P)
        theta[0], theta[1::3] = amounts[0], np.log(np.maximum(amounts[1:], 1e-6))
        starts.append((error, theta))
    return [theta for _, theta in sorted(starts, key=lambda pair: pair[0])[:POLISHED]]


def _optimize() -> Any:
    try:
        from scipy import optimize
    except ModuleNotFoundError as error:
        raise ConfigError(
            "Fitting the scaling law needs scipy: run `pip install 'ouro_jax[study]'`."
        ) from error
    return optimize
