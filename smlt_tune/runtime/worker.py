"""Entry of one invocation: everything that a function does, on any platform."""

import hashlib
import importlib
import importlib.util
import traceback
from typing import Any

import cloudpickle

from smlt_tune.errors import (
    BudgetExhausted,
    ObjectDamaged,
    ObjectNotFound,
    StoreError,
    StoreUnavailable,
)
from smlt_tune.runtime import keys, wire
from smlt_tune.runtime.aggregator import TTL_S, Superseded
from smlt_tune.runtime.clock import SYSTEM_CLOCK
from smlt_tune.runtime.handover import Leave
from smlt_tune.runtime.session import Home, Session
from smlt_tune.runtime.stores.base import ObjectStore
from smlt_tune.runtime.stores.metered import MeteredObjectStore
from smlt_tune.runtime.stores.opening import open_object_store, open_parameter_store


def run(payload: bytes) -> None:
    """Runs one worker until it is done, hands over, or fails; says so through the store.

    Args:
        payload: Encoded :class:`~smlt_tune.runtime.wire.WorkerSpec`.
    """
    started_s = SYSTEM_CLOCK.monotonic()
    spec = wire.WorkerSpec.decode(payload)
    parameter_store = open_parameter_store(spec.parameter_store)
    gradient_store = open_parameter_store(spec.gradient_store) if spec.gradient_store else None

    def tell(kind: type[wire.WorkerEvent], **content: Any) -> None:
        who = (spec.job, spec.generation, spec.rank, spec.incarnation)
        event = kind(*who, **content).encode()
        parameter_store.append(keys.FleetKeys(spec.fleet).events, event, ttl_s=TTL_S)

    metered = None
    try:
        store = open_object_store(spec.object_store, spec.store_options)
        metered = MeteredObjectStore(store, max_puts=spec.max_puts, max_gets=spec.max_gets)
        _train(spec, Home(spec, parameter_store, metered, started_s, gradient_store))
    except (Leave, Superseded):
        pass  # what there was to say has been said
    except BaseException as error:  # noqa: BLE001 - the boundary of the process: tell, do not die
        tell(
            wire.Failed,
            error=f"{type(error).__name__}: {error}",
            traceback=_users_part(error),
            by_user=not isinstance(error, StoreError | BudgetExhausted),
            retry=isinstance(error, StoreUnavailable | ObjectNotFound | BudgetExhausted),
        )
    finally:
        if metered is not None and spec.max_puts is not None:
            usage = metered.usage
            tell(wire.Requests, puts=usage.puts + usage.lists, gets=usage.gets)
        parameter_store.close()
        if gradient_store is not None:
            gradient_store.close()


def _train(spec: wire.WorkerSpec, home: Home) -> None:
    _prepare_torch(spec.vcpus)
    function = _load(home.object_store, spec.function)
    config = _load(home.object_store, spec.config)
    with Session(home) as session:
        value = function(config)
        session.finish(value)


def _load(store: ObjectStore, digest: str) -> Any:
    """Unpickles what the fleet has named in the payload, and nothing else (invariant 10)."""
    content = store.get(keys.code(digest))
    if hashlib.sha256(content).hexdigest() != digest:
        raise ObjectDamaged(
            f"{keys.code(digest)} in the object store is not what the fleet stored there; it was "
            "not executed"
        )
    return cloudpickle.loads(content)


def _prepare_torch(vcpus: float) -> None:
    """Loads PyTorch before the session seeds its generator and before it makes its threads.

    A training function that imports it itself would otherwise get other initial weights, and sums
    of another rounding, from a function that is warm than from one that is cold.
    """
    if importlib.util.find_spec("torch") is not None:
        torch = importlib.import_module("torch")
        torch.set_num_threads(max(1, int(vcpus)))


def _users_part(error: BaseException) -> str:
    """The traceback without this module's own frames."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace or error.__traceback__))
