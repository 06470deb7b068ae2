"""What the trials of one experiment share on the fleet's side."""

from typing import Any

from ray.tune import TuneError
from ray.tune.result import STDERR_FILE, STDOUT_FILE, TRIAL_INFO

from smlt_tune.backend.fleet import Fleet
from smlt_tune.errors import InvalidInput
from smlt_tune.integrations.ray import fleets
from smlt_tune.integrations.ray.attachment import jobs_of
from smlt_tune.integrations.ray.donations import Donations
from smlt_tune.integrations.ray.staging import stage
from smlt_tune.integrations.ray.trial_request import TrialRequest
from smlt_tune.integrations.ray.tune_session import Trial
from smlt_tune.integrations.ray.virtual_trial import VirtualTrial


class Experiment:
    """The virtual trials of one run of Tune's loop, and their fleet."""

    def __init__(self) -> None:
        self._fleets: fleets.Fleets | None = None
        self._fleet: Fleet | None = None
        self._storage: Any = None
        self._trial_ids: set[str] = set()
        self._donations = Donations()

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
        try:
            return VirtualTrial(fleet, trial, storage, stage(cls), request.options, self._donations)
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
            self._fleets.experiment_over(self._storage)
        self._fleet = None

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
