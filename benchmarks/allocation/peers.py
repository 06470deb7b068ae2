"""Other ways to choose workers and memory, all told the same: prices, limits, start-up, profiles.

They learn from profiles of the job itself alone. All begin with the allocation that is best on
average over other families (so that none of them starts worse than a well-chosen constant) and go
on with two quasi-random ones; what is known of a job's length turns a measured time per iteration
into time and cost of the whole job for everybody. SMLT's recipe and Optuna take a failure for want
of memory as a bad value, as their users do; the two other models are kept away from such
allocations by a line through the peaks that were seen.
"""

import contextlib
import warnings
from dataclasses import dataclass, replace

import numpy as np

from smlt_tune.backend.goals import Cheapest
from smlt_tune.backend.prices import Prices
from smlt_tune.backend.resource_manager.observations import Allocation
from smlt_tune.backend.resource_manager.policy import JobFacts
from smlt_tune.backend.resource_manager.tables import PlatformTable

_INITIAL = 3
_KINKS_MB = (1769, 3008, 3009, 5307, 5308, 7076, 7077, 8845, 8846)


@dataclass(frozen=True)
class Problem:
    """What a method is told of a job.

    Attributes:
        facts: Its goal, limits and workload.
        table: Of its platform, with errors.
        stores: With errors.
        prices: Exact.
        default: Best allocation for this kind of goal on average over other families.
    """

    facts: JobFacts
    table: PlatformTable
    stores: dict
    prices: Prices
    default: Allocation


