"""What is measured of each method; every function is one task for one process."""

import time
from dataclasses import replace

import numpy as np
from allocation import contextual
from allocation.ours import LiveJob, Ours, facts_of, history, new_manager, profile_run
from allocation.peers import PEERS
from allocation.truth import (
    GOALS,
    MAX_MB,
    MAX_WORKERS,
    MIN_MB,
    Allocation,
    Case,
    Family,
)

#: Test candidates are numbered from here, siblings from 0.
_FIRST_TEST = 1000
#: Families whose best constants the peers begin with.
_OTHER_FAMILIES = range(900_000, 900_020)


def test_case(family, number):
    """A candidate that is no sibling's, with the goal of that number."""
    rng = np.random.default_rng([family.seed, 4, number])
    return Case(family.candidate(_FIRST_TEST + number), GOALS[number % len(GOALS)], rng)


def best_constants():
    """For each kind of goal the allocation with the least median score over other families."""
    chosen = {}
    for number, goal in enumerate(GOALS):
        cases = [test_case(Family(seed), number) for seed in _OTHER_FAMILIES]
        scores = np.median([case.scores for case in cases], axis=0)
        at = np.unravel_index(np.argmin(scores), scores.shape)
        grid = cases[0].candidate.grid
        chosen[goal] = Allocation(int(grid.workers[at]), int(grid.memory_mb[at]))
    return chosen


def peer_task(seed, name, ks, constants):
    """One of the peers on all cases of a family."""
    _one_thread()
    family, rows = Family(seed), []
    for number in range(len(GOALS)):
        case = test_case(family, number)
        problem = contextual.problem_of(case, constants)
        method = PEERS[name](problem, np.random.default_rng([seed, 5, number]))
        rows += _learning(method, case, ks, {"method": name, "siblings": 0})
    return rows


def manager_task(seed, name, ks, siblings, compared, profiled):
    """The resource manager, or its analytic model alone, on all cases of a family.

    The siblings of a case are jobs that the same method has run before, without profiling runs.

    Args:
        seed: Of the family.
        name: ``ours`` or ``analytic``.
        ks: Numbers of profiling runs.
        siblings: Numbers of earlier jobs.
        compared: On how many random allocations predictions are compared with the truth.
        profiled: Numbers of profiling runs before whole jobs.

    Returns:
        Rows of what was measured.
    """
    _one_thread()
    family, rows, residual = Family(seed), [], name == "ours"
    seen = history(family, max(siblings), GOALS, residual=residual) if max(siblings) else []
    for number in range(len(GOALS)):
        case = test_case(family, number)
        for count in siblings:
            known = [profile for job in seen[:count] for profile in job]
            labels = {"method": name, "siblings": count}
            method = Ours(family, facts_of(case), known, residual=residual)
            rows += _learning(method, case, ks, labels, compared)
            for runs in profiled:
                manager = new_manager(family, known, residual=residual)
                rows.append(_live(manager, case, runs, labels))
    return rows


def contextual_task(seed, ks, siblings, constants):
    """A GP without physics that knows siblings, on all cases of a family."""
    _one_thread()
    family, rows = Family(seed), []
    seen, models = contextual.history(family, max(siblings), constants)
    for number in range(len(GOALS)):
        case = test_case(family, number)
        for count in siblings:
            known = [profile for job in seen[:count] for profile in job]
            method = contextual.ContextualGP(
                contextual.problem_of(case, constants),
                np.random.default_rng([seed, 5, number]),
                known,
                models[count - 1],
            )
            rows += _learning(method, case, ks, {"method": "contextual", "siblings": count})
    return rows


def recipe_task(seed, runs, constants):
    """Whole jobs by the SMLT recipe: profile, then run on the best of what was seen."""
    _one_thread()
    family, rows = Family(seed), []
    for number in range(len(GOALS)):
        case = test_case(family, number)
        problem = contextual.problem_of(case, constants)
        method = PEERS["smlt"](problem, np.random.default_rng([seed, 5, number]))
        rng, paid = np.random.default_rng([seed, 6, number]), np.zeros(2)

        def observe(profile, seconds, usd, method=method, paid=paid):
            paid += seconds, usd
            method.observe(profile)

        for _ in range(runs):
            profile_run(case, method.suggest(), rng, observe)
        score, over, short = case.run(method.recommend(), *paid.tolist())
        rows.append(
            {
                "method": "smlt",
                "siblings": 0,
                "what": "whole job",
                "profiled": runs,
                "goal": case.kind,
                "score": score,
                "over": over,
                "moves": 0,
                "failures": int(short),
            }
        )
    return rows


