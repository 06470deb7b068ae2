"""A GP over workers, memory and what is known of a network, shared by siblings; without physics."""

import contextlib
import warnings

import numpy as np
from allocation.ours import facts_of
from allocation.peers import LogGP, Problem
from allocation.truth import GOALS, MAX_MB, MAX_WORKERS, PRICES, Allocation, Case

#: Siblings from which on there is a model, with wide guesses for its hyper-parameters.
_GUESSED = 3
#: Numbers of siblings at which the hyper-parameters are fitted; between them they stay.
_FITS = (12, 24, 48)
#: Mean and scale of ln of: workers, memory, parameters, FLOPs, batch, activations.
_CENTRE = np.array([2.6, 7.0, 16.0, 22.0, 6.2, 15.0])
_SCALE = np.array([1.5, 1.3, 1.5, 1.5, 1.2, 1.2])


class ContextualGP(LogGP):
    """GP on ln(time per iteration) over allocation and network, with effects of every trial.

    Args:
        problem: What is told.
        rng: For the first suggestions.
        siblings: Profiles of other jobs.
        model: With the hyper-parameters of :func:`fitted`; None as long as there are too few.
    """

    name = "contextual GP, no physics"

    def __init__(self, problem, rng, siblings, model):
        super().__init__(problem, rng)
        self._siblings = siblings
        self._model = model
        self._own = []

    def observe(self, profile):
        super().observe(profile)
        self._own.append(profile)

    def suggest(self):
        return self._next() if self._ready() else super().suggest()

    def interval(self, workers, memory_mb):
        return super().interval(workers, memory_mb) if self._model is not None else None

    def _ready(self):
        return self._model is not None

    def _posterior(self, workers, memory_mb):
        import torch

        seen = [p for p in (*self._siblings, *self._own) if not p.out_of_memory]
        x, y = _data(seen)
        work = self.problem.facts.workload
        at = np.column_stack([_inputs(work, workers, memory_mb), np.zeros(len(workers))])
        # The job's own number: that of its profiles, or a new one.
        at[:, -1] = x[-1, -1] if any(p.iteration_s for p in self._own) else x[:, -1].max() + 1
        # Not by way of the model itself, which would build the covariance of the whole pool.
        kernel, noise = self._model.covar_module, self._model.likelihood.noise
        x, y, at = torch.tensor(x), torch.tensor(y), torch.tensor(at)
        with torch.no_grad():
            constant = self._model.mean_module.constant
            among = kernel(x).to_dense() + noise * torch.eye(len(x))
            across = kernel(x, at).to_dense()
            root = torch.linalg.cholesky(among)
            weights = torch.cholesky_solve((y - constant)[:, None], root)[:, 0]
            known = torch.linalg.solve_triangular(root, across, upper=False).square().sum(0)
            variance = kernel(at, diag=True) - known
        return (constant + across.T @ weights).numpy(), variance.clamp(min=1e-6).sqrt().numpy()

    def _short(self, workers, memory_mb):
        """As of siblings: w0 + w1 P + w2 A ceil(B / n), with 25 % to spare."""
        from scipy.optimize import nnls

        if np.isfinite(self.iteration_s).any() or not self._ready():
            return super()._short(workers, memory_mb)
        seen = [p for p in self._siblings if not p.out_of_memory]
        rows = [_held(p.workload, p.allocation.workers) for p in seen]
        weights, _ = nnls(np.array(rows), np.array([p.peak_mb for p in seen]))
        work = self.problem.facts.workload
        need = np.array([_held(work, n) for n in workers]) @ weights
        return (memory_mb < 1.25 * need) | super()._short(workers, memory_mb)


