"""NNI's architecture search on a fleet."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni.experiment.config.utils import parse_time
from nni.nas.execution import ExecutionEngine
from nni.nas.experiment import NasExperiment, NasExperimentConfig
from nni.nas.experiment.config import ExecutionEngineConfig

from smlt_tune.backend.artifact_manager import pickled
from smlt_tune.backend.fleet import Fleet
from smlt_tune.backend.resource_manager.policy import Bounds, JobFacts, check
from smlt_tune.errors import InvalidInput
from smlt_tune.integrations.nni import compat
from smlt_tune.integrations.nni.candidates import Candidate
from smlt_tune.integrations.nni.config import SmltEngineConfig, config_mistakes
from smlt_tune.integrations.nni.engine import SmltExecutionEngine
from smlt_tune.integrations.nni.limits import Limits

if TYPE_CHECKING:
    from nni.nas.evaluator import Evaluator
    from nni.nas.space import BaseModelSpace
    from nni.nas.strategy import Strategy

_nni_engine_factory = NasExperiment.execution_engine_factory
_nni_load_state_dict = NasExperiment.load_state_dict


class SmltNasExperiment(NasExperiment):  # type: ignore[misc]
    """NNI's ``NasExperiment`` for the engine ``smlt``; everything else is NNI's.

    ``resume`` goes on with the candidates of a driver that was interrupted or killed: what has
    ended counts, what was in flight goes on from its checkpoints, what was spent stays spent.

    Args:
        model_space: As for NNI.
        evaluator: As for NNI; see ``SmltEngineConfig.metric`` for how it reports.
        strategy: Any multi-trial strategy.
        config: With ``execution_engine="smlt"``; None for one with the defaults.
        id: As for NNI.
        fleet: Where to run, instead of a fleet with the engine's ``platform``, ``budget_usd``,
            ``deadline_s`` and stores. It outlives the experiment; to resume, open its folder first.
    """

    def __init__(
        self,
        model_space: "BaseModelSpace",
        evaluator: "Evaluator",
        strategy: "Strategy",
        config: NasExperimentConfig | None = None,
        id: str | None = None,
        *,
        fleet: Fleet | None = None,
    ) -> None:
        config = config or NasExperimentConfig("smlt", "simplified")
        super().__init__(model_space, evaluator, strategy, config, id)
        self._fleet = fleet

    def execution_engine_factory(self, config: ExecutionEngineConfig) -> ExecutionEngine:
        """The engine for a config; NNI's own for its own configs.

        Raises:
            InvalidInput: Lists everything that the engine cannot do.
        """
        if isinstance(config, SmltEngineConfig):
            return _engine(self, config, getattr(self, "_fleet", None))
        return _nni_engine_factory(self, config)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what a checkpoint holds, and what NNI forgets of strategies."""
        _nni_load_state_dict(self, state_dict)
        if isinstance(self._engine, SmltExecutionEngine):
            compat.adopt(self.strategy, self._engine)

    def _stop_logging(self) -> None:
        compat.close_log(self.id)

    def candidates(self) -> list[Candidate]:
        """Every architecture that was submitted, with its allocations, their reasons, its cost."""
        engine = self._engine
        return engine.candidates() if isinstance(engine, SmltExecutionEngine) else []


def install() -> None:
    """Makes plain ``nni.nas.experiment.NasExperiment`` know the engine ``smlt``."""
    for name in ("execution_engine_factory", "load_state_dict", "_stop_logging", "candidates"):
        setattr(NasExperiment, name, getattr(SmltNasExperiment, name))


def _engine(
    experiment: NasExperiment, config: SmltEngineConfig, fleet: Fleet | None
) -> SmltExecutionEngine:
    settings = experiment.config.canonical_copy()
    mistakes = config_mistakes(settings)
    try:
        pickled(experiment.evaluator, "the evaluator")
    except InvalidInput as error:
        mistakes += error.mistakes
    if mistakes:
        raise InvalidInput(mistakes)
    folder = Path(settings.experiment_working_directory) / experiment.id
    resumed = experiment._action == "resume"
    running = fleet or _open_fleet(config, folder / "fleet", resumed=resumed)
    bounds = Bounds(**config.bounds())
    facts = JobFacts("check", running.platform.limits, config.goal_of_trials(), bounds)
    if mistakes := check(facts):
        if fleet is None:
            running.close()
        raise InvalidInput(mistakes)
    duration = settings.max_experiment_duration
    engine = SmltExecutionEngine(
        running,
        config,
        Limits(
            settings.trial_concurrency,
            settings.max_trial_number,
            None if duration is None else parse_time(duration),
        ),
        prefix=experiment.id,
        space=lambda: experiment._exec_model_space,
        save=compat.checkpoints(experiment, folder / "checkpoint"),
        owns_fleet=fleet is None,
    )
    compat.outlast(experiment.strategy, engine)
    return engine


def _open_fleet(config: SmltEngineConfig, folder: Path, *, resumed: bool) -> Fleet:
    path = Path(config.fleet_folder or folder)
    options: dict[str, Any] = {
        "platform": config.platform,
        "budget_usd": config.budget_usd,
        "deadline_s": config.deadline_s,
        "project": config.project,
        "parameter_store": config.parameter_store,
        "object_store": config.object_store,
    }
    if resumed and path.is_dir():
        return Fleet.open(path, **options)
    return Fleet(path=path, **options)
