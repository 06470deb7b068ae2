"""Samplers of Optuna, as a sweep file names them.

A sweep may be continued by another process, and Optuna keeps no sampler's random numbers. So they
are derived anew for every trial: what it draws follows from the seed, its number and the results
that the study knows by then.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from smlt_tune.backend.sweeps.space import Categorical, FloatParameter, Parameter
from smlt_tune.backend.sweeps.sweep import Sweep

#: Makes a sampler from a seed.
Maker = Callable[[int], optuna.samplers.BaseSampler]


class SweepSampler(optuna.samplers.BaseSampler):
    """First the configurations that no result influences, then what Optuna's sampler suggests.

    Args:
        known: Configurations of the first trials, by their numbers.
        make: Makes the sampler for one trial after them.
        seed: Of the sweep.
    """

    def __init__(self, known: Sequence[Mapping[str, Any]], make: Maker, seed: int) -> None:
        self._known, self._make, self._seed = known, make, seed

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """What is suggested together: nothing of a configuration that is known."""
        if trial.number < len(self._known):
            return {}
        found: dict[str, BaseDistribution] = self._of(trial).infer_relative_search_space(
            study, trial
        )
        return found

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values of these."""
        if trial.number < len(self._known):
            return {}
        found: dict[str, Any] = self._of(trial).sample_relative(study, trial, search_space)
        return found

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """The value of one parameter, whichever others were drawn before."""
        if trial.number < len(self._known):
            return self._known[trial.number][param_name]
        sampler = self._of(trial, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _of(self, trial: FrozenTrial, parameter: str = "") -> optuna.samplers.BaseSampler:
        return self._make(zlib.crc32(f"{self._seed} {trial.number} {parameter}".encode()))


def sampler(sweep: Sweep) -> SweepSampler:
    """The sampler of a sweep."""
    options = sweep.sampler.options

    def tpe(seed: int) -> optuna.samplers.BaseSampler:
        named = {"n_ei_candidates": "ei_candidates", "multivariate": "multivariate"}
        given = {name: options[ours] for name, ours in named.items() if ours in options}
        startup = sweep.sampler.startup
        return optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed, **given)

    def gp(seed: int) -> optuna.samplers.BaseSampler:
        startup = sweep.sampler.startup
        return optuna.samplers.GPSampler(n_startup_trials=startup, seed=seed)

    def nsgaii(seed: int) -> optuna.samplers.BaseSampler:
        population = options.get("population", 50)
        return optuna.samplers.NSGAIISampler(population_size=population, seed=seed)

    def random(seed: int) -> optuna.samplers.BaseSampler:
        return optuna.samplers.RandomSampler(seed=seed)

    makers: dict[str, Maker] = {"tpe": tpe, "gp": gp, "nsgaii": nsgaii}
    return SweepSampler(sweep.configurations(), makers.get(sweep.sampler.name, random), sweep.seed)


def suggest(trial: optuna.Trial, space: Sequence[Parameter]) -> dict[str, Any]:
    """One value for each parameter."""
    found: dict[str, Any] = {}
    for one in space:
        if isinstance(one, Categorical):
            found[one.name] = trial.suggest_categorical(one.name, one.choices)
        elif isinstance(one, FloatParameter):
            found[one.name] = trial.suggest_float(
                one.name, one.low, one.high, log=one.log, step=one.step
            )
        else:
            found[one.name] = trial.suggest_int(
                one.name, one.low, one.high, log=one.log, step=one.step
            )
    return found
