"""The connection to a Ray cluster: made or joined, checked, and asked to grow."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import smlt_tune
from smlt_tune.backend.platforms.base import processor
from smlt_tune.errors import InvalidInput, PlatformError

#: How long the nodes may take to start a process and say what they are, seconds. A node that has
#: to install a runtime environment first needs minutes.
CHECK_S = 300.0


class Cluster:
    """A Ray cluster that this process is connected to.

    Joins the one that is in use in this process; otherwise the one at the address, or starts one on
    this machine. One that was in use stays so; one that was started here ends with :meth:`close`.

    Args:
        address: As for ``ray.init``.
        runtime_env: For ``ray.init``.

    Attributes:
        asked: What the autoscaler was asked for and has still to provide.

    Raises:
        InvalidInput: There is a ``runtime_env``, but this process is connected already.
        PlatformError: Ray is missing or cannot be reached, or a node cannot run functions.
    """

    def __init__(self, address: str | None, runtime_env: Mapping[str, Any] | None) -> None:
        try:
            import ray
        except ImportError as error:
            raise PlatformError(f"Ray cannot be imported ({error}): pip install ray") from error
        self.ray: Any = ray
        self._joined = bool(ray.is_initialized())
        self.asked: list[dict[str, float]] = []
        if self._joined and runtime_env:
            raise InvalidInput(
                "runtime_env: this process is connected to Ray already; give it to ray.init there"
            )
        if not self._joined:
            try:
                ray.init(
                    address=address,
                    include_dashboard=False,
                    log_to_driver=False,  # what functions print goes to their logs
                    runtime_env=dict(runtime_env or {}),
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise PlatformError(f"cannot use the Ray cluster {address!r}: {error}") from error
        try:
            self.processors = self._check_nodes()
        except BaseException:
            self.close()
            raise

    def check_connected(self) -> None:
        """Raises PlatformError if somebody has called ``ray.shutdown``: Ray would start anew."""
        if not self.ray.is_initialized():
            raise PlatformError("this process has left the Ray cluster; make a new platform")

    def nodes(self) -> list[dict[str, Any]]:
        """What Ray knows of each node that is alive."""
        return [node for node in self.ray.nodes() if node["Alive"]]

    @property
    def elsewhere(self) -> bool:
        """Whether there are nodes on other machines than this process."""
        here = socket.gethostname()
        return any(node["NodeManagerHostname"] != here for node in self.nodes())

    def total(self) -> dict[str, float]:
        """All resources of the cluster as it stands, by Ray's names."""
        return dict(self.ray.cluster_resources())

    def largest(self, resource: str) -> float:
        """The most that a single node has of a resource."""
        return max((node["Resources"].get(resource, 0.0) for node in self.nodes()), default=0.0)

    def ask_for(self, bundles: list[dict[str, float]]) -> None:
        """Asks the autoscaler for room for all of these together.

        Ray keeps one request per cluster, the last one: it stands until another replaces it.
        """
        if bundles == self.asked:
            return
        from ray.autoscaler.sdk import request_resources

        self.asked = bundles
        request_resources(bundles=bundles)

    def close(self) -> None:
        """Takes a request to the autoscaler back; leaves the cluster, or ends it. Idempotent."""
        if self.ray.is_initialized():
            with suppress(self.ray.exceptions.RayError):  # the cluster itself is gone
                self.ask_for([])
            if not self._joined:
                self.ray.shutdown()

    def _check_nodes(self) -> tuple[str, ...]:
        """The models of the nodes' CPUs, once each.

        Raises:
            PlatformError: A node lacks this package, has another release of it, or is silent.
        """
        ray = self.ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = ray.remote(num_cpus=0, max_retries=0)(_who)
        nodes = self.nodes()
        answers = [
            task.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote()
            for node in nodes
        ]
        models, mistakes = set(), []
        ray.wait(answers, num_returns=len(answers), timeout=CHECK_S)
        for node, answer in zip(nodes, answers, strict=True):
            host = node["NodeManagerHostname"]
            try:
                version, model = ray.get(answer, timeout=0)
            except ray.exceptions.GetTimeoutError:
                mistakes.append(f"node {host} did not answer within {CHECK_S:g} s")
            except ray.exceptions.RayError as error:
                mistakes.append(f"node {host} cannot run functions: {last_line(error)}")
            else:
                models.add(model)
                if version != smlt_tune.__version__:
                    mistakes.append(
                        f"node {host} has smlt_tune {version}, here it is {smlt_tune.__version__}"
                    )
        if mistakes:
            raise PlatformError(
                "\n".join(mistakes)
                + "\nInstall the same release of smlt_tune on every node, or name it in runtime_env"
                " ({'pip': [...]}, or {'py_modules': [smlt_tune]} where its dependencies are there)"
            )
        return tuple(sorted(models))


def _who() -> tuple[str, str]:
    """Runs on a node: its release of this package and its CPU."""
    return smlt_tune.__version__, processor()


def last_line(error: BaseException) -> str:
    """What an error of Ray says in the end: it quotes whole tracebacks."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"


def check_gpus(cluster: Cluster, gpus: float) -> None:
    """Refuses functions with more GPUs than any node has.

    Raises:
        InvalidInput: Says how many there are.
    """
    most = cluster.largest("GPU")
    if gpus > most:
        raise InvalidInput(
            f"gpus={gpus:g}: the largest node of the cluster has {most:g}; start Ray with "
            "num_gpus, or ask for fewer"
        )
