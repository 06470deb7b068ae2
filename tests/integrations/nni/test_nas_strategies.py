"""NNI's strategies, as they are, on a fleet."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from nni.nas import strategy as nas
from nni.nas.space import ModelStatus
from nni.nas.strategy import hpo

from tests.integrations.nni.searches import run, score, tell

STRATEGIES = {
    "Random": lambda: nas.Random(seed=1),
    "RegularizedEvolution": lambda: nas.RegularizedEvolution(
        population_size=8, sample_size=4, mutation_prob=0.5, seed=1
    ),
    "GridSearch": lambda: nas.GridSearch(seed=1),
    "TPE": lambda: nas.TPE(optimize_mode="maximize", seed=1),
    "PolicyBasedRL": lambda: nas.PolicyBasedRL(samples_per_update=5),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_candidate_of_a_strategy_is_one_job(name, fleet, tmp_path, monkeypatch):
    if name == "PolicyBasedRL":
        pytest.importorskip("tianshou")
    monkeypatch.setattr(hpo, "time", SimpleNamespace(sleep=lambda _: None))  # NNI's: 1 s per model
    notes = tmp_path / "notes"
    notes.mkdir()
    done = run(
        STRATEGIES[name](), tell, tmp_path, fleet=fleet, trials=20, concurrency=4,
        arguments={"folder": str(notes), "together": 4},
    )  # fmt: skip
    candidates = done.candidates()
    jobs = {job.job_id: job for job in fleet.jobs()}
    assert [c.number for c in candidates] == list(range(20))
    assert len({c.name for c in candidates}) == 20
    for candidate in candidates:
        job = jobs[candidate.name]
        assert candidate.status == ModelStatus.Trained
        assert (job.status, candidate.error) == ("finished", "")
        final = job.result().metrics
        assert {k: final[k] for k in ("width", "activation")} == candidate.sample
        assert candidate.metric == final["default"] == score(candidate.sample)
        width = candidate.sample["width"]
        assert candidate.model.metrics.intermediates == [width, width + 0.1]
        assert candidate.cost_usd > 0
    assert peak(notes) == 4
    best = done.export_top_models(1, formatter="dict")
    assert score(best[0]) == max(c.metric for c in candidates)


def peak(folder):
    """How many candidates ran at the same time at most."""
    spans = [tuple(map(float, f.read_text().split())) for f in Path(folder).glob("span-*")]
    assert len(spans) == 20
    return max(sum(began <= at < ended for began, ended in spans) for at, _ in spans)
