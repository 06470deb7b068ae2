import subprocess
import sys
from dataclasses import replace

import gpytorch
import numpy as np
import pytest
import torch
from scipy.stats import norm

from smlt_tune.backend.resource_manager import gaussian_process as gp
from smlt_tune.backend.resource_manager.physics import (
    THETA_MEAN,
    THETA_SD,
    IterationTime,
    Points,
)
from smlt_tune.backend.resource_manager.tables import PlatformTable

SIZES = (128, 1769, 10240)
TABLE = PlatformTable("t", SIZES, tuple(m / 1769 for m in SIZES), 2e10, 8e7, 1e-9, 2.0, 0.1)
MODEL = IterationTime(TABLE)


def places(rng, size, parameters=None):
    p = np.exp(rng.uniform(np.log(1e5), np.log(1e8), size)) if parameters is None else parameters
    p = np.broadcast_to(p, size).astype(float)
    return Points(
        workers=rng.integers(1, 60, size).astype(float),
        memory_mb=rng.integers(256, 10240, size).astype(float),
        parameters=p,
        sync_bytes=4 * p,
        flops=30 * p,
        batch=np.full(size, 512.0),
        latency_s=np.full(size, 1e-3),
        store_bandwidth=np.full(size, 1e9),
    )


def measurements(at, ln_s, trials, iterations=10, whole=None, models=None):
    """Of trials of different models, if nothing else is said."""
    size, trials = len(ln_s), np.asarray(trials, float)
    of, every = np.full(size, float(iterations)), np.ones(size, dtype=bool)
    whole = every if whole is None else np.asarray(whole)
    models = trials if models is None else np.asarray(models, float)
    return gp.Measurements(at, ln_s, of, trials, models, whole)


def predict(process, at, trial):
    """For a trial of a model of its own."""
    number = np.full(len(at.workers), float(trial))
    return process.predict(at, number, number)


def nothing():
    rng = np.random.default_rng(0)
    return measurements(places(rng, 0), np.zeros(0), np.zeros(0))


def test_without_measurements_it_is_the_analytic_model_with_its_prior():
    at = places(np.random.default_rng(1), 20)
    mean, sd = predict(gp.GaussianProcess(MODEL, nothing()), at, 0)
    assert mean == pytest.approx(MODEL(at, THETA_MEAN).ln_s)
    assert (sd > 0.3).all()


def test_the_client_needs_no_torch_for_decisions():
    modules = (
        "fleet",
        "late_policy",
        "resource_manager.manager",
        "resource_manager.gaussian_process",
    )
    code = "".join(f"import smlt_tune.backend.{module}\n" for module in modules)
    code += "import sys; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "smlt_tune.backend.resource_manager.gaussian_process" in out.stdout.split()
    assert {"torch", "gpytorch"}.isdisjoint(out.stdout.split())


def test_the_posterior_is_that_of_an_exact_gp_of_gpytorch():
    rng = np.random.default_rng(2)
    at, there = places(rng, 12), places(rng, 30)
    ln_s = MODEL(at, THETA_MEAN + 0.3).ln_s + rng.normal(0, 0.02, 12)
    trials = np.arange(12) // 3
    fitted = gp.GaussianProcess(MODEL, measurements(at, ln_s, trials))
    mean, sd = predict(fitted, there, 2)

    class Covariance(gpytorch.kernels.Kernel):
        def forward(self, x1, x2, diag=False, **_):
            kernel, a, b = gp.time_kernel(), x1.numpy(), x2.numpy()
            if diag:  # asked for of equal inputs only
                return torch.from_numpy(kernel.variance(a))
            return torch.from_numpy(kernel.covariance(a, b, kernel.apart(a, b)))

    class Exact(gpytorch.models.ExactGP):
        def forward(self, x):
            zero = torch.zeros(len(x), dtype=x.dtype)
            return gpytorch.distributions.MultivariateNormal(zero, Covariance()(x))

    theta = fitted.theta

    def shift(points):
        times = MODEL(points, theta)
        return times.ln_s + times.gradient @ (THETA_MEAN - theta), times

    (mean_at, times_at), (mean_there, times_there) = shift(at), shift(there)
    noise = torch.from_numpy(gp.noise_sd(np.full(12, 10.0)) ** 2)
    likelihood = gpytorch.likelihoods.FixedNoiseGaussianLikelihood(noise)
    numbers = trials.astype(float)
    x = torch.from_numpy(gp.features(at, times_at, numbers, numbers, np.ones(12)))
    exact = Exact(x, torch.from_numpy(ln_s - mean_at), likelihood).double()
    exact.eval()
    with torch.no_grad():
        number = np.full(30, 2.0)
        x = gp.features(there, times_there, number, number, np.ones(30))
        posterior = exact(torch.from_numpy(x))
    assert mean == pytest.approx(mean_there + posterior.mean.numpy(), abs=1e-5)
    assert sd == pytest.approx(fitted.scale * posterior.stddev.numpy(), rel=1e-4)


