"""NNI's tuners and assessors, with trials that are jobs of a fleet."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni.experiment import Experiment, RunMode
from nni.experiment.config import ExperimentConfig
from nni.experiment.config.utils import resolve_path

from smlt_tune.backend.goals import Cheapest
from smlt_tune.backend.resource_manager.policy import Bounds, JobFacts, check
from smlt_tune.errors import InvalidInput
from smlt_tune.integrations.nni import compat
from smlt_tune.integrations.nni.manager_guard import ManagerGuard
from smlt_tune.integrations.nni.metrics import LOG
from smlt_tune.integrations.nni.server import TrialServer
from smlt_tune.integrations.nni.trial_function import TrialFunction

if TYPE_CHECKING:
    from smlt_tune.backend.fleet import Fleet
    from smlt_tune.backend.goals import Goal
    from smlt_tune.backend.job import Job


class SmltExperiment(Experiment):  # type: ignore[misc]
    """NNI's ``Experiment``: its manager, web portal, tuner and assessor; trials are jobs.

    The manager starts a thin client for every trial, which lives as long as the job: what NNI
    stops, stops costing. To resume after the driver was killed, open the fleet's folder with
    ``Fleet.open`` and call ``resume``: NNI starts the trials again that were running, and their
    jobs go on from their checkpoints.

    Args:
        train: Training function; gets the parameters that the tuner generated. Code that uses NNI's
            trial API (``nni.get_next_parameter``, ``nni.report_final_result``) runs as it is.
        config: As for NNI, for the training service ``local``; ``trial_command`` is set by this.
        id: As for NNI.
        fleet: Where jobs run; it outlives the experiment.
        metric: Name of the number that the function reports with ``session.report``: each is an
            intermediate result, the last one the final result. None for NNI's trial API.
        goal: Of each job; the cheapest by default.
        seed: Everything random in a job derives from it.
        **bounds: ``workers``, ``memory_mb`` and the other bounds of ``Fleet.submit``.

    Raises:
        InvalidInput: Lists everything that is wrong with the arguments.
    """

    def __init__(
        self,
        train: Callable[[Any], Any],
        config: ExperimentConfig | None = None,
        id: str | None = None,
        *,
        fleet: "Fleet",
        metric: str | None = None,
        goal: "Goal | None" = None,
        seed: int = 0,
        **bounds: Any,
    ) -> None:
        super().__init__(config or ExperimentConfig("local"), id)
        given: object = train
        mistakes = [] if callable(given) else [f"train={given!r}: expected the training function"]
        unknown = sorted(set(bounds) - set(Bounds.__dataclass_fields__))
        mistakes += [f"{name}= is no bound of a job" for name in unknown]
        if not unknown:
            limits = fleet.platform.limits
            mistakes += check(JobFacts("check", limits, goal or Cheapest(), Bounds(**bounds)))
        if mistakes:
            raise InvalidInput(mistakes)
        self._function = TrialFunction(train)
        self._fleet, self._metric = fleet, metric
        self._options = {"goal": goal, "seed": seed, **bounds}
        self._stopped = {job.job_id for job in fleet.jobs() if job.status == "stopped"}
        self._server: TrialServer | None = None
        self._guard: ManagerGuard | None = None

    def start(
        self, port: int = 8080, debug: bool = False, run_mode: RunMode = RunMode.Background
    ) -> None:
        """As NNI's, in the background."""
        self._set_trial_command()
        super().start(port, debug, run_mode)

    def load_checkpoint(self) -> None:
        """As NNI's, which compares configs."""
        self._set_trial_command()
        super().load_checkpoint()

    def _set_trial_command(self) -> None:
        folder = resolve_path(self.config.experiment_working_directory, self.config._base_path)
        self._file = Path(folder) / self.id / "smlt.json"
        command = [sys.executable, "-P", "-m", "smlt_tune.integrations.nni.trial", str(self._file)]
        # exec: otherwise NNI would kill a shell, and leave the client behind.
        self.config.trial_command = "exec " + shlex.join(command)

    def _start_nni_manager(
        self,
        port: int,
        debug: bool,
        run_mode: RunMode = RunMode.Background,
        tuner_command_channel: str | None = None,
        tags: Any = (),
    ) -> None:
        compat.wait_for_manager()
        prefix = (self.url_prefix or "").strip("/")
        self._server = TrialServer(
            self._file, port, prefix, self._metric, self._submit, self._no_more_trials
        )
        try:
            self._guard = ManagerGuard(self.id, port)
            super()._start_nni_manager(port, debug, run_mode, tuner_command_channel, list(tags))
        except BaseException:
            self._close()
            raise

    def _stop_nni_manager(self) -> None:
        super()._stop_nni_manager()
        self._close()

    def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._guard is not None:
            self._guard.close()

    def _stop_logging(self) -> None:
        compat.close_log(self.id)

    def _submit(self, trial: str, parameters: Any) -> "Job":
        """Called in the thread of a trial."""
        base = name = f"{self.id}-{trial}"
        attempt = 1
        while name in self._stopped:  # before it was resumed
            attempt += 1
            name = f"{base}-{attempt}"
        return self._fleet.submit(self._function, parameters, name=name, **self._options)

    def _no_more_trials(self) -> None:
        """The fleet is over: NNI ends the experiment once the trials that run have ended."""
        LOG.warning("the fleet's budget or deadline is reached: no further trials start")
        try:
            self.update_max_trial_number(max(1, len(self.list_trial_jobs())))
        except Exception:  # noqa: BLE001 - the manager may be on its way out
            LOG.warning("NNI's manager could not be told", exc_info=True)