def store_task(seed, siblings):
    """Two stores: ours chooses, or is told to take one of them."""
    _one_thread()
    family, rows = Family(seed, two_stores=True), []
    seen = history(family, max(siblings), GOALS)
    for number in range(len(GOALS)):
        case = test_case(family, number)
        for count in siblings:
            known = [profile for job in seen[:count] for profile in job]
            for pinned in (None, *family.stores):
                manager = new_manager(family, known)
                chosen = manager.first(facts_of(case, store=pinned)).allocation
                score, over, short = case.run(chosen)
                rows.append(
                    {
                        "what": "store",
                        "method": "ours" if pinned is None else f"always {pinned}",
                        "siblings": count,
                        "goal": case.kind,
                        "score": score,
                        "over": over,
                        "short": short,
                        "right": chosen.store == case.oracle.store,
                    }
                )
    return rows


def latency_task(seed, counts):
    """CPU time of decisions with so many profiles of siblings, one for each."""
    _one_thread()
    family, rows = Family(seed), []
    rng = np.random.default_rng([seed, 7])
    known = []
    for index in range(max(counts)):
        candidate = family.candidate(10_000 + index)
        where = _anywhere(candidate, rng, 1)
        known.append(candidate.measure(Allocation(int(where[0][0]), int(where[1][0])), rng))
    for count in counts:
        for number in range(len(GOALS)):
            case = test_case(family, number)
            facts = facts_of(case)
            manager = new_manager(family, known[:count])
            first_ms, decision = _cpu_ms(manager.first, facts)
            manager.observe(case.candidate.measure(decision.allocation, rng, 50))
            running = replace(facts, allocation=decision.allocation)
            review_ms, _ = _cpu_ms(manager.review, running)
            rows.append(
                {"what": "latency", "siblings": count, "first": first_ms, "review": review_ms}
            )
    return rows


def _learning(method, case, ks, labels, compared=12):
    """Recommendations of a method after some profiling runs."""
    rng, rows = np.random.default_rng([case.candidate.family.seed, 8]), []
    suggest_ms = []
    for k in range(max(ks) + 1):
        if k in ks:
            recommend_ms, chosen = _cpu_ms(method.recommend)
            score, over, short = case.run(chosen)
            rows.append(
                {
                    **labels,
                    "what": "profiles",
                    "goal": case.kind,
                    "k": k,
                    "score": score,
                    "over": over,
                    "short": short,
                    "recommend_ms": recommend_ms,
                    "suggest_ms": suggest_ms[-1] if suggest_ms else None,
                    "covered": _covered(method, case, compared),
                }
            )
        if k < max(ks):
            spent_ms, where = _cpu_ms(method.suggest)
            suggest_ms.append(spent_ms)
            method.observe(case.candidate.measure(where, rng))
    return rows


def _live(manager, case, profiled, labels):
    rng = np.random.default_rng([case.candidate.family.seed, 9])
    job = LiveJob(manager, case, rng)
    job.profile_first(profiled)
    ride = job.run()
    score, over = case.score(ride.seconds, ride.usd)
    return {
        **labels,
        "what": "whole job",
        "profiled": profiled,
        "goal": case.kind,
        "score": score,
        "over": over,
        "moves": ride.moves,
        "failures": ride.failures,
    }


def _covered(method, case, count):
    """Whether the truth lies in the 95 % interval at some random allocations; None: no model."""
    rng = np.random.default_rng([case.candidate.family.seed, 10])
    workers, memory_mb = _anywhere(case.candidate, rng, count)
    predicted = method.interval(workers, memory_mb)
    if predicted is None:
        return None
    mean, deviation = predicted
    truth = np.log(case.candidate.iteration_s(workers, memory_mb))
    return (np.abs(truth - mean) <= 1.96 * deviation).tolist()


def _anywhere(candidate, rng, count):
    """Random allocations whose memory is enough, evenly in log space."""
    chosen = []
    while len(chosen) < count:
        n = round(MAX_WORKERS ** rng.random())
        m = round(MIN_MB * (MAX_MB / MIN_MB) ** rng.random())
        if candidate.fits(n, m):
            chosen.append((n, m))
    return np.array(chosen).T


def _cpu_ms(call, *args):
    begun = time.process_time()
    result = call(*args)
    return 1e3 * (time.process_time() - begun), result


def _one_thread():
    """Two processes share two cores; threads would only wait for each other."""
    import torch

    torch.set_num_threads(1)
