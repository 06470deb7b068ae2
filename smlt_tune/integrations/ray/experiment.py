"""What the trials of one experiment share on the fleet's side."""

from functools import partial
from typing import Any

from ray.tune import TuneError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.result import STDERR_FILE, STDOUT_FILE, TRIAL_INFO

from smlt_tune.backend.fleet import Fleet
from smlt_tune.errors import InvalidInput
from smlt_tune.integrations.ray import fleets
from smlt_tune.integrations.ray.attachment import jobs_of
from smlt_tune.integrations.ray.staging import stage
from smlt_tune.integrations.ray.trial_request import TrialRequest
from smlt_tune.integrations.ray.tune_session import Trial
from smlt_tune.integrations.ray.virtual_trial import VirtualTrial


class Experiment:
    """The virtual trials of one run of Tune's loop, and their fleet.

    Attributes:
        controller: Tune's loop; known once it has asked for the first actor.
    """

    def __init__(self) -> None:
        self.controller: TuneController | None = None
        self._fleets: fleets.Fleets | None = None
        self._fleet: Fleet | None = None
        self._storage: Any = None
        self._trial_ids: set[str] = set()
        self._donated: dict[str, str] = {}

    def trial(self, cls: Any, kwargs: dict[str, Any], request: TrialRequest) -> VirtualTrial:
        """Makes a trial of what Tune would make an actor of.

        Args:
            cls: Class of the actor.
            kwargs: Arguments of its constructor.
            request: Its resources.

        Raises:
            InvalidInput: The trainable cannot be sent to a function; the message names the trial.
        """
        config, storage = dict(kwargs["config"]), kwargs["storage"]
        for name in (STDOUT_FILE, STDERR_FILE):
            config.pop(name, None)
        info = config.pop(TRIAL_INFO)
        fleet = self._open(info.trial_name, storage)
        self._trial_ids.add(info.trial_id)
        trial = Trial(
            info.trial_id, info.trial_name, storage.experiment_dir_name, config, request.options
        )
        donate = partial(self._donate, fleet, info.trial_id)
        try:
            return VirtualTrial(fleet, trial, storage, stage(cls), request.options, donate)
        except InvalidInput as error:
            raise InvalidInput(
                [f"trial {trial.name}: {mistake}" for mistake in error.mistakes]
            ) from error

    def refuse_move(self, kwargs: dict[str, Any], resources: Any) -> None:
        """Raises if a trial of the fleet is about to become an actor.

        Raises:
            TuneError: A scheduler has given it other resources.
        """
        info = kwargs["config"].get(TRIAL_INFO)
        if info is not None and info.trial_id in self._trial_ids:
            raise TuneError(
                f"trial {info.trial_name} runs on a fleet, and its scheduler now asks for "
                f"{resources.required_resources} of the Ray cluster: give "
                "ResourceChangingScheduler a resources_allocation_function that returns "
                "SmltResources"
            )

    def close(self) -> None:
        """Stops what has been left over, and closes the fleet if it was opened for this."""
        if self._fleet is not None and self._fleets is not None:
            for job in jobs_of(self._fleet, self._storage.experiment_dir_name):
                job.stop("the experiment is over")
            if self._donated:
                self._release(self._fleet, list(self._donated))
            self._fleets.experiment_over(self._storage)
        self._fleet = None

    def _donate(self, fleet: Fleet, trial_id: str, url: str) -> None:
        """Keeps the state of a trial that others may start from, and those that some will.

        A job keeps the checkpoints of its last reports only. Population-based training chooses a
        donor by a report that may lie further back. Tune's own folders would not do: it deletes
        them as ``num_to_keep`` says.
        """
        fleet.keep_checkpoint(url)
        self._donated.pop(url, None)
        self._release(fleet, [old for old, by in self._donated.items() if by == trial_id])
        self._donated[url] = trial_id

    def _release(self, fleet: Fleet, urls: list[str]) -> None:
        """Keeps those of the states no longer that no trial is to start from."""
        assert self.controller is not None
        needed = set()
        for trial in self.controller.get_trials():  # type: ignore[no-untyped-call]
            start = trial.run_metadata.checkpoint_manager.latest_checkpoint_result
            if start and trial.status != TuneTrial.TERMINATED:
                needed.add(start.metrics.get("smlt/checkpoint"))
        for url in set(urls) - needed:
            fleet.release_checkpoint(url)
            del self._donated[url]

    def _open(self, trial_name: str, storage: Any) -> Fleet:
        if self._fleet is None:
            self._fleets, self._storage = fleets.current(), storage
            if self._fleets is None:
                raise InvalidInput(
                    f'trial {trial_name} asks for "smlt", and nobody has said where that is: call '
                    "smlt_tune.integrations.ray.register_smlt first"
                )
            self._fleet = self._fleets.of(storage)
            for job in jobs_of(self._fleet, storage.experiment_dir_name):
                job.pause()  # what a driver that died has left goes on when its trial asks for it
        return self._fleet
