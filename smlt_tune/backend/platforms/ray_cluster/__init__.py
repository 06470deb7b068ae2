"""Functions as Ray actors, so that a Ray cluster is the engine.

Ray decides where a function runs; on that node the local platform decides how: it limits memory,
CPU share and time, forks functions from a process that has the heavy modules loaded, and leaves
nothing behind. Layout, from the client inwards::

    client.py      RayPlatform: invocations, results, the bill
    instances.py   actors that work or wait to be used again; whether there is room for one more
    cluster.py     the connection to Ray; checks of its nodes; the autoscaler
    options.py     what may be asked of it
    instance.py    the actor: one function instance on a node
"""

from smlt_tune.backend.platforms.ray_cluster.client import RayPlatform

__all__ = ["RayPlatform"]
