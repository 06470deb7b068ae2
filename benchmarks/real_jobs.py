"""Real training jobs on the local platform, pinned to an allocation or steered by the manager.

The machine is a small cloud: one virtual CPU (1,769 MB) is a fixed part of a core, chosen so that
all functions together fit into the machine, less what the client and the parameter store need.
Allocations are 1 to 8 functions of 512 to 1,769 MB, so that each of them really gets what it pays
for; larger functions would not fit eight times.

Bills go by wall time. CPU time would be blind to other load, but also to waiting for the store and
for each other, which every cloud charges for. What of the billed time was CPU time is recorded with
each run: on a quiet machine that share only falls with the part of synchronisation, and runs on a
disturbed machine show.
"""

import os
import statistics
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import common

import smlt_tune as smlt
from smlt_tune.backend.late_policy import resource_manager
from smlt_tune.backend.platform_tables import platform_table
from smlt_tune.backend.platforms.base import MB_PER_VCPU, PlatformLimits
from smlt_tune.backend.platforms.local import LocalPlatform
from smlt_tune.backend.prices import load_prices
from smlt_tune.backend.profiles import open_profiles
from smlt_tune.backend.resource_manager.observations import DEFAULT_STORE, Workload
from smlt_tune.errors import InvalidInput

HERE = Path(__file__).parent
CONCURRENCY = 8
RESERVED_CORES = 0.3
SMALLEST_MB, LARGEST_MB = 512, MB_PER_VCPU
#: Samples in the data set: an epoch has so many over the batch size iterations.
SAMPLES = 3072
#: Brightnesses of a pixel.
LEVELS = 17
#: A job that takes longer than this has failed, seconds.
LONGEST_S = 300.0


@dataclass(frozen=True)
class Model:
    """A network for images of 28 x 28 pixels.

    Attributes:
        channels: Of its two convolutions; empty for none.
        hidden: Width of its hidden layer, or of both if there are no convolutions.
        crosses: Pairs of pixels; if not 0, every pair of brightnesses of each has a vector of its
            own, and the vectors are added up (the wide part of Cheng et al., 2016): many
            parameters, few operations.
        deep: How many further hidden layers follow the convolutions, all as wide as the first.
            Their weights are trained by Muon (Jordan, 2024), which orthogonalises every update:
            the same work for each step, whatever the batch.
    """

    channels: tuple[int, ...]
    hidden: int
    crosses: int = 0
    deep: int = 0

    @property
    def kind(self):
        """For tables."""
        return "conv" if self.channels else "crossed" if self.crosses else "dense"