class Peer:
    """Keeps what was seen and recommends the best of it; without a model."""

    def __init__(self, problem, rng):
        self.problem = problem
        self.rng = rng
        self.workers, self.memory_mb = np.zeros((2, 0))
        self.iteration_s = self.peak_mb = np.zeros(
            0
        )  # time is infinite, peak is 0 if it did not fit
        self.other_share = 0.05
        limits = problem.facts.limits
        self.most_workers = limits.max_workers
        self.least_mb, self.most_mb = limits.min_memory_mb, limits.max_memory_mb
        workers = np.unique(np.geomspace(1, self.most_workers, 56).round())
        sizes = [*np.geomspace(self.least_mb, self.most_mb, 30).round(), *_KINKS_MB]
        pool = np.meshgrid(workers, np.unique(sizes), indexing="ij")
        self.pool_workers, self.pool_mb = (axis.ravel() for axis in pool)
        from scipy.stats import qmc

        start = qmc.Sobol(2, seed=rng).random(_INITIAL + 1)[1:]
        self._initial = [self._from_unit(u) for u in start]

    def observe(self, profile):
        """A profiling run has ended."""
        time_s = np.inf if profile.out_of_memory else profile.iteration_s
        self.workers = np.append(self.workers, profile.allocation.workers)
        self.memory_mb = np.append(self.memory_mb, profile.allocation.memory_mb)
        self.iteration_s = np.append(self.iteration_s, time_s)
        self.peak_mb = np.append(self.peak_mb, 0.0 if profile.out_of_memory else profile.peak_mb)
        if not profile.out_of_memory and profile.other_share is not None:
            self.other_share = profile.other_share

    def suggest(self):
        """Where to profile next."""
        number = len(self.workers)
        if number == 0:
            return self.problem.default
        fits = np.isfinite(self.iteration_s).sum()
        if number < _INITIAL or fits < 2:
            return self._initial[number - 1] if number < _INITIAL else self._any()
        return self._next()

    def recommend(self):
        """On what to run the job: the best that was seen, or what exceeds its limit least."""
        if not np.isfinite(self.iteration_s).any():
            default = self.problem.default
            doublings = len(self.workers)  # nothing has fitted so far
            return replace(default, memory_mb=min(default.memory_mb * 2**doublings, self.most_mb))
        best = int(np.argmin(self._penalised()))
        return Allocation(int(self.workers[best]), int(self.memory_mb[best]))

    def interval(self, workers, memory_mb):
        """Mean and standard deviation of ln(time per iteration); None if there is no such model."""

    def _next(self):
        return self._any()

    def _any(self):
        """Random, evenly in log space, where memory is not known to be short."""
        possible = np.flatnonzero(~self._short(self.pool_workers, self.pool_mb))
        return self._at(self.rng.choice(possible))

    def _at(self, index):
        return Allocation(int(self.pool_workers[index]), int(self.pool_mb[index]))

    def _from_unit(self, unit):
        workers = self.most_workers ** unit[0]
        memory_mb = self.least_mb * (self.most_mb / self.least_mb) ** unit[1]
        return Allocation(max(1, round(workers)), round(memory_mb))

    def _short(self, workers, memory_mb):
        """Whether memory is likely to be short.

        It was with as many workers and as much memory, or it is less than 1.1 times a + b / n,
        fitted to the peaks that were seen (a is 300 MB as long as there is one).
        """
        from scipy.optimize import nnls

        fits = np.isfinite(self.iteration_s)
        n, m = self.workers[~fits], self.memory_mb[~fits]
        short = ((workers[:, None] <= n) & (memory_mb[:, None] <= m)).any(axis=1)
        if fits.any():
            n, peaks = self.workers[fits], self.peak_mb[fits]
            if len(np.unique(n)) > 1:
                fixed, per_part = nnls(np.column_stack([np.ones(len(n)), 1 / n]), peaks)[0]
            else:
                fixed = min(300.0, peaks.max())
                per_part = (peaks.max() - fixed) * n[0]
            short |= memory_mb < 1.1 * (fixed + per_part / workers)
        if short.all():  # then the largest is the best guess
            short = workers * memory_mb < (workers * memory_mb).max()
        return short

    def _lines(self, workers, memory_mb):
        """Objective and used part of the limit as lines in the time per iteration.

        Returns:
            Objective at 0 and per second; part of the limit at 0 and per second (0 without limit).
        """
        facts, prices = self.problem.facts, self.problem.prices
        seconds = self.problem.table.start_s, facts.iterations_left * (1 + self.other_share)
        rate = workers * memory_mb / 1024 * float(prices.gb_second_usd)
        usd = rate * seconds[0] + workers * float(prices.request_usd), rate * seconds[1]
        seconds = [np.full(np.shape(workers), x) for x in seconds]
        if isinstance(facts.goal, Cheapest):
            objective, limited, limit = usd, seconds, facts.goal.deadline_s
        else:
            objective, limited, limit = seconds, usd, facts.goal.budget_usd
        return *objective, *(x / (limit or np.inf) for x in limited)

    def _outcomes(self):
        """Objective and used part of the limit of what was seen; infinite if it did not fit."""
        a, b, c, d = self._lines(self.workers, self.memory_mb)
        with np.errstate(invalid="ignore"):
            return a + b * self.iteration_s, np.where(d > 0, c + d * self.iteration_s, 0.0)

    def _penalised(self):
        """Objective of what was seen, with a penalty for an exceeded limit as steep as the score's.

        What did not fit counts as twice the worst.
        """
        objective, used = self._outcomes()
        values = objective * (1 + 2 * np.maximum(0, used - 1))
        # Nothing that keeps the limit may lose against something that does not.
        within = values[used <= 1]
        if len(within):
            values = np.where(used > 1, np.maximum(values, 1.01 * within.min()), values)
        worst = values[np.isfinite(values)].max(initial=1.0)
        return np.where(np.isfinite(values), values, 2 * worst)


class RandomSearch(Peer):
    """Profiles anywhere."""

    name = "random"


class SmltRecipe(Peer):
    """SMLT, section 3.2: GP over workers and memory as they are, expected improvement."""

    name = "GP + EI on raw (n, m), as in SMLT"

    def _next(self):
        values = self._penalised()
        scale = np.array([self.most_workers, self.most_mb])
        gp = _regression()
        gp.fit(np.column_stack([self.workers, self.memory_mb]) / scale, values)
        # Evenly over the raw space, as a user would who knows nothing of logarithms.
        pool = self.rng.random((2000, 2)) * (scale - [1, self.least_mb]) + [1, self.least_mb]
        pool = pool.round()
        mean, deviation = gp.predict(pool / scale, return_std=True)
        chosen = pool[np.argmax(_log_ei(values.min() - mean, deviation))]
        return Allocation(int(chosen[0]), int(chosen[1]))