@pytest.mark.parametrize(
    ("number", "columns", "scales"),
    [
        (0, (2, 5, 4), gp.KIND_SCALES),
        (1, (0, 1), gp.FIELD_SCALES),
        (2, (0, 1, 2, 3, 4), gp.CONTEXT_SCALES),
    ],
)
def test_the_matern_kernels_are_those_of_gpytorch(number, columns, scales):
    rng = np.random.default_rng(8)
    some, others = rng.normal(8, 3, (2, 40, 6))
    others[:9] = some[:9]
    peer = gpytorch.kernels.MaternKernel(nu=2.5, ard_num_dims=len(scales)).double()
    peer.lengthscale = torch.tensor(scales, dtype=torch.float64)
    a, b = (torch.from_numpy(x[:, columns]) for x in (some, others))
    expected = peer(a, b).to_dense().detach().numpy()
    assert gp._matern(some, others)[number] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("error", "wider"), [(0.01, False), (0.6, True)])
def test_intervals_widen_where_measurements_are_off_by_more_than_the_model_allows(error, wider):
    rng = np.random.default_rng(3)
    at = places(rng, 40)
    ln_s = MODEL(at, THETA_MEAN).ln_s + rng.normal(0, error, 40)
    process = gp.GaussianProcess(MODEL, measurements(at, ln_s, np.arange(40) // 4))
    assert process.scale > 1.2 if wider else process.scale == 1.0


def family(rng, theta, trials, each, effect=0.2):
    """Measurements of siblings that the model describes up to an effect of each."""
    size = trials * each
    p = np.repeat(np.exp(rng.uniform(np.log(1e5), np.log(1e8), trials)), each)
    at = places(rng, size, p)
    effects = np.repeat(rng.normal(0, effect, trials), each)
    ln_s = MODEL(at, theta).ln_s + effects + rng.normal(0, 0.015, size)
    return at, ln_s, np.repeat(np.arange(trials), each)


def test_intervals_cover_what_they_say():
    covered = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        theta = THETA_MEAN + THETA_SD * rng.normal(size=len(THETA_MEAN))
        trials, each = int(rng.integers(1, 9)), 3
        at, ln_s, of = family(rng, theta, trials + 1, each)
        seen = of < trials
        known = Points(*(column[seen] for column in vars(at).values()))
        there = Points(*(column[~seen] for column in vars(at).values()))
        process = gp.GaussianProcess(MODEL, measurements(known, ln_s[seen], of[seen]))
        mean, sd = predict(process, there, trials)
        covered += list(np.abs(ln_s[~seen] - mean) < norm.ppf(0.975) * np.hypot(sd, 0.015))
    assert 0.88 <= np.mean(covered) <= 1.0


@pytest.mark.parametrize("synchronising", [0.2, 0.8])
def test_the_computation_of_one_measurement_tells_what_more_workers_would_bring(synchronising):
    at = places(np.random.default_rng(5), 3, 2e6)
    at = replace(at, workers=np.array([4.0, 1.0, 8.0]), memory_mb=np.full(3, 1769.0))
    here = Points(*(column[:1] for column in vars(at).values()))
    twice = Points(*(np.repeat(column[:1], 2) for column in vars(at).values()))
    whole = gp.GaussianProcess(MODEL, measurements(here, np.zeros(1), [0]))
    parts = measurements(twice, np.log([1.0, 1.0 - synchronising]), [0, 0], whole=[True, False])
    split = gp.GaussianProcess(MODEL, parts)
    (_, alone, many), sd = predict(split, at, 0)
    assert (sd[1:] < predict(whole, at, 0)[1][1:]).all()
    # Of the second, 4 workers synchronise most of the time: one alone is hardly slower.
    assert alone - many > 1.0 if synchronising == 0.2 else alone - many < 0.3


def test_siblings_and_own_measurements_narrow_the_prediction():
    rng = np.random.default_rng(3)
    at, ln_s, of = family(rng, THETA_MEAN + 0.5, 10, 3)
    there = places(rng, 50, 3e6)
    truth = MODEL(there, THETA_MEAN + 0.5).ln_s + 0.3

    def error(measured):
        mean, sd = predict(gp.GaussianProcess(MODEL, measured), there, 99)
        return np.median(np.abs(mean - truth)), np.median(sd)

    own = places(rng, 2, 3e6)
    columns = zip(vars(at).values(), vars(own).values(), strict=True)
    both = Points(*(np.concatenate(pair) for pair in columns))
    own_ln_s = MODEL(own, THETA_MEAN + 0.5).ln_s + 0.3
    cold = error(nothing())
    warm = error(measurements(at, ln_s, of))
    warmer = error(measurements(both, np.append(ln_s, own_ln_s), [*of, 99, 99]))
    assert cold[1] > 2 * warm[1] > 2 * warmer[1]
    assert cold[0] > warmer[0]
    assert warm[0] > warmer[0]


def test_what_was_learnt_of_convolutions_says_little_of_dense_layers():
    rng = np.random.default_rng(7)
    alone = {"workers": np.ones(12)}
    dense = replace(places(rng, 12, 2e6), **alone)
    convolutions = replace(dense, flops=50 * dense.flops)
    slow = MODEL(convolutions, THETA_MEAN).ln_s + 1.0
    process = gp.GaussianProcess(MODEL, measurements(convolutions, slow, np.arange(12) // 3))
    _, sure = predict(process, convolutions, 99)
    _, unsure = predict(process, dense, 99)
    assert sure.max() < 0.25
    assert unsure.min() > 0.45


def test_a_trial_of_a_model_that_was_measured_is_better_known_than_one_of_an_alike_model():
    rng = np.random.default_rng(6)
    at, ln_s, of = family(rng, THETA_MEAN, 6, 4, effect=0.0)
    slow = np.where(of == 5, 0.4, 0.0)  # a model that is slower than it seems
    process = gp.GaussianProcess(MODEL, measurements(at, ln_s + slow, of))
    there = Points(*(column[of == 5] for column in vars(at).values()))
    new = np.full(4, 99.0)
    alike, unsure = process.predict(there, new, new)
    equal, sure = process.predict(there, new, np.full(4, 5.0))
    own, surest = process.predict(there, np.full(4, 5.0), np.full(4, 5.0))
    truth = (ln_s + slow)[of == 5]
    assert (surest < sure).all()
    assert (sure < 0.8 * unsure).all()
    off = [np.abs(mean - truth).max() for mean in (own, equal, alike)]
    assert off == sorted(off)
    assert off[1] < 0.5 * off[2]


def test_one_straggler_does_not_spoil_the_rest():
    rng = np.random.default_rng(4)
    at, ln_s, of = family(rng, THETA_MEAN, 1, 12, effect=0.0)
    slow = ln_s.copy()
    slow[5] += 1.5

    def predicted(values):
        process = gp.GaussianProcess(MODEL, measurements(at, values, of))
        return predict(process, at, 0)[0]

    error = np.abs(predicted(slow) - predicted(ln_s))
    assert error[5] < 0.3  # of 1.5
    assert np.delete(error, 5).max() < 0.1


def test_a_job_far_slower_than_its_siblings_is_believed_at_once():
    rng = np.random.default_rng(4)
    at, ln_s, of = family(rng, THETA_MEAN, 4, 12, effect=0.0)
    ln_s[-1] += 1.5
    own = np.where(np.arange(len(of)) == len(of) - 1, 0, of + 1)
    process = gp.GaussianProcess(MODEL, measurements(at, ln_s, own, 5))
    assert predict(process, at, 0)[0][-1] == pytest.approx(ln_s[-1], abs=0.1)


def test_a_job_far_slower_than_its_siblings_is_believed_wherever_it_was_measured():
    rng = np.random.default_rng(3)
    at, ln_s, of = family(rng, THETA_MEAN, 4, 12, effect=0.1)
    own = np.where(np.arange(len(of)) >= len(of) - 2, 0, of + 1)
    ln_s[-2:] += 1.4
    process = gp.GaussianProcess(MODEL, measurements(at, ln_s, own, 5))
    assert predict(process, at, 0)[0][-2:] == pytest.approx(ln_s[-2:], abs=0.1)


def test_a_job_whose_workers_wait_long_for_each_other_is_believed():
    here = Points(*(np.full(2, x) for x in (4.0, 1645.0, 5e4, 2e5, 2e7, 192.0, 1e-4, 1e9)))
    computed = MODEL.computation(here, THETA_MEAN).ln_s[0]
    waits = np.array([computed + np.log(2.0), computed])  # as long as they compute
    measured = measurements(here, waits, [0, 0], 500, whole=[True, False])
    mean, _ = predict(gp.GaussianProcess(MODEL, measured), here, 0)
    assert mean[0] == pytest.approx(waits[0], abs=0.05)


def test_the_same_data_twice_do_not_make_it_sure_of_another_trial():
    rng = np.random.default_rng(5)
    at, ln_s, of = family(rng, THETA_MEAN, 1, 6)
    _, sd = predict(gp.GaussianProcess(MODEL, measurements(at, ln_s, of)), at, 7)
    assert (sd > 0.1).all()


def test_the_analytic_model_alone_has_no_fields_and_no_effects_of_trials():
    rng = np.random.default_rng(6)
    at, ln_s, of = family(rng, THETA_MEAN, 2, 6)
    process = gp.GaussianProcess(MODEL, measurements(at, ln_s, of), residual=False)
    first, second = predict(process, at, 0), predict(process, at, 1)
    assert np.array_equal(first, second)