@dataclass(frozen=True)
class Training:
    """What one job computes.

    Attributes:
        model: Trained by Adam.
        batches: Global batch size of each epoch.
        iterations: After so many it stops; None for all.
    """

    model: Model
    batches: tuple[int, ...]
    iterations: int | None = None

    @property
    def length(self):
        """Training iterations of the whole job."""
        return sum(-(-SAMPLES // batch) for batch in self.batches)


def network(model):
    """The module."""
    import torch
    from torch import nn

    class Crossed(nn.Module):
        """Numbers of the pairs of brightnesses of neighbouring pixels, shape (batch, crosses)."""

        def forward(self, x):
            pixels = (x[:, 0, 1::4, 1::4].flatten(1)[:, : 2 * model.crosses] * (LEVELS - 1)).long()
            pairs = pixels[:, 0::2] * LEVELS + pixels[:, 1::2]
            return pairs + LEVELS**2 * torch.arange(model.crosses)

    class Hidden(nn.Module):
        """One of the further hidden layers."""

        def __init__(self, wide):
            super().__init__()
            self.dense = nn.Linear(wide, wide)

        def forward(self, x):
            return self.dense(x).relu()

    if model.crosses:
        rows = model.crosses * LEVELS**2
        table = nn.EmbeddingBag(rows, model.hidden, mode="sum")
        return nn.Sequential(Crossed(), table, nn.ReLU(), nn.Linear(model.hidden, 10))
    if not model.channels:
        wide = model.hidden
        hidden = (nn.Linear(784, wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU())
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(wide, 10))
    first, second = model.channels
    return nn.Sequential(
        *(nn.Conv2d(1, first, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(first, second, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(second * 49, model.hidden), nn.ReLU()),
        *(Hidden(model.hidden) for _ in range(model.deep)),
        nn.Linear(model.hidden, 10),
    )


def optimizers(module):
    """Muon for the weights of further hidden layers, Adam for everything else."""
    import torch

    inside, others = [], []
    for name, weight in module.named_parameters():
        (inside if name.endswith("dense.weight") else others).append(weight)
    adam = torch.optim.Adam(others, lr=1e-3)
    return (adam, torch.optim.Muon(inside, lr=1e-3)) if inside else (adam,)


class Diary:
    """When each iteration ended, of which batch, by how many workers, and when those began.

    It is prepared like the model, and so outlives every hand-over.

    Args:
        length: Iterations of the job.
    """

    def __init__(self, length):
        import torch

        self.rows = torch.zeros(length, 4, dtype=torch.float64)
        self.count = torch.zeros(1, dtype=torch.int64)

    def state_dict(self):
        """As of every prepared object."""
        return {"rows": self.rows, "count": self.count}

    def load_state_dict(self, state):
        """As of every prepared object."""
        self.rows, self.count = state["rows"].clone(), state["count"].clone()

    def note(self, *row):
        """An iteration has ended; returns how many have."""
        import torch

        number = int(self.count)
        self.rows[number] = torch.tensor(row, dtype=torch.float64)
        self.count += 1
        return number + 1


def train(training):
    """The training function of all jobs; returns the diary and the last loss."""
    import time

    from torch.nn.functional import cross_entropy

    born_s = time.monotonic()
    session = smlt.session()
    model = network(training.model)
    trained_by = optimizers(model)
    diary = Diary(training.length)
    session.prepare(model, *trained_by, diary)
    batches, done, value = training.batches, int(diary.count), 0.0
    for epoch in session.epochs(len(batches)):
        if done == training.iterations:
            break
        # A plain number: what batch size comes later is known to nobody.
        for x, y in session.batches("digits", batches[epoch]):
            loss = cross_entropy(model(x), y)
            model.zero_grad()
            loss.backward()
            for optimizer in trained_by:
                optimizer.step()
            value = float(loss.detach())
            done = diary.note(time.monotonic(), batches[epoch], session.workers, born_s)
            if done == training.iterations:
                break
    return {"rows": diary.rows[:done].tolist(), "loss": value}


def digits():
    """scikit-learn's digits, 8 x 8, enlarged to 28 x 28 pixels and repeated."""
    import numpy as np
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    small = images.reshape(-1, 8, 8).astype(np.float32) / 16
    large = np.kron(small, np.ones((1, 4, 4), np.float32))[:, 2:30, 2:30]
    chosen = np.arange(SAMPLES) % len(large)
    return large[chosen][:, None], labels[chosen].astype(np.int64)


def workload_of(training):
    """What the resource manager can be told before a job begins."""
    import torch

    features = smlt.model_features(network(training.model), torch.zeros(32, 1, 28, 28))
    return Workload(features, training.batches[0], training.length)


@dataclass
class Run:
    """How a job went.

    Attributes:
        seconds: From its submission to its end.
        usd: What it has cost.
        cpu_share: CPU time over billed time, of all its functions.
        peak_mb: Highest resident memory of a function.
        allocations: Of its generations: workers, memory, seconds from the submission on.
        rows: Of its iterations: end; batch; workers; when their generation began. Times are
            seconds from the submission on.
        reviews: Of a steered job: what the manager expected each time it was asked.
        refused: Of a steered job: why its goal was thought out of reach; empty if it was not.
        given: Of a steered job: whether features were given with the submission.
    """

    seconds: float
    usd: float
    cpu_share: float
    peak_mb: float
    allocations: list
    rows: list
    reviews: list
    refused: str = ""
    given: bool = False

    @property
    def moves(self):
        """To other allocations."""
        return len(self.allocations) - 1

    @property
    def iteration_s(self):
        """Mean of all iterations but the first, with what lies between them; needs two."""
        ends = [row[0] for row in self.rows]
        return (ends[-1] - ends[0]) / (len(ends) - 1)

    @property
    def hold_ups(self):
        """What each hand-over has held up training: first iteration after it, less a usual one."""
        new = [i for i in range(1, len(self.rows)) if self.rows[i][3] != self.rows[i - 1][3]]
        found = []
        for begin, end in pairwise([*new, len(self.rows)]):
            ends = [row[0] for row in self.rows[begin:end]]
            if len(ends) > 1:
                usual_s = statistics.median(b - a for a, b in pairwise(ends))
                found.append(ends[0] - self.rows[begin - 1][0] - usual_s)
        return found

    def to_json(self):
        """With what hand-overs took instead of the times of single iterations."""
        kept = {key: _short(value) for key, value in asdict(self).items() if key != "rows"}
        return {**kept, "moves": self.moves, "hold_ups_s": _short(self.hold_ups)}


def _short(value):
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list | tuple):
        return [_short(each) for each in value]
    if isinstance(value, dict):
        return {key: _short(each) for key, each in value.items()}
    return value


class Metered(LocalPlatform):
    """The local platform; keeps what it says of invocations."""

    def __init__(self, **options):
        self._bills_lock, self._bills = threading.Lock(), []
        super().__init__(**options)

    @property
    def limits(self):
        """Only such functions as fit into the machine all at once."""
        limits = super().limits
        return PlatformLimits(
            SMALLEST_MB,
            LARGEST_MB,
            limits.time_limit_s,
            limits.concurrency,
            max_workers=limits.concurrency,
        )

    def invoke(self, invocation, on_done):
        """As the platform does."""

        def done(result):
            with self._bills_lock:
                self._bills.append((invocation.memory_mb, result))
            on_done(result)

        super().invoke(invocation, done)

    def take(self):
        """CPU time over billed time since the last call, and the highest peak."""
        with self._bills_lock:
            bills, self._bills = self._bills, []
        cpu = sum(each.cpu_s / self.cores(memory_mb) for memory_mb, each in bills)
        billed = sum(each.billed_s for _, each in bills)
        return cpu / billed if billed else 0.0, max((b.peak_mb for _, b in bills), default=0.0)


class Watched:
    """Passes everything on to the resource manager; remembers what it expects.

    Args:
        manager: The resource manager.
    """

    def __init__(self, manager):
        self._manager = manager
        self.reviews = []

    def observe(self, profile):
        """As the manager does."""
        self._manager.observe(profile)

    def first(self, facts):
        """As the manager does."""
        return self._manager.first(facts)

    def after_out_of_memory(self, facts, peak_mb):
        """As the manager does."""
        return self._manager.after_out_of_memory(facts, peak_mb)

    def plan(self, facts):
        """As the manager does."""
        return self._manager.plan(facts)

    def review(self, facts):
        """As the manager does."""
        decision = self._manager.review(facts)
        if facts.workload is not None and facts.iterations_left:
            self.reviews.append(self._expected(facts, decision))
        return decision

    def _expected(self, facts, decision):
        """Of the rest of the job, on the allocation that it will have from now on."""
        if decision is not None and "prediction" in decision.evidence:
            said = decision.evidence["prediction"]
            time_s, cost_usd = said["time_s"], said["cost_usd"]
        else:
            plan = self._manager.predict(facts, facts.allocation)
            time_s, cost_usd = (list(asdict(x).values()) for x in (plan.time_s, plan.cost_usd))
        to = decision.allocation if decision else facts.allocation
        return {
            "elapsed_s": facts.elapsed_s,
            "spent_usd": facts.spent_usd,
            "left": facts.iterations_left,
            "from": [facts.allocation.workers, facts.allocation.memory_mb],
            "to": [to.workers, to.memory_mb],
            "time_s": time_s,
            "cost_usd": cost_usd,
            "reason": decision.reason if decision else "",
        }


class Cloud:
    """The platform, its prices and the data. Use it as a context manager.

    Args:
        functions: How many fit into the machine.
        **options: Further ones of the local platform.
    """

    def __init__(self, functions=CONCURRENCY, **options):
        cores = len(os.sched_getaffinity(0))
        self.functions, self.cores_per_vcpu = functions, (cores - RESERVED_CORES) / functions
        self.prices = load_prices()
        self._data = digits()
        self.platform = Metered(
            concurrency=functions,
            cores_per_vcpu=self.cores_per_vcpu,
            billing="wall",
            keep_alive_s=60.0,
            **options,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.platform.close()

    def facts(self):
        """For the results."""
        return {
            "cores_per_vcpu": round(self.cores_per_vcpu, 4),
            "concurrency": self.functions,
            "memory_mb": [SMALLEST_MB, LARGEST_MB],
            "billing": "wall",
            "samples": SAMPLES,
        }

    def manager(self, project=None):
        """A resource manager that knows the profiles of a project."""
        store, profiles = None, []
        if project is not None:
            store, profiles = open_profiles(project, self.platform.fingerprint)
        if store is not None:
            store.close()
        stores = {DEFAULT_STORE: ("redis://", "own")}
        return resource_manager(self.platform, self.prices, stores, profiles)

    @property
    def table(self):
        """What is known of the platform."""
        return platform_table(self.platform)

    def spent_usd(self, fleet):
        """By all jobs of a fleet so far, failed ones included."""
        return fleet.settled_usd

    def usd(self, workers, memory_mb, seconds):
        """Of functions that run on for some time."""
        gb_s = workers * memory_mb / 1024 * seconds
        return gb_s * float(self.prices.gb_second_usd)

    @contextmanager
    def fleet(self, **options):
        """A fleet on the platform that has the data."""
        with smlt.Fleet(platform=self.platform, **options) as fleet:
            fleet.upload("digits", self._data)
            yield fleet

    def pinned(self, fleet, training, workers, memory_mb):
        """A job on one allocation."""
        return self._run(fleet, training, workers=workers, memory_mb=memory_mb)

    def steered(self, training, goal, project=None, *, give=True, told=None):
        """A job in a fleet of its own, on what the resource manager chooses.

        Args:
            training: What it computes.
            goal: Of the job.
            project: Folder with the profiles of siblings, and for its own; None for neither.
            give: Whether features are given with the submission.
            told: What is thought to be computed, if that is something else.
        """
        policy = Watched(self.manager(project))
        with self.fleet(project=project, policy=policy) as fleet:
            return self.submitted(fleet, policy, training, goal, give=give, told=told)

    def submitted(self, fleet, policy, training, goal, *, give=True, told=None):
        """A steered job in a fleet with a policy that is watched."""
        policy.reviews = []
        known = {"workload": workload_of(told or training)} if give else {}
        refused = ""
        try:
            run = self._run(fleet, training, goal=goal, **known)
        except InvalidInput as error:  # it thinks that no allocation can reach the goal
            refused = str(error)
            run = self._run(fleet, training, goal=goal)
        run.refused, run.given = refused, give and not refused
        run.reviews = policy.reviews
        return run

    def _run(self, fleet, training, **options):
        self.platform.take()
        begun_s = time.monotonic()
        job = fleet.submit(train, training, **options)
        try:
            outcome = job.result(LONGEST_S)
        except TimeoutError:
            job.stop("it takes too long")
            job.result()
            raise
        seconds = time.monotonic() - begun_s
        cpu_share, peak_mb = self.platform.take()
        late_s = seconds - outcome.duration_s  # from the submission to the first function
        return Run(
            seconds=seconds,
            usd=outcome.cost_usd,
            cpu_share=cpu_share,
            peak_mb=peak_mb,
            allocations=[
                (each.workers, each.memory_mb, late_s + each.time_s) for each in outcome.allocations
            ],
            rows=[
                (end - begun_s, batch, n, born - begun_s)
                for end, batch, n, born in outcome.value["rows"]
            ],
            reviews=[],
        )


def warm_up(cloud):
    """Everything that is slow only once: imports of the manager, the first functions."""
    tiny = Training(Model((), 16), (SAMPLES // 4,))
    cloud.steered(tiny, smlt.Cheapest())


def quickly():
    """Tiny, and into the folder for what says nothing."""
    common.QUICK, common.RESULTS = True, HERE / "results" / "tmp"


def target(run, goal):
    """What the goal minimises: USD, or seconds."""
    return run.usd if isinstance(goal, smlt.Cheapest) else run.seconds


def said_of_hold_ups(jobs):
    """One line on the hand-overs of some jobs, as JSON."""
    held = [seconds for job in jobs for seconds in job["hold_ups_s"]]
    if not held:
        return "no hand-over"
    return f"{len(held)} hand-overs, each held up training by {statistics.median(held):.2f} s"


def overshoot(run, goal):
    """By what share of it the goal's limit was exceeded; 0 if it was kept."""
    if isinstance(goal, smlt.Cheapest):
        return max(0.0, run.seconds / goal.deadline_s - 1.0)
    return max(0.0, run.usd / goal.budget_usd - 1.0)


def claim(text, holds):
    """Prints one line; returns what is kept of it."""
    verdict = "PASS" if holds else "FAIL"
    print(f"{verdict}{' (quick: says nothing)' if common.QUICK else ''}  {text}")
    return {"claim": text, "holds": bool(holds)}
