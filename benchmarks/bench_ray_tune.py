"""Hundreds of concurrent Tune trials: on a fleet, and beside it with Ray's own actors.

Every trial makes the same reports, with a pause before each, so that an ideal tuner takes
reports x pause seconds for all of them. Taken are the wall time, when the last trial had started,
the CPU time of the driver for each result, the memory of the driver and of what runs the trials,
and what is left of it afterwards. Plain Ray gets fewer trials: each takes an actor of some 100 MB.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import common

REPORTS = 3 if common.QUICK else 10
PAUSE_S = 0.2 if common.QUICK else 2.0
#: Looking at the memory of hundreds of processes takes a second: not more often than this, s.
LOOK_S = 1 if common.QUICK else 15
#: Kind of trial and how many of them.
RUNS = (
    [("fleet", 4), ("actors", 2)]
    if common.QUICK
    else [("fleet", 50), ("actors", 50), ("fleet", 200)]
)


def on_a_fleet(config):
    """Opens a session, so that the function needs no Ray."""
    import time

    import smlt_tune

    session = smlt_tune.session()
    for report in range(config["reports"]):
        time.sleep(config["pause_s"])
        session.report(report=report)


def in_an_actor(config):
    """The same as Tune's own users write it."""
    import time

    from ray import tune

    for report in range(config["reports"]):
        time.sleep(config["pause_s"])
        tune.report({"report": report})


def processes(root):
    """Ids of a process and everything below it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, fresh = {root}, {root}
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return found


def memory_mb(pids):
    """Memory of processes, what they share counted once."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


class Memory:
    """The most memory that the driver, and everything else below it, have taken."""

    def __init__(self):
        self.driver_mb = self.others_mb = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _watch(self):
        me, looked = os.getpid(), 0
        while not self._over.wait(1.0):
            self.driver_mb = max(self.driver_mb, memory_mb([me]))
            looked += 1
            if looked % LOOK_S == 0:
                self.others_mb = max(self.others_mb, memory_mb(processes(me) - {me}))


def drive(kind, trials):
    """One search, in a process of its own; prints what was measured."""
    import ray
    from ray import tune

    from smlt_tune.backend.platforms.local import LocalPlatform
    from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
    from smlt_tune.integrations.ray import SmltResources, register_smlt, unregister_smlt

    class Starts(tune.Callback):
        last_s = 0.0

        def on_trial_start(self, iteration, trials, trial, **info):
            self.last_s = time.monotonic()

    starts = Starts()
    folder = tempfile.mkdtemp(prefix="smlt-bench-")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    if kind == "fleet":
        platform = LocalPlatform(concurrency=trials, cores_per_vcpu=1.0)
        register_smlt(platform=platform, policy=PinnedOrDefault())
        resources = SmltResources(workers=1, memory_mb=512)
        trainable = tune.with_resources(on_a_fleet, resources)
        warm_up(platform)
    else:
        trainable = tune.with_resources(in_an_actor, {"CPU": 0.001})
    before, driver_mb = processes(os.getpid()), memory_mb([os.getpid()])
    others_mb = memory_mb(before - {os.getpid()})
    with Memory() as memory:
        begun_s, cpu_s = time.monotonic(), time.process_time()
        results = tune.Tuner(
            trainable,
            param_space={"reports": REPORTS, "pause_s": PAUSE_S},
            tune_config=tune.TuneConfig(num_samples=trials),
            run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=[starts]),
        ).fit()
        wall_s, cpu_s = time.monotonic() - begun_s, time.process_time() - cpu_s
    done = [result for result in results if not result.error]
    assert len(done) == trials, results.errors[:1]
    unregister_smlt()
    if kind == "fleet":
        platform.close()
    left = len(processes(os.getpid()) - before) if kind == "fleet" else None
    ray.shutdown()
    shutil.rmtree(folder)
    figures = {
        "kind": kind,
        "trials": trials,
        "wall_s": wall_s,
        "last_start_s": starts.last_s - begun_s,
        "cpu_ms_per_result": 1e3 * cpu_s / (trials * REPORTS),
        "driver_mb": memory.driver_mb - driver_mb,
        "others_mb": memory.others_mb - others_mb,
        "processes_left": left,
    }
    print("MEASURED " + json.dumps(figures))


def warm_up(platform):
    """The platform's helper preloads PyTorch for seconds after it was made."""
    import smlt_tune

    with smlt_tune.Fleet(platform=platform) as fleet:
        fleet.submit(on_a_fleet, {"reports": 1, "pause_s": 0}, workers=1, memory_mb=512).result()


def measure(kind, trials):
    """Runs one search in a fresh process, without Tune's loggers."""
    environment = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TUNE_MAX_PENDING_TRIALS_PG": str(trials),
    }
    said = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, kind, str(trials)],
        check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment,
    ).stdout  # fmt: skip
    return next(json.loads(line[9:]) for line in said.splitlines() if line.startswith("MEASURED "))


def draw(runs, facts):
    """Time and memory of every run beside each other."""
    fig, axes = common.figure(1, 3, figsize=(10, 0.5 * len(runs) + 1.8))
    names = [
        f"{run['trials']} {'on a fleet' if run['kind'] == 'fleet' else 'actors'}" for run in runs
    ]
    parts = (
        ("last_start_s", "until the last trial runs, s"),
        ("wall_s", f"whole search, s (ideal {REPORTS * PAUSE_S:g})"),
        ("driver_mb", "memory of the driver, MB more"),
    )
    for number, (axis, (key, label)) in enumerate(zip(axes, parts, strict=True)):
        bars = axis.barh(names, [run[key] for run in runs], color=common.COLOURS[number])
        axis.bar_label(bars, [f" {run[key]:,.1f}" for run in runs], fontsize=8)
        axis.set_xlabel(label)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        if number:
            axis.set_yticklabels([])
    common.save_figure(fig, "ray_tune", facts)


def main():
    """Measures, prints, saves, draws."""
    facts = common.machine()
    runs = [measure(kind, trials) for kind, trials in RUNS]
    head = ("trials", "wall s", "last start s", "driver CPU ms/result", "driver MB", "others MB")
    rows = [
        (
            f"{run['trials']} {run['kind']}", f"{run['wall_s']:.1f}", f"{run['last_start_s']:.1f}",
            f"{run['cpu_ms_per_result']:.2f}", f"{run['driver_mb']:.0f}", f"{run['others_mb']:.0f}",
        )
        for run in runs
    ]  # fmt: skip
    common.table(head, rows)
    result = {"reports": REPORTS, "pause_s": PAUSE_S, "ideal_s": REPORTS * PAUSE_S, "runs": runs}
    common.save("ray_tune", facts, result)
    draw(runs, facts)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        drive(sys.argv[1], int(sys.argv[2]))
    else:
        main()