def fitted(profiles, *, guessed):
    """A model with hyper-parameters of maximum likelihood, or with guesses.

    Linear and Matern parts over all inputs, an offset for every trial, and a Matern part over the
    allocation for every trial. Where no fit succeeds the guesses stay.
    """
    import torch
    from botorch import fit_gpytorch_mll
    from botorch.exceptions.errors import ModelFittingError
    from botorch.models import SingleTaskGP
    from gpytorch.kernels import LinearKernel, MaternKernel, RBFKernel, ScaleKernel
    from gpytorch.mlls import ExactMarginalLogLikelihood

    def same_trial():
        kernel = RBFKernel(active_dims=[6])
        kernel.lengthscale = 1e-2  # 1 for the same number, 0 for another
        kernel.raw_lengthscale.requires_grad_(False)
        return kernel

    everything = tuple(range(6))
    shared = MaternKernel(2.5, ard_num_dims=6, active_dims=everything)
    shared.lengthscale = 3.0
    own = MaternKernel(2.5, ard_num_dims=2, active_dims=(0, 1))
    kernel = (
        ScaleKernel(LinearKernel(ard_num_dims=6, active_dims=everything))
        + ScaleKernel(shared)
        + ScaleKernel(same_trial())
        + ScaleKernel(own * same_trial())
    )
    for part, scale in zip(kernel.kernels, (1.0, 0.5, 0.05, 0.05), strict=True):
        part.outputscale = scale
    x, y = (torch.tensor(part) for part in _data([p for p in profiles if not p.out_of_memory]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SingleTaskGP(
            x, y[:, None], covar_module=kernel, outcome_transform=None, input_transform=None
        )
        model.likelihood.noise = 1e-3
        model.mean_module.constant = float(y.mean())
        if not guessed:
            mll = ExactMarginalLogLikelihood(model.likelihood, model)
            with contextlib.suppress(ModelFittingError):  # it has put the guesses back
                fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": 75}})
    return model.eval().requires_grad_(False)


def history(family, jobs, constants):
    """Runs some siblings one after the other, each where those before recommend it.

    Returns:
        The profiles of each, in order, and for each the model that its successor starts with.
    """
    profiles, models, model = [], [], None
    for index in range(jobs):
        rng = np.random.default_rng([family.seed, 3, index])
        case = Case(family.candidate(index), GOALS[index % len(GOALS)], rng)
        known = [profile for job in profiles for profile in job]
        problem = problem_of(case, constants)
        chosen = ContextualGP(problem, rng, known, model).recommend()
        profiles.append(_run(case.candidate, chosen, rng))
        count = index + 1
        if count == _GUESSED or count in _FITS:
            known = [profile for job in profiles for profile in job]
            model = fitted(known, guessed=count == _GUESSED)
        models.append(model)
    return profiles, models


def problem_of(case, constants):
    """What a peer is told of a case."""
    family = case.candidate.family
    return Problem(facts_of(case), family.table, family.stores, PRICES, constants[case.kind])


def _run(candidate, allocation, rng):
    """Profiles of a job that doubles its memory, then its workers, until it fits."""
    n, m, profiles = allocation.workers, allocation.memory_mb, []
    while True:
        profiles.append(candidate.measure(Allocation(n, m), rng, 50))
        if not profiles[-1].out_of_memory:
            return tuple(profiles)
        n, m = (n, min(2 * m, MAX_MB)) if m < MAX_MB else (min(2 * n, MAX_WORKERS), m)


def _data(profiles):
    """Inputs, with the number of the trial last, and ln(time per iteration)."""
    trials = {}
    rows = [
        [
            *_inputs(p.workload, [p.allocation.workers], [p.allocation.memory_mb])[0],
            trials.setdefault(p.job_id, len(trials)),
        ]
        for p in profiles
    ]
    return np.array(rows, float), np.log([p.iteration_s for p in profiles])


def _inputs(work, workers, memory_mb):
    features = work.features
    known = np.log(
        [features.parameters, features.flops_per_sample, work.batch, features.activation_bytes]
    )
    places = np.log(np.column_stack([workers, memory_mb]).astype(float))
    return (np.column_stack([places, np.tile(known, (len(places), 1))]) - _CENTRE) / _SCALE


def _held(work, workers):
    part = np.ceil(work.batch / workers)
    features = work.features
    return 300.0, features.parameters / 5e4, features.activation_bytes * part / 2**20
