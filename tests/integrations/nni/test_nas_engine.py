"""What the engine does with candidates, metrics, listeners, money and interruptions."""

import os
import threading
import time
from types import SimpleNamespace

import pytest
from nni.nas import strategy as nas
from nni.nas.execution.event import ModelEventType
from nni.nas.experiment import NasExperiment, NasExperimentConfig
from nni.nas.space import ModelStatus
from nni.nas.strategy import hpo
from nni.nas.strategy.base import Strategy
from nni.nas.strategy.middleware import Chain, FailureHandler, Filter, MultipleEvaluation

import smlt_tune as smlt
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from smlt_tune.errors import InvalidInput
from smlt_tune.integrations.nni import SmltEngineConfig, install
from smlt_tune.integrations.nni.candidates import Candidate
from tests.conftest import eventually
from tests.integrations.nni.searches import Space, experiment, native, odd, run, score, slow, tell


class Given(Strategy):
    """Submits the given samples and may wait for them; interrupts itself after some, if told so."""

    def __init__(self, samples, interrupt_after=None, watch=None, waits=True):
        super().__init__()
        self.samples, self.interrupt_after, self.watch = samples, interrupt_after, watch
        self.waits, self.submitted = waits, 0

    def _run(self):
        for sample in self.samples[self.submitted :]:
            if not self.wait_for_resource():
                break
            self.submitted += 1
            self.engine.submit_models(self.model_space.freeze(sample))
            if self.submitted == self.interrupt_after:
                self.watch()
                raise KeyboardInterrupt
        if self.waits:
            self.engine.wait_models()

    def state_dict(self):
        return {"submitted": self.submitted}

    def load_state_dict(self, state):
        self.submitted = state["submitted"]


@pytest.fixture
def shared_platform(platform, monkeypatch):
    """The fleets that experiments make for themselves are on it: their functions are warm."""

    class Fleet(smlt.Fleet):
        def __init__(self, **options):
            super().__init__(**{**options, "platform": platform, "policy": PinnedOrDefault()})

    monkeypatch.setattr("smlt_tune.integrations.nni.experiment.Fleet", Fleet)


def widths(*values):
    return [{"width": width, "activation": 0} for width in values]


def by_width(made):
    return {c.sample["width"]: c for c in made.candidates()}


def test_metrics_are_what_jobs_report_and_failures_say_why(fleet, tmp_path, nni_log):
    space = Space(broken_width=9)
    found = by_width(run(
        Given(widths(2, 3, 4, 5, 6, 7, 8, 9)), odd, tmp_path, fleet=fleet, space=space,
        dummy_input=[8, 4],
    ))  # fmt: skip
    status = {width: c.status.value for width, c in found.items()}
    assert status == {2: "trained", 3: "trained", 4: "trained", 5: "failed", 6: "failed",
                      7: "trained", 8: "trained", 9: "failed"}  # fmt: skip
    metrics = {width: c.metric for width, c in found.items()}
    assert metrics == {2: None, 3: 0.25, 4: 4.0, 5: None, 6: None, 7: None, 8: 8.0, 9: None}
    assert found[3].model.metrics.intermediates == [0.5]
    assert "no finite number" in nni_log.text
    assert "needs a number under 'default'" in found[5].error
    assert "six is refused" in found[6].error
    assert "in odd" in nni_log.text  # the worker's traceback
    assert "no model has 9 units" in found[9].error
    assert found[6].cost_usd > 0
    assert (found[9].job, found[9].cost_usd) == (None, 0.0)


def test_a_listener_that_raises_takes_nothing_from_the_others(fleet, tmp_path, nni_log):
    made = experiment(Given(widths(2, 3)), tell, tmp_path, fleet=fleet)
    heard = []

    def listen(event):
        heard.append(event.event_type)
        raise RuntimeError("a fault of the listener")

    start = made.strategy._initialize

    def initialize(space, engine):
        for kind in ModelEventType:
            engine.register_model_event_callback(kind, listen)
            engine.register_model_event_callback(kind, lambda event: heard.append(event.model))
        return start(space, engine)

    made.strategy._initialize = initialize
    made.run()
    made.stop()
    assert [c.metric for c in made.candidates()] == [2.0, 3.0]
    assert len(heard) == 2 * 2 * (2 + 1 + 1)
    assert "a fault of the listener" in nni_log.text


