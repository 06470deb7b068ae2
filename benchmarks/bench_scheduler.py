"""What the end client pays for the scheduler: CPU time per 1,000 reports and per started job.

One job reports as fast as it can, or many jobs return at once; the CPU time of each of the client's
threads is read from the kernel before and after. What the client uses in the same time while a
fleet has nothing to do is shown beside it, and is not taken off. Reports that come faster than they
can be written to the history wait in the queue; how long one takes that does not is measured with
pauses between them.
"""

import tempfile
import threading
import time
from pathlib import Path

import common

import smlt_tune as smlt
from smlt_tune.backend.platforms.local import LocalPlatform

COUNTS = (200,) if common.QUICK else (1000, 2000, 5000)
JOBS = 5 if common.QUICK else 40
ROUNDS = 1 if common.QUICK else 3
IDLE_S = 1.0 if common.QUICK else 5.0


def report(config):
    """Reports the time, again and again."""
    import time

    session = smlt.session()
    for index in range(config["count"]):
        time.sleep(config["pause_s"])
        session.report(index=index, sent=time.monotonic(), accuracy=0.5)


def nothing(config):
    """Is done at once."""


def cpu_by_thread():
    """CPU seconds of every thread of this process, by name."""
    used = {}
    for thread in threading.enumerate():
        stat = Path(f"/proc/self/task/{thread.native_id}/schedstat")
        used[thread.name] = used.get(thread.name, 0.0) + int(stat.read_text().split()[0]) / 1e9
    return used


def measured(action):
    """What an action costs this process: wall and CPU seconds, and CPU by thread."""
    before, cpu, wall = cpu_by_thread(), time.process_time(), time.perf_counter()
    value = action()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    after = cpu_by_thread()
    threads = {name: round(after[name] - before.get(name, 0.0), 4) for name in after}
    return {"wall_s": wall, "cpu_s": cpu, "threads_s": threads, "value": value}


def follow(fleet, count, pause_s=0.0):
    """Runs a job that reports; the delays between sending and having each report, seconds."""
    job = fleet.submit(report, {"count": count, "pause_s": pause_s}, workers=1, memory_mb=1769)
    delays = [time.monotonic() - r.metrics["sent"] for r in job.reports()]
    if len(delays) != count:
        raise RuntimeError(f"{len(delays)} of {count} reports came")
    return delays


def start_many(fleet, count):
    """Starts jobs that do nothing and waits for all of them."""
    jobs = [fleet.submit(nothing, workers=1, memory_mb=512) for _ in range(count)]
    for job in jobs:
        job.result(timeout_s=120)


def draw(reports, jobs, idle, facts):
    """CPU time by thread."""
    fig, (left, right) = common.figure(
        1, 2, figsize=(9, 4), width_ratios=(max(2, len(reports)), 1.4)
    )
    threads = {
        "smlt-scheduler": "scheduler (decides, writes the history)",
        "smlt-events": "listener (reads the parameter store)",
        "MainThread": "main thread (the user's)",
        "other": "others (platform)",
    }
    colours = dict(zip(threads, common.COLOURS, strict=False))

    def stack(axis, place, parts, label):
        bottom = 0.0
        for name in threads:
            known = [n for n in parts if n in threads]
            value = (
                sum(v for n, v in parts.items() if n not in known)
                if name == "other"
                else parts.get(name, 0.0)
            )
            axis.bar(
                place,
                value * 1e3,
                0.6,
                bottom=bottom,
                color=colours[name],
                label=threads[name] if label else None,
            )
            bottom += value * 1e3
        axis.text(place, bottom, f"{bottom:.3g}", ha="center", va="bottom", fontsize=9)

    for place, (count, case) in enumerate(reports.values()):
        parts = {name: s / count * 1000 for name, s in case["threads_s"].items()}
        stack(left, place, parts, place == 0)
    left.set_xticks(range(len(reports)), reports)
    left.set_xlabel("reports of the job")
    left.set_ylabel("CPU time per 1,000 reports, ms")
    left.set_title("Reports", loc="left")
    left.margins(y=0.45)
    left.legend(fontsize=8, loc="upper left")
    stack(right, 0, {n: s / JOBS for n, s in jobs["threads_s"].items()}, label=False)
    stack(right, 1, {n: s / IDLE_S for n, s in idle["threads_s"].items()}, label=False)
    right.set_xticks((0, 1), ("one job\nstarted", "one second\nof nothing"))
    right.set_ylabel("CPU time, ms")
    right.set_title("Jobs, and idling", loc="left")
    right.margins(y=0.15)
    common.save_figure(fig, "scheduler", facts)


