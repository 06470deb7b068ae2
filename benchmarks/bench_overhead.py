"""What an iteration costs more with a session than in a bare training loop, with one worker.

One function on the local platform, with a whole core, trains two equal models: one bare, one in the
session's care, in alternating blocks of a few tenths of a second, so that other load on the machine
meets both. What the session does by the clock (signs of life, checkpoints, looking for a wish to
leave) goes by a clock that stands still while the bare loop runs; each epoch ends with a report.

CPU time is the figure to trust on a machine that is not alone; wall time adds what the session
waits for (the object store's disk, the parameter store) and whatever else the machine was doing.
"""

import statistics
import sys
import time

import common

import smlt_tune as smlt
from smlt_tune.backend.platforms.local import LocalPlatform

AIM = 0.02
#: Milliseconds per iteration: seconds of training each way, iterations per block.
CASES = {1: (6.0, 100), 10: (20.0, 25), 100: (14.0, 3)}
QUICK_CASES = {10: (1.0, 10)}


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
            chosen = order[i * batch : (i + 1) * batch]
            step(model, optimizer, images[chosen], labels[chosen])

    bare_model, bare_optimizer = make()
    with_session = session.prepare(*make())
    block = config["block"]
    # The batch size that takes the wanted time.
    images, labels = torch.randn(4096, 1, edge, edge), torch.randint(0, 10, (4096,))
    batch = 8
    for _ in range(6):
        took = []
        for _ in range(7):
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

    bares, sessions, profile = [], [], None
    if config.get("profile"):
        import cProfile

        profile = cProfile.Profile()
    seen, mark = 0, None
    for epoch in session.epochs(-(-blocks // per_epoch) + 1):
        for number, (x, y) in enumerate(session.batches((images, labels), batch), 1):
            step(*with_session, x, y)
            if number % block:
                continue
            seen += 1
            if profile:
                profile.disable()
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
            if profile:
                profile.enable()
        session.report(epoch=epoch, loss=0.0)
    if profile:
        import io
        import pstats

        profile.disable()
        text = io.StringIO()
        pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(45)
        print(text.getvalue(), flush=True)
    size = sum(p.numel() for p in bare_model.parameters())
    return {"bare": bares, "session": sessions, "batch": batch, "parameters": size, "block": block}


def measure(fleet, target_ms, seconds, block, *, profile=False):
    """One function at one iteration time."""
    config = {"target_ms": target_ms, "seconds": seconds, "block": block, "profile": profile}
    job = fleet.submit(train, config, workers=1, memory_mb=1769)
    found = job.result(timeout_s=300).value
    result = {key: found[key] for key in ("batch", "parameters", "block")}
    for column, what in enumerate(("wall", "cpu")):
        for side in ("bare", "session"):
            per_iteration = [sample[column] / block * 1e3 for sample in found[side]]
            result[f"{side}_{what}_ms"] = common.summary(per_iteration)
        total = [sum(s[column] for s in found[side]) for side in ("bare", "session")]
        pairs = zip(found["bare"], found["session"], strict=True)
        ratios = [s[column] / b[column] - 1 for b, s in pairs]
        result[f"overhead_{what}"] = round(total[1] / total[0] - 1, 5)
        result[f"overhead_{what}_pairs"] = common.summary(ratios)
    if profile:
        print(*job.logs().values())
    return result


def draw(cases, facts):
    """Overhead by iteration time: of the typical block and of all blocks together."""
    fig, axis = common.figure(figsize=(7, 4))
    names = list(cases)
    kinds = (
        ("CPU time, all blocks", lambda c: c["overhead_cpu"], common.COLOURS[0]),
        ("CPU time, median of pairs", lambda c: c["overhead_cpu_pairs"]["median"], "#8fc1e6"),
        ("wall time, all blocks", lambda c: c["overhead_wall"], common.COLOURS[1]),
        ("wall time, median of pairs", lambda c: c["overhead_wall_pairs"]["median"], "#eeb796"),
    )
    for k, (label, pick, colour) in enumerate(kinds):
        places = [i + (k - 1.5) * 0.2 for i in range(len(names))]
        values = [pick(cases[n]) * 100 for n in names]
        bars = axis.bar(places, values, 0.19, label=label, color=colour)
        axis.bar_label(bars, [f"{v:.1f}" for v in values], fontsize=8)
    axis.axhline(AIM * 100, color="#b00020", linewidth=1, linestyle="--")
    axis.axhline(0, color="#444444", linewidth=0.8)
    axis.text(len(names) - 0.5, AIM * 100, " aim 2 %", color="#b00020", va="bottom", ha="right")
    labels = [f"{cases[n]['bare_cpu_ms']['median']:.1f} ms" for n in names]
    axis.set_xticks(range(len(names)), labels)
    axis.set_xlabel("CPU time of a bare iteration")
    axis.set_ylabel("more than the bare loop, %")
    axis.set_title("Overhead of the session with one worker", loc="left")
    axis.legend(fontsize=8)
    common.save_figure(fig, "overhead", facts)


def main():
    """Measures; with ``--profile`` prints where a session's millisecond goes instead."""
    facts = common.machine()
    cases = {}
    with (
        LocalPlatform(concurrency=1, cores_per_vcpu=1.0) as platform,
        smlt.Fleet(platform=platform) as fleet,
    ):
        if "--profile" in sys.argv:
            measure(fleet, 1, 6.0, 100, profile=True)
            return
        for target_ms, (seconds, block) in (QUICK_CASES if common.QUICK else CASES).items():
            cases[str(target_ms)] = measure(fleet, target_ms, seconds, block)
    common.save("overhead", facts, {"aim": AIM, "cases": cases})
    draw(cases, facts)
    common.table(
        ("iteration", "batch", "bare CPU ms", "session CPU ms", "CPU", "wall", "wall, median pair"),
        [
            (
                f"{name} ms",
                case["batch"],
                f"{case['bare_cpu_ms']['median']:.3f}",
                f"{case['session_cpu_ms']['median']:.3f}",
                f"{case['overhead_cpu']:+.1%}",
                f"{case['overhead_wall']:+.1%}",
                f"{case['overhead_wall_pairs']['median']:+.1%}",
            )
            for name, case in cases.items()
        ],
    )


if __name__ == "__main__":
    main()