def late(model):
    """Ends when NNI's middlewares do not wait any more."""
    time.sleep(1.5)
    odd(model)


@pytest.mark.parametrize("waits", [True, False])
def test_middlewares_see_every_event_once(fleet, tmp_path, waits):
    retried = run(
        Chain(Given(widths(6, 8), waits=waits), FailureHandler(retry_patience=2)), late, tmp_path,
        fleet=fleet,
    )  # fmt: skip
    assert [c.sample["width"] for c in retried.candidates()].count(6) == 3
    assert [m.status.value for m in retried._engine.list_models()] == ["failed", "trained"]
    averaged = run(
        Chain(
            Given(widths(2, 8), waits=waits),
            Filter(lambda model: model.sample["width"] > 2, metric_for_invalid=-1.0),
            MultipleEvaluation(2),
        ),
        late, tmp_path, fleet=fleet,
    )  # fmt: skip
    models = list(averaged.strategy.list_models(sort=False))
    assert [(m.status.value, m.metric) for m in models] == [("trained", 8.0), ("invalid", -1.0)]
    assert len(averaged.candidates()) == 2


class Remembering(PinnedOrDefault):
    """A policy that keeps what it was told of each job before the first generation."""

    def __init__(self):
        self.workloads = {}

    def first(self, facts):
        self.workloads[facts.job_id] = facts.workload
        return super().first(facts)


def test_every_candidate_is_measured_before_it_starts(platform, tmp_path):
    policy = Remembering()
    with smlt.Fleet(platform=platform, policy=policy) as fleet:
        made = run(
            Given(widths(2, 9)), native, tmp_path, fleet=fleet, workers=None, max_workers=2,
            dummy_input=[4, 4], iterations=4, metric="accuracy",
        )  # fmt: skip
    for candidate in made.candidates():
        width = candidate.sample["width"]
        (told,) = [w for name, w in policy.workloads.items() if name.endswith(candidate.name)]
        assert told.features.parameters == 4 * width + width + 2 * width + 2
        assert told.features.flops_per_sample > 0
        assert (told.batch, told.iterations) == (4, 4)
        assert [(a.workers, a.memory_mb) for a in candidate.allocations] == [(2, 1769)]
        assert candidate.decisions[0].reason
        assert candidate.model.metrics.intermediates == [0.5, 1.5]  # from session.report
        assert candidate.metric == 1.5


def test_the_resource_manager_chooses_unless_the_size_is_pinned(platform, tmp_path):
    with smlt.Fleet(platform=platform) as fleet:
        made = run(
            Given(widths(2, 9)), native, tmp_path, fleet=fleet, workers=None, memory_mb=None,
            max_workers=2, dummy_input=[4, 4], metric="accuracy", concurrency=1,
        )  # fmt: skip
    for candidate in made.candidates():
        assert candidate.status == ModelStatus.Trained
        assert candidate.decisions[0].occasion == "first"
        assert candidate.decisions[0].evidence
        assert candidate.allocations[0].decision == candidate.decisions[0].reason


def test_what_cannot_work_on_the_functions_it_gets_says_so(platform, fleet, tmp_path):
    alone = run(Given(widths(2)), tell, tmp_path, fleet=fleet, workers=2).candidates()[0]
    assert alone.status == ModelStatus.Failed
    assert "Pin workers=1" in alone.error
    missing = run(Given(widths(2)), native, tmp_path, fleet=fleet, metric="loss").candidates()[0]
    assert missing.status == ModelStatus.Failed
    assert "reports no metric 'loss'; it reports: accuracy, workers" in missing.error
    with smlt.Fleet(platform=platform) as chosen:
        late = run(
            Given(widths(2)), native, tmp_path, fleet=chosen, workers=None, memory_mb=None,
            dummy_input=[4, 4], iterations=10**9, trial_deadline_s=0.001, metric="accuracy",
        ).candidates()[0]  # fmt: skip
        assert late.status == ModelStatus.Failed
        assert late.job is None
        assert "0.001" in late.error


def hungry(model):
    hoard = [bytearray(2**24) for _ in range(80)]
    raise AssertionError(f"{len(hoard)} pieces fit")