def middle(rounds):
    """The round with the median CPU time, with the samples of all."""
    chosen = sorted(rounds, key=lambda r: r["cpu_s"])[len(rounds) // 2]
    summary = {key: chosen[key] for key in ("threads_s",)}
    summary["cpu_s"] = common.summary([r["cpu_s"] for r in rounds])
    summary["wall_s"] = common.summary([r["wall_s"] for r in rounds])
    delays = [d * 1e3 for r in rounds for d in r["value"] or ()]
    if delays:
        kept = common.summary(delays)
        summary["delay_ms"] = {key: kept[key] for key in ("median", "low", "high")}
    return summary


def main():
    facts = common.machine()
    reports, jobs, paced, kept = {count: [] for count in COUNTS}, [], [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalPlatform(concurrency=2, cores_per_vcpu=0.8) as platform,
        smlt.Fleet(platform=platform) as fleet,
    ):
        start_many(fleet, 2)  # loads everything
        idle = measured(lambda: time.sleep(IDLE_S))
        for _ in range(ROUNDS):
            for count in COUNTS:
                reports[count].append(measured(lambda n=count: follow(fleet, n)))
            with smlt.Fleet(platform=platform, path=f"{folder}/{len(kept)}") as durable:
                start_many(durable, 1)
                kept.append(measured(lambda f=durable: follow(f, COUNTS[0])))
            paced.append(measured(lambda: follow(fleet, COUNTS[0] // 10, 0.02)))
            jobs.append(measured(lambda: start_many(fleet, JOBS)))
    result = {
        "reports": {str(count): middle(rounds) for count, rounds in reports.items()},
        "paced_reports": {"count": COUNTS[0] // 10, "pause_s": 0.02, **middle(paced)},
        "reports_kept_on_disk": {"count": COUNTS[0], **middle(kept)},
        "jobs": {"count": JOBS, **middle(jobs)},
        "idle": {"seconds": IDLE_S, **middle([idle])},
    }
    for count, case in result["reports"].items():
        per_thousand = case["cpu_s"]["median"] / int(count) * 1000
        case["cpu_s_per_1000_reports"] = round(per_thousand, 5)
    result["jobs"]["cpu_s_per_job"] = round(result["jobs"]["cpu_s"]["median"] / JOBS, 5)
    common.save("scheduler", facts, result)
    pictured = {f"{int(count):,}": (int(count), c) for count, c in result["reports"].items()}
    pictured[f"{COUNTS[0]:,}\n(fleet on disk)"] = (COUNTS[0], result["reports_kept_on_disk"])
    draw(pictured, result["jobs"], result["idle"], facts)
    rows = [
        (
            f"{int(count):,} reports",
            f"{case['cpu_s_per_1000_reports'] * 1e3:.0f} ms / 1,000",
            f"{case['wall_s']['median']:.2f}",
            f"{case['delay_ms']['median']:.1f}",
        )
        for count, case in result["reports"].items()
    ]
    for key, words in (
        ("reports_kept_on_disk", "reports, fleet kept on disk"),
        ("paced_reports", "reports, one every 20 ms"),
    ):
        case = result[key]
        rows.append(
            (
                f"{case['count']:,} {words}",
                f"{case['cpu_s']['median'] / case['count'] * 1e6:.0f} ms / 1,000",
                f"{case['wall_s']['median']:.2f}",
                f"{case['delay_ms']['median']:.1f}",
            )
        )
    each = result["jobs"]["cpu_s_per_job"] * 1e3
    rows.append((f"{JOBS} jobs", f"{each:.1f} ms / job", f"{jobs[0]['wall_s']:.2f}", ""))
    rows.append(("idle", f"{idle['cpu_s'] / IDLE_S * 1e3:.1f} ms / s", f"{IDLE_S:.2f}", ""))
    common.table(("what", "CPU of the client", "wall s", "delay of a report, ms"), rows)


if __name__ == "__main__":
    main()
