"""The code in README.md runs as it stands."""

import re
from pathlib import Path

import pytest

import smlt_tune as smlt

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def digits():
    import torch
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    return {"x_train": x[:1400], "y_train": y[:1400], "x_test": x[1400:], "y_test": y[1400:]}


def test_the_training_function_its_goals_and_the_optuna_objective(
    digits, tmp_path, monkeypatch, capsys
):
    import optuna

    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == 3
    names = {"__name__": "__main__", **digits}
    exec(compile(BLOCKS[0], "README.md", "exec"), names)
    outcome = names["outcome"]
    assert outcome.status == "finished"
    assert outcome.metrics["accuracy"] > 0.8
    assert "accuracy" in capsys.readouterr().out

    exec(compile(BLOCKS[1], "README.md", "exec"), names)
    assert "fastest" in capsys.readouterr().out
    assert names["cheap"].result().status == "finished"

    optuna.logging.disable_default_handler()
    names["study"] = study = optuna.create_study(direction="maximize")
    with smlt.Fleet.open(tmp_path / "my-fleet", budget_usd=0.05) as names["fleet"]:
        exec(compile(BLOCKS[2].replace("n_trials=100", "n_trials=2"), "README.md", "exec"), names)
    assert len(study.trials) == 2
    assert all(trial.user_attrs["smlt_cost_usd"] > 0 for trial in study.trials)