def test_a_model_that_fits_no_function_fails_and_is_paid_for(fleet, tmp_path):
    (large,) = run(
        Given(widths(2)), hungry, tmp_path, fleet=fleet, memory_mb=1024
    ).candidates()  # fmt: skip
    assert large.status == ModelStatus.Failed
    assert "OutOfMemory" in large.error
    assert large.cost_usd > 0


def test_the_budget_ends_the_search_and_is_never_exceeded(platform, tmp_path, nni_log):
    made = experiment(
        nas.Random(seed=1), slow, tmp_path, trials=24, concurrency=2, budget_usd=0.0002,
        arguments={"folder": str(tmp_path), "seconds": 0.5},
    )  # fmt: skip
    with smlt.Fleet(platform=platform, policy=PinnedOrDefault(), budget_usd=0.0002) as fleet:
        made._fleet = fleet
        made.run()
        made.stop()
        candidates = made.candidates()
        assert 0 < len(candidates) < 24
        assert {c.status.value for c in candidates} <= {"trained", "interrupted"}
        assert all(c.over for c in candidates)
        assert sum(c.cost_usd for c in candidates) <= fleet.settled_usd + 1e-9
        assert fleet.settled_usd <= 0.0002
        assert fleet.reserved_usd == 0
    assert "no further candidates" in nni_log.text


def test_a_budget_of_zero_starts_nothing_and_says_so(tmp_path, nni_log):
    made = run(nas.Random(seed=1), tell, tmp_path, budget_usd=0.0)
    assert made.candidates() == []
    assert made._engine.fleet.jobs() == []
    assert "the budget of 0 USD does not pay for another candidate" in nni_log.text


def test_a_killed_candidate_stops_costing_and_the_search_goes_on(fleet, tmp_path):
    class Killing(Given):
        def _run(self):
            def kill(event):
                if event.model.sample["width"] == 2:
                    self.engine.kill_model(event.model)

            self.engine.register_model_event_callback(ModelEventType.IntermediateMetric, kill)
            super()._run()

    made = run(
        Killing(widths(2, 3)), slow, tmp_path, fleet=fleet,
        arguments={"folder": str(tmp_path), "seconds": 2.0},
    )  # fmt: skip
    killed, other = made.candidates()
    assert (killed.status.value, killed.error) == ("interrupted", "killed")
    assert 0 < killed.cost_usd < other.cost_usd
    assert other.status == ModelStatus.Trained
    assert fleet.reserved_usd == 0


def test_an_interrupted_search_is_resumed_from_checkpoints(tmp_path, shared_platform):
    samples = widths(2, 3, 4, 5)
    options = {
        "trials": 4, "concurrency": 2, "id": "resumed",
        "arguments": {"folder": str(tmp_path), "seconds": 2.0},
    }  # fmt: skip

    def begun(width):
        notes = tmp_path / f"{width}-0"
        return notes.read_text().split() if notes.exists() else []

    def third_has_a_checkpoint():
        eventually(lambda: len(begun(4)) > 2)

    first = experiment(Given(samples, 3, third_has_a_checkpoint), slow, tmp_path, **options)
    first.run()  # returns: NNI stops an experiment that is interrupted
    before = {c.sample["width"]: c.status.value for c in first.candidates()}
    assert list(before) == [2, 3, 4]
    assert "trained" in before.values()
    assert before[4] != "trained"
    assert not any(t.name == "smlt-nni" for t in threading.enumerate())
    spent = first._engine.fleet.settled_usd
    assert spent > 0

    second = experiment(Given(samples), slow, tmp_path, **options)
    second.resume()
    again = by_width(second)
    assert {width: c.status.value for width, c in again.items()} == dict.fromkeys(
        (2, 3, 4, 5), "trained"
    )
    assert all(c.metric == score(c.sample) for c in again.values())
    assert all(c.model.metrics.intermediates == [0.0, 1.0, 2.0, 3.0] for c in again.values())
    for width, status in before.items():
        if status == "trained":  # it has not run again
            assert begun(width) == ["0", "1", "2", "3"]
    assert begun(4).count("0") == 1
    [stopped] = again[4].stopped
    assert again[4].cost_usd == stopped.cost_usd + again[4].job.cost_usd
    assert second._engine.fleet.settled_usd > spent
    second.stop()

    state = again[4].to_state()
    jobs = {job.job_id: job for job in second._engine.fleet.jobs()}
    known = Candidate.from_state(2, state, second._exec_model_space, jobs)
    assert [job.job_id for job in known.stopped] == [stopped.job_id]
    assert known.cost_usd == again[4].cost_usd
    state["status"] = "training"  # as if it had been stopped once more
    del jobs[again[4].job.job_id]
    once_more = Candidate.from_state(2, state, second._exec_model_space, jobs)
    assert once_more.job is None
    assert once_more.job_name == again[4].job_name


