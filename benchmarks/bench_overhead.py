"""What an iteration costs more with a session than in a bare training loop, with one worker.

One function on the local platform, with a whole core, trains two equal models: one bare, one in the
session's care, in alternating blocks of a few tenths of a second, so that other load on the machine
meets both. What the session does by the clock (signs of life, checkpoints, looking for a wish to
leave) goes by a clock that stands still while the bare loop runs; each epoch ends with a report.

CPU time is the figure to trust on a machine that is not alone; wall time adds what the session
waits for (the object store's disk, the parameter store) and whatever else the machine was doing.
"""

import statistics
import time

import common

import smlt_tune as smlt
from smlt_tune.backend.platforms.local import LocalPlatform

AIM = 0.02
#: Milliseconds per iteration: seconds of training each way, iterations per block.
CASES = {1: (6.0, 100), 10: (20.0, 10), 100: (14.0, 1)}
QUICK_CASES = {10: (1.0, 10)}
#: What is timed by itself in a run of its own, and what it is.
PARTS = {
    "step": "training step (with the session's hook)",
    "bare step": "bare training step",
    "between": "all between two steps",
    "_seed_generators": "random generators",
    "fetch": "indexing the data set",
    "bare fetch": "the bare loop's indexing",
    "_maybe_checkpoint": "checkpoints",
    "_should_leave": "time limit, wish to leave",
    "_sign_of_life": "signs of life",
}