class LogGP(Peer):
    """GP on ln(time per iteration) over (ln n, ln m); constrained expected improvement.

    Recommends the posterior optimum at which the limit is kept with a probability of 84 %, once the
    quasi-random profiles are there; the best that was seen before that.
    """

    name = "GP + EI in log space"

    def interval(self, workers, memory_mb):
        if np.isfinite(self.iteration_s).sum() == 0:
            return None
        return self._posterior(np.asarray(workers, float), np.asarray(memory_mb, float))

    def recommend(self):
        if not self._ready():
            return super().recommend()
        mean, deviation = self._posterior(self.pool_workers, self.pool_mb)
        a, b, _, _ = self._lines(self.pool_workers, self.pool_mb)
        margin = self._ln_limit() - mean - deviation
        short = self._short(self.pool_workers, self.pool_mb)
        objective = np.where((margin >= 0) & ~short, a + b * np.exp(mean), np.inf)
        if np.isfinite(objective).any():
            return self._at(np.argmin(objective))
        return self._at(np.argmax(np.where(short, -np.inf, margin)))

    def _next(self):
        from scipy.special import log_ndtr

        mean, deviation = self._posterior(self.pool_workers, self.pool_mb)
        score = log_ndtr((self._ln_limit() - mean) / deviation)
        objective, used = self._outcomes()
        within = objective[used <= 1]
        if len(within):
            # The time per iteration at which an allocation would be as good as the best one.
            a, b, _, _ = self._lines(self.pool_workers, self.pool_mb)
            equal = np.log(np.maximum((within.min() - a) / b, 1e-12))
            score = score + _log_ei(equal - mean, deviation)
        score[self._short(self.pool_workers, self.pool_mb)] = -np.inf
        return self._at(np.argmax(score))

    def _ready(self):
        return np.isfinite(self.iteration_s).sum() >= _INITIAL

    def _ln_limit(self):
        """Of the time per iteration with which the limit is just kept."""
        _, _, c, d = self._lines(self.pool_workers, self.pool_mb)
        with np.errstate(divide="ignore"):
            return np.log(np.maximum((1 - c) / d, 1e-12))

    def _posterior(self, workers, memory_mb):
        fits = np.isfinite(self.iteration_s)
        gp = _regression(fitted=fits.sum() > 2)
        gp.fit(self._features(self.workers, self.memory_mb)[fits], np.log(self.iteration_s[fits]))
        return gp.predict(self._features(workers, memory_mb), return_std=True)

    def _features(self, workers, memory_mb):
        n = np.log(workers) / np.log(self.most_workers)
        m = np.log(memory_mb / self.least_mb) / np.log(self.most_mb / self.least_mb)
        return np.column_stack([n, m])


class BoTorch(Peer):
    """SingleTaskGPs of ln(objective) and ln(used part of the limit), LogConstrainedEI."""

    name = "BoTorch SingleTaskGP + constrained LogEI"

    def _next(self):
        import torch
        from botorch.acquisition.analytic import (
            LogConstrainedExpectedImprovement,
            LogExpectedImprovement,
            LogProbabilityOfFeasibility,
        )
        from botorch.models import ModelListGP

        fits = np.isfinite(self.iteration_s)
        objective, used = (np.log(np.maximum(y[fits], 1e-12)) for y in self._outcomes())
        limited = bool(np.any(used > np.log(2e-12)))
        x = torch.tensor(np.log(np.column_stack([self.workers, self.memory_mb])[fits]))
        pool = torch.tensor(np.log(np.column_stack([self.pool_workers, self.pool_mb])))[:, None]
        goal = self._fit(x, objective)
        within = objective[used <= 0]
        if not limited:
            acquisition = LogExpectedImprovement(goal, best_f=objective.min(), maximize=False)
        else:
            both = ModelListGP(goal, self._fit(x, used))
            kept = {1: (None, 0.0)}
            acquisition = (
                LogConstrainedExpectedImprovement(both, within.min(), 0, kept, maximize=False)
                if len(within)
                else LogProbabilityOfFeasibility(both, kept)
            )
        with torch.no_grad():
            score = acquisition(pool).numpy()
        score[self._short(self.pool_workers, self.pool_mb)] = -np.inf
        return self._at(np.argmax(score))

    def _fit(self, x, y):
        import torch
        from botorch import fit_gpytorch_mll
        from botorch.exceptions.errors import ModelFittingError
        from botorch.models import SingleTaskGP
        from botorch.models.transforms import Normalize
        from gpytorch.mlls import ExactMarginalLogLikelihood

        ends = [[1, self.least_mb], [self.most_workers, self.most_mb]]
        bounds = torch.log(torch.tensor(ends, dtype=torch.float64))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = torch.tensor(y)[:, None]
            model = SingleTaskGP(x, y, input_transform=Normalize(2, bounds=bounds))
            with contextlib.suppress(ModelFittingError):  # the modes of its priors stay
                fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        return model


