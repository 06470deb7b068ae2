"""What the execution engine can be told; a part of NNI's ``NasExperimentConfig``.

NNI's own rules: a direct subclass of its base class, no postponed annotations, only what JSON has.
"""

from dataclasses import dataclass
from typing import Any, Literal

from nni.experiment.config import utils
from nni.nas.experiment.config import ExecutionEngineConfig, SimplifiedModelFormatConfig

from smlt_tune.backend.goals import Cheapest, Fastest, Goal
from smlt_tune.errors import InvalidInput


@dataclass(init=False)
class SmltEngineConfig(ExecutionEngineConfig):  # type: ignore[misc]
    """``NasExperimentConfig(execution_engine="smlt")``: every candidate is a job of one fleet.

    How many candidates train at once is the experiment's ``trial_concurrency`` (1 if it is not
    set), how many there are its ``max_trial_number``, and after its ``max_experiment_duration`` no
    further one starts.

    Attributes:
        platform: Where functions run: ``local`` or ``inline``.
        budget_usd: What all candidates together may cost, USD; None for no limit.
        deadline_s: When all candidates have to be over, seconds from the start; None for never.
        goal: Of every candidate: ``cheapest`` or ``fastest``.
        trial_deadline_s: Limit of ``cheapest``: time of one candidate, seconds.
        trial_budget_usd: Limit of ``fastest``: cost of one candidate, USD.
        workers: Pins the number of functions of a candidate. An evaluator that does not train with
            ``smlt_tune.session()`` needs 1.
        memory_mb: Pins the memory of a function, MB.
        min_workers: Fewest functions to choose.
        max_workers: Most functions to choose.
        min_memory_mb: Smallest memory to choose, MB.
        max_memory_mb: Largest memory to choose, MB.
        dummy_input: Shape of one batch of the model's input, the global batch size first. With it,
            every candidate is measured before it starts, so that its first allocation is already
            meant for its size.
        dummy_dtype: PyTorch's name of the type of that input.
        iterations: Training iterations of a candidate, if all have as many.
        metric: Name of the number that the evaluator reports with ``session.report``; None for one
            that reports with ``nni.report_intermediate_result`` and ``nni.report_final_result``.
        seed: Everything random in a candidate derives from it.
        fleet_folder: Where the fleet's journal lies; None for a folder of the experiment.
        project: Folder with the profiles of earlier fleets.
        parameter_store: URL of a Redis or Valkey server; None for one of its own.
        object_store: ``file:///folder`` or ``s3://bucket/prefix``; None for the fleet's folder.
    """

    name: str = "smlt"
    platform: str = "local"
    budget_usd: float | None = None
    deadline_s: float | None = None
    goal: Literal["cheapest", "fastest"] = "cheapest"
    trial_deadline_s: float | None = None
    trial_budget_usd: float | None = None
    workers: int | None = None
    memory_mb: int | None = None
    min_workers: int = 1
    max_workers: int | None = None
    min_memory_mb: int | None = None
    max_memory_mb: int | None = None
    dummy_input: list[int] | None = None
    dummy_dtype: str = "float32"
    iterations: int | None = None
    metric: str | None = None
    seed: int = 0
    fleet_folder: str | None = None
    project: str | None = None
    parameter_store: str | None = None
    object_store: str | None = None

    def _canonicalize(self, parents: list[Any]) -> None:
        experiment = parents[0]
        if utils.is_missing(experiment.trial_concurrency):
            experiment.trial_concurrency = 1
        if utils.is_missing(experiment.training_service):  # NNI wants one, nothing uses it
            service = utils.training_service_config_factory("local")
            service._canonicalize([experiment])
            experiment.training_service = service
        super()._canonicalize(parents)

    def goal_of_trials(self) -> Goal:
        """The goal as the fleet knows it.

        Raises:
            InvalidInput: A limit is not a positive number, or belongs to the other goal.
        """
        if self.goal == "cheapest" and self.trial_budget_usd is not None:
            raise InvalidInput(
                "trial_budget_usd is the limit of goal='fastest'; the cheapest candidate has "
                "trial_deadline_s"
            )
        if self.goal == "fastest" and self.trial_deadline_s is not None:
            raise InvalidInput(
                "trial_deadline_s is the limit of goal='cheapest'; the fastest candidate has "
                "trial_budget_usd"
            )
        if self.goal == "fastest":
            return Fastest(self.trial_budget_usd)
        return Cheapest(self.trial_deadline_s)

    def bounds(self) -> dict[str, Any]:
        """What it fixes of an allocation: arguments of ``Fleet.submit``."""
        names = ("workers", "memory_mb", "min_workers", "max_workers", "min_memory_mb",
                 "max_memory_mb")  # fmt: skip
        return {name: getattr(self, name) for name in names}


def config_mistakes(config: Any) -> list[str]:
    """What an experiment's canonical config asks for and this engine cannot do."""
    mistakes = []
    if not isinstance(config.model_format, SimplifiedModelFormatConfig):
        mistakes.append(
            f"model_format={config.model_format.name!r}: candidates travel to functions in the "
            "format 'simplified'; NNI cannot serialise 'raw', and cannot convert models to 'graph' "
            "with a current PyTorch"
        )
    if config.max_trial_duration is not None:
        mistakes.append(
            "max_trial_duration is not kept: give the engine trial_deadline_s (a goal) or "
            "deadline_s (of all candidates)"
        )
    shape, engine = config.execution_engine.dummy_input, config.execution_engine
    if shape is not None and not (shape and all(n > 0 for n in shape)):
        mistakes.append(f"dummy_input={shape!r}: expected a shape, such as [256, 1, 28, 28]")
    if engine.iterations is not None and engine.iterations < 1:
        mistakes.append(f"iterations={engine.iterations!r}: expected at least 1, or None")
    try:
        engine.goal_of_trials()
    except InvalidInput as error:
        mistakes += error.mistakes
    return mistakes
