"""Journals of fleets in every condition: by the real scheduler, in virtual time."""

from dataclasses import replace

from smlt_tune.backend.history import History, read_history
from smlt_tune.backend.platforms.simulated import (
    SimulatedPlatform,
    SimulatedTraining,
    SimulationOptions,
)
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from smlt_tune.backend.simulated_fleet import SimulatedFleet
from smlt_tune.runtime.features import ModelFeatures

PINNED = PinnedOrDefault()


def describe(config):
    """A training whose accuracy grows towards its own limit."""
    if config.get("broken"):
        raise ZeroDivisionError(config["broken"])
    epochs, best = config.get("epochs", 4), config.get("best", 0.9)
    return SimulatedTraining(
        epochs=epochs,
        iterations=20,
        features=ModelFeatures(100_000, 400_000, 1e7),
        batch=64,
        iteration_s=lambda workers, memory_mb, batch: config.get("second", 0.5) / workers,
        metrics=lambda epoch: {
            "epoch": epoch,
            config.get("metric", "accuracy"): best * (1 - 0.5 ** (epoch + 1)),
        },
    )


def simulated(
    folder,
    configs,
    *,
    until_s=None,
    close=True,
    budget_usd=None,
    deadline_s=None,
    act=None,
    policy=PINNED,
    **options,
):
    """The events of a fleet, read at a moment or after its end.

    Args:
        folder: For its history, until it is read.
        configs: One for each job; ``name`` is its key.
        until_s: When to read; None lets all jobs end.
        close: Whether the fleet is closed before.
        budget_usd: Of the fleet.
        deadline_s: Of the fleet.
        act: Called with the fleet before time passes.
        policy: Chooses allocations; None for the resource manager.
        options: Of the platform.
    """
    platform = SimulatedPlatform(SimulationOptions(progress_s=5.0, **options))
    fleet = SimulatedFleet(
        platform,
        path=folder,
        budget_usd=budget_usd,
        deadline_s=deadline_s,
        policy=policy,
        tick_s=0.5,
    )
    with fleet:
        for config in configs:
            given = {name: config[name] for name in ("name", "workers", "goal") if name in config}
            fleet.submit(describe, config, **given)
        if act:
            act(fleet)
        fleet.run_until(lambda: until_s is not None and fleet.now_s >= until_s)
        events = fleet.history.read()
    if close:
        events = read_history(folder)
    return opened_with(events, budget_usd, deadline_s)


def repeated(events, times):
    """A fleet with so many times the jobs, each under names of its own."""
    found = []
    for one in events:
        numbers = range(times) if one.job else range(1)
        for number in numbers:
            job = f"{one.job}-{number}" if one.job else ""
            body = one.body
            if one.kind == "ledger":
                body = {**body, "job": job, "entry_id": f"{body['entry_id']}-{number}"}
            found.append(replace(one, job=job, body=body, seq=len(found) + 1))
    return found


def opened_with(events, budget_usd, deadline_s):
    """As a client records what it was given."""
    given = {"budget_usd": budget_usd, "deadline_s": deadline_s}
    return [
        replace(one, body={**one.body, **given}) if one.kind == "fleet" else one for one in events
    ]


class _Told:
    """A clock that says what it is told."""

    at = 0.0

    def wall(self):
        return self.at


def write(folder, events):
    """A fleet's folder that holds the events."""
    clock = _Told()
    with History(folder, clock=clock) as history:
        # Nobody loses power here, and a thousand jobs are many events.
        history._connection.execute("PRAGMA synchronous = OFF")
        for event in events:
            clock.at = event.at
            history.append(event.kind, event.job, event.body)
    return folder