def test_a_resumed_tuner_is_told_what_it_has_forgotten(fleet, tmp_path, monkeypatch):
    monkeypatch.setattr(hpo, "time", SimpleNamespace(sleep=lambda _: None))  # NNI's: 1 s per model
    told = []

    def tpe(interrupt_after=None):
        strategy = nas.TPE(optimize_mode="maximize", seed=1)
        generate, imports = strategy.tuner.generate_parameters, strategy.tuner.import_data

        def generate_parameters(number):
            if number == interrupt_after:
                raise KeyboardInterrupt
            return generate(number)

        def import_data(data):
            told.extend(each["value"] for each in data)
            imports(data)

        strategy.tuner.generate_parameters = generate_parameters
        strategy.tuner.import_data = import_data
        return strategy

    options = {"fleet": fleet, "trials": 6, "concurrency": 2, "id": "forgetful"}
    arguments = {"folder": str(tmp_path), "seconds": 1.0}
    first = experiment(tpe(4), slow, tmp_path, arguments=arguments, **options)
    first.run()
    assert len(first.candidates()) == 4
    again = experiment(tpe(), slow, tmp_path, arguments=arguments, **options)
    again.resume()
    again.stop()
    candidates = again.candidates()
    assert [c.status.value for c in candidates] == ["trained"] * 6
    assert sorted(told) == sorted(c.metric for c in candidates[:4])


def test_a_checkpoint_that_others_could_have_written_is_not_loaded(fleet, tmp_path):
    run(Given(widths(2)), tell, tmp_path, fleet=fleet, id="writable")
    (checkpoint,) = tmp_path.glob("writable/checkpoint/state.ckpt*")
    os.chmod(checkpoint, 0o666)
    again = experiment(Given(widths(2)), tell, tmp_path, fleet=fleet, id="writable")
    with pytest.raises(InvalidInput, match="others may write to it"):
        again.resume()
    again.stop()


def test_plain_nas_experiments_know_the_engine_once_it_is_installed(
    tmp_path, monkeypatch, shared_platform
):
    for name in ("execution_engine_factory", "load_state_dict", "_stop_logging"):
        monkeypatch.setattr(NasExperiment, name, getattr(NasExperiment, name))
    monkeypatch.setattr(NasExperiment, "candidates", None, raising=False)
    install()
    made = experiment(Given(widths(2)), tell, tmp_path)
    plain = NasExperiment(made.model_space, made.evaluator, made.strategy, made.config)
    plain.run()
    plain.stop()
    assert [c.metric for c in plain.candidates()] == [2.0]


def test_all_mistakes_of_a_config_are_told_at_once(tmp_path):
    config = NasExperimentConfig(
        SmltEngineConfig(trial_budget_usd=1.0, dummy_input=[0], iterations=0), "raw",
        max_trial_duration="1m", experiment_working_directory=str(tmp_path),
    )  # fmt: skip
    made = experiment(Given([]), tell, tmp_path)
    made.config = config
    lock = threading.Lock()
    made.evaluator.arguments["lock"] = lock
    with pytest.raises(InvalidInput) as error:
        made.run()
    made.stop()
    for part in ("'raw'", "max_trial_duration", "[0]", "iterations=0", "trial_budget_usd",
                 "the evaluator cannot be sent"):  # fmt: skip
        assert part in str(error.value)


def test_sizes_that_no_platform_offers_are_refused_before_a_candidate(fleet, tmp_path):
    made = experiment(Given(widths(2)), tell, tmp_path, fleet=fleet, workers=10**6)
    with pytest.raises(InvalidInput, match="workers"):
        made.run()
    made.stop()
    assert made.candidates() == []