class OptunaGP(Peer):
    """Optuna's GPSampler with a constraint, over log-scaled integers."""

    name = "Optuna GPSampler"

    def __init__(self, problem, rng):
        super().__init__(problem, rng)
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GPSampler's constraints are experimental
            sampler = optuna.samplers.GPSampler(
                seed=int(rng.integers(2**31)),
                n_startup_trials=_INITIAL,
                deterministic_objective=False,
                constraints_func=lambda trial: (trial.user_attrs["over"],),
            )
        self._study = optuna.create_study(sampler=sampler)
        default = {"workers": problem.default.workers, "memory_mb": problem.default.memory_mb}
        self._study.enqueue_trial(default)
        self._trial = None

    def suggest(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._trial = self._study.ask()
            workers = self._trial.suggest_int("workers", 1, self.most_workers, log=True)
            memory_mb = self._trial.suggest_int("memory_mb", self.least_mb, self.most_mb, log=True)
        return Allocation(workers, memory_mb)

    def observe(self, profile):
        super().observe(profile)
        objective, used = self._outcomes()
        finite = objective[np.isfinite(objective)]
        worst = finite.max(initial=1.0)
        short = profile.out_of_memory
        self._trial.set_user_attr("over", 1.0 if short else float(np.log(max(used[-1], 1e-12))))
        self._study.tell(self._trial, float(np.log(2 * worst if short else objective[-1])))


PEERS = {
    "random": RandomSearch,
    "smlt": SmltRecipe,
    "loggp": LogGP,
    "botorch": BoTorch,
    "optuna": OptunaGP,
}


def _regression(*, fitted=True, dimensions=2):
    """A GP whose hyper-parameters are fitted to the data, or wide guesses if there are too few."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    scales = Matern([0.5] * dimensions, (0.05, 20.0), nu=2.5)
    kernel = ConstantKernel(1.0, (0.05, 50.0)) * scales + WhiteKernel(1e-3, (1e-5, 0.1))
    return _Quiet(
        GaussianProcessRegressor(
            kernel,
            normalize_y=fitted,
            optimizer="fmin_l_bfgs_b" if fitted else None,
            n_restarts_optimizer=1,
            random_state=0,
        )
    )


class _Quiet:
    """A regression around its mean that says nothing of hyper-parameters at their bounds."""

    def __init__(self, model):
        self._model = model

    def fit(self, x, y):
        self._mean = np.mean(y)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model.fit(x, y - self._mean)

    def predict(self, x, return_std):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mean, deviation = self._model.predict(x, return_std=return_std)
        return mean + self._mean, np.maximum(deviation, 1e-6)


def _log_ei(gain, deviation):
    """ln of the expected improvement (Ament et al. 2023): no underflow where it is tiny."""
    from scipy.special import erfcx, log_ndtr

    z = gain / deviation
    log_pdf = -0.5 * z**2 - 0.5 * np.log(2 * np.pi)
    with np.errstate(all="ignore"):
        direct = np.log(np.exp(log_pdf) + z * np.exp(log_ndtr(z)))
        ratio = z * erfcx(-z / np.sqrt(2)) * np.sqrt(np.pi / 2)
        tail = np.where(z > -1e3, log_pdf + np.log1p(ratio), log_pdf - 2 * np.log(-z))
    return np.log(deviation) + np.where(z > -1, direct, tail)
