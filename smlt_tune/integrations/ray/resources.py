"""What a trial asks SMLT for, in the form that Tune hands around."""

from difflib import get_close_matches
from typing import Any

from smlt_tune.backend.goals import Goal
from smlt_tune.backend.resource_manager.observations import Workload
from smlt_tune.errors import InvalidInput
from smlt_tune.integrations.ray import patches
from smlt_tune.integrations.ray.trial_request import SMLT, TrialRequest


class SmltResources(TrialRequest):
    """``resources_per_trial="smlt"``, with more to say. Every argument is optional.

    Nothing of this is looked for on the Ray cluster: the trial's job runs on the functions of the
    registered fleet, which checks the values. Constructing or unpickling one prepares Tune for it,
    so that only the bare string needs :func:`register_smlt` to have been called before.

    Args:
        goal: ``Cheapest(deadline_s=...)`` or ``Fastest(budget_usd=...)``.
        workers: Pins the number of functions. A function that never mentions ``smlt_tune`` trains
            on one unless this or ``max_workers`` says otherwise.
        memory_mb: Pins the memory of a function, MB.
        min_workers: Fewest functions to choose.
        max_workers: Most functions to choose.
        min_memory_mb: Smallest memory to choose, MB.
        max_memory_mb: Largest memory to choose, MB.
        store: Pins the parameter store, by its name in the fleet.
        workload: What the trial will compute, if that is known.
        shards: Shards per synchronisation; 0 chooses.
        seed: Everything random in the trial's job derives from it.
    """

    def __init__(
        self,
        goal: Goal | None = None,
        *,
        workers: int | None = None,
        memory_mb: int | None = None,
        min_workers: int = 1,
        max_workers: int | None = None,
        min_memory_mb: int | None = None,
        max_memory_mb: int | None = None,
        store: str | None = None,
        workload: Workload | None = None,
        shards: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            goal=goal, workers=workers, memory_mb=memory_mb, min_workers=min_workers,
            max_workers=max_workers, min_memory_mb=min_memory_mb, max_memory_mb=max_memory_mb,
            store=store, workload=workload, shards=shards, seed=seed,
        )  # fmt: skip
        patches.install(resolve)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        patches.install(resolve)

    def __repr__(self) -> str:
        plain = {"min_workers": 1, "shards": 0, "seed": 0}
        said = {name: value for name, value in self.options.items() if value != plain.get(name)}
        return f"SmltResources({', '.join(f'{name}={value!r}' for name, value in said.items())})"


def resolve(resources: Any) -> Any:
    """The resources that a string stands for; anything else as it is.

    Raises:
        InvalidInput: The string is not ``"smlt"``.
    """
    if not isinstance(resources, str):
        return resources
    if resources == SMLT:
        return SmltResources()
    close = get_close_matches(resources.lower(), [SMLT], cutoff=0.5)
    hint = f"did you mean {SMLT!r}?" if close else f"the only name is {SMLT!r}"
    raise InvalidInput(f"resources {resources!r} are unknown; {hint}")