def train(config):
    """Alternates bare and session blocks; returns (wall, CPU) seconds of each."""
    import torch
    from torch import nn
    from torch.nn import functional

    session = smlt.session()

    class Clock:
        """The session's clock, which stands still while the bare loop runs."""

        def __init__(self, real):
            self.real, self.stopped_s = real, 0.0

        def monotonic(self):
            return self.real.monotonic() - self.stopped_s

        def wall(self):
            return self.real.wall()

        def sleep(self, seconds):
            self.real.sleep(seconds)

    clock = session._clock = Clock(session._clock)
    edge = 12

    def make():
        if config["target_ms"] < 3:
            model = nn.Sequential(
                nn.Flatten(), nn.Linear(edge * edge, 64), nn.ReLU(), nn.Linear(64, 10)
            )
        else:
            model = nn.Sequential(
                *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Flatten(), nn.Linear(64 * 9, 128), nn.ReLU(), nn.Linear(128, 10)),
            )
        return model, torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(model, optimizer, x, y):
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def bare(model, optimizer, count, batch, order):
        """As one would write it without a session: shuffled batches of two tensors."""
        for i in range(count):
            x, y = fetch(order[i * batch : (i + 1) * batch])
            bare_step(model, optimizer, x, y)

    def fetch(chosen):
        return images[chosen], labels[chosen]

    parts, bare_step, session_step = {}, step, step

    def add(name, begun):
        if name in parts:
            parts[name][0] += time.perf_counter() - begun[0]
            parts[name][1] += time.thread_time() - begun[1]

    def timed(name, function):
        """The function, with what it takes added up."""
        parts.setdefault(name, [0.0, 0.0])  # each loop has a buffer of its own

        def call(*args, **options):
            begun = time.perf_counter(), time.thread_time()
            result = function(*args, **options)
            add(name, begun)
            return result

        return call

    if config["parts"]:
        from smlt_tune.runtime import session as module

        for name in ("_seed_generators", "_maybe_checkpoint", "_should_leave", "_sign_of_life"):
            setattr(session, name, timed(name, getattr(session, name)))
        buffer = module.minibatch_buffer
        module.minibatch_buffer = lambda *args: timed("fetch", buffer(*args))
        fetch = timed("bare fetch", fetch)
        bare_step, session_step = timed("bare step", step), timed("step", step)
        parts["between"] = [0.0, 0.0]

    bare_model, bare_optimizer = make()
    with_session = session.prepare(*make())
    block = config["block"]
    # The batch size that takes the wanted time.
    images, labels = torch.randn(4096, 1, edge, edge), torch.randint(0, 10, (4096,))
    batch = config.get("batch", 16)
    for turn in range(8 if "batch" not in config else 0):
        took = []
        for _ in range(5 + 3 * turn):
            begun = time.thread_time()
            bare(bare_model, bare_optimizer, 1, batch, torch.arange(batch))
            took.append((time.thread_time() - begun) * 1e3)
        ratio = config["target_ms"] / statistics.median(took)
        batch = max(1, min(4096, round(batch * min(4.0, max(0.25, ratio)))))
    blocks = max(4, round(config["seconds"] * 1e3 / (config["target_ms"] * block)))
    per_epoch = max(1, min(blocks // 5, 65536 // (block * batch)))
    images = torch.randn(per_epoch * block * batch, 1, edge, edge)
    labels = torch.randint(0, 10, (len(images),))
    bare(bare_model, bare_optimizer, block, batch, torch.arange(block * batch))

    def now():
        return time.perf_counter(), time.process_time()

    bares, sessions = [], []
    seen, mark, left = 0, None, None
    for epoch in session.epochs(-(-blocks // per_epoch) + 1):
        for number, (x, y) in enumerate(session.batches((images, labels), batch), 1):
            if left:
                add("between", left)
            session_step(*with_session, x, y)
            left = parts and (time.perf_counter(), time.thread_time())
            if number % block:
                continue
            seen += 1
            here = now()
            if mark and seen > 2:  # the first blocks warm up
                sessions.append([b - a for a, b in zip(mark, here, strict=True)])
            order = torch.randperm(len(images))[: block * batch]
            begun = now()
            bare(bare_model, bare_optimizer, block, batch, order)
            ended = now()
            if mark and seen > 2:
                bares.append([b - a for a, b in zip(begun, ended, strict=True)])
            clock.stopped_s += time.perf_counter() - here[0]
            mark = now()
            left = parts and (time.perf_counter(), time.thread_time())
        session.report(epoch=epoch, loss=0.0)
    if config["parts"]:
        module.minibatch_buffer = buffer  # this instance may be used again
        return {name: [s / (seen * block) * 1e6 for s in both] for name, both in parts.items()}
    size = sum(p.numel() for p in bare_model.parameters())
    return {"bare": bares, "session": sessions, "batch": batch, "parameters": size, "block": block}


def measure(fleet, target_ms, seconds, block):
    """One iteration time: the overhead, and in a shorter run of its own what it is made of."""
    config = {"target_ms": target_ms, "seconds": seconds, "block": block, "parts": False}

    def run(config):
        return fleet.submit(train, config, workers=1, memory_mb=1769).result(300).value

    found = run(config)
    parts = run({**config, "parts": True, "batch": found["batch"], "seconds": seconds / 4})
    result = {key: found[key] for key in ("batch", "parameters", "block")}
    for column, what in enumerate(("wall", "cpu")):
        for side in ("bare", "session"):
            per_iteration = [sample[column] / block * 1e3 for sample in found[side]]
            result[f"{side}_{what}_ms"] = common.summary(per_iteration)
        total = [sum(s[column] for s in found[side]) for side in ("bare", "session")]
        pairs = zip(found["bare"], found["session"], strict=True)
        pairs = [(b[column], s[column]) for b, s in pairs]
        ratios = [s / b - 1 for b, s in pairs]
        result[f"overhead_{what}"] = round(total[1] / total[0] - 1, 5)
        result[f"overhead_{what}_error"] = round(standard_error(pairs), 5)
        result[f"overhead_{what}_pairs"] = common.summary(ratios)
    result["parts_us_per_iteration"] = {
        name: {"wall": round(wall, 2), "cpu": round(cpu, 2)} for name, (wall, cpu) in parts.items()
    }
    return result


def standard_error(pairs):
    """Of the ratio of the sums of paired samples, by the jackknife."""
    bare, session = map(sum, zip(*pairs, strict=True))
    without = [(session - s) / (bare - b) for b, s in pairs]
    mean = statistics.fmean(without)
    return (sum((r - mean) ** 2 for r in without) * (len(pairs) - 1) / len(pairs)) ** 0.5


def draw(cases, facts):
    """Overhead by iteration time, and what it is made of."""
    fig, (left, right) = common.figure(1, 2, figsize=(10, 4))
    names = list(cases)
    for k, (what, colour) in enumerate((("cpu", 0), ("wall", 1))):
        places = [i + (k - 0.5) * 0.36 for i in range(len(names))]
        values = [cases[n][f"overhead_{what}"] * 100 for n in names]
        errors = [cases[n][f"overhead_{what}_error"] * 100 for n in names]
        label = f"{'CPU' if what == 'cpu' else 'wall'} time, with standard error"
        bars = left.bar(
            places, values, 0.34, yerr=errors, label=label, color=common.COLOURS[colour], capsize=3
        )
        left.bar_label(bars, [f"{v:.1f}" for v in values], fontsize=8, padding=2)
    left.axhline(AIM * 100, color="#b00020", linewidth=1, linestyle="--")
    left.axhline(0, color="#444444", linewidth=0.8)
    left.text(
        0.99,
        AIM * 100,
        "aim 2 % ",
        color="#b00020",
        va="bottom",
        ha="right",
        transform=left.get_yaxis_transform(),
    )
    left.set_xticks(
        range(len(names)), [f"{cases[n]['bare_cpu_ms']['median']:.1f} ms" for n in names]
    )
    left.set_xlabel("CPU time of a bare iteration")
    left.set_ylabel("more than the bare loop, %")
    left.set_title("Overhead of the session, one worker", loc="left")
    left.margins(y=0.2)
    left.legend(fontsize=8, loc="upper right")
    shown = [part for part in PARTS if "step" not in part][::-1]
    for k, name in enumerate(names):
        parts = cases[name]["parts_us_per_iteration"]
        places = [i + ((len(names) - 1) / 2 - k) * 0.26 for i in range(len(shown))]
        values = [parts[p]["cpu"] for p in shown]
        bars = right.barh(
            places, values, 0.24, color=common.COLOURS[2 + k], label=f"{name} ms iterations"
        )
        right.bar_label(bars, [f" {v:.0f}" if v >= 1 else f" {v:.1f}" for v in values], fontsize=7)
    right.set_yticks(range(len(shown)), [PARTS[p] for p in shown])
    right.set_xscale("log")
    right.margins(x=0.12)
    right.grid(visible=False, axis="y")
    right.set_xlabel("CPU time per iteration, microseconds")
    right.set_title("What it is made of", loc="left")
    right.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.35, -0.14), ncols=3)
    common.save_figure(fig, "overhead", facts)


def main():
    facts = common.machine()
    cases = {}
    with (
        LocalPlatform(concurrency=1, cores_per_vcpu=1.0) as platform,
        smlt.Fleet(platform=platform) as fleet,
    ):
        for target_ms, (seconds, block) in (QUICK_CASES if common.QUICK else CASES).items():
            cases[str(target_ms)] = measure(fleet, target_ms, seconds, block)
    common.save("overhead", facts, {"aim": AIM, "cases": cases})
    draw(cases, facts)
    common.table(
        ("iteration", "batch", "bare CPU ms", "session CPU ms", "CPU", "+-", "wall", "+-"),
        [
            (
                f"{name} ms",
                case["batch"],
                f"{case['bare_cpu_ms']['median']:.3f}",
                f"{case['session_cpu_ms']['median']:.3f}",
                *(f"{case[f'overhead_{k}']:+.1%}" for k in ("cpu", "cpu_error")),
                *(f"{case[f'overhead_{k}']:+.1%}" for k in ("wall", "wall_error")),
            )
            for name, case in cases.items()
        ],
    )
    print()
    common.table(
        ("us per iteration: wall (CPU)", *(f"{name} ms" for name in cases)),
        [
            (words, *(_both(case["parts_us_per_iteration"][part]) for case in cases.values()))
            for part, words in PARTS.items()
        ],
    )


def _both(part):
    return f"{part['wall']:.0f} ({part['cpu']:.0f})"


if __name__ == "__main__":
    main()
