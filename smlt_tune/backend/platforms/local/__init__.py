"""The embedded platform: AWS Lambda's behaviour on one Linux machine.

Layout, from the client inwards::

    client.py      LocalPlatform: admission, duplicates, results, the bill
    launch.py      the client's handle on its helper process
    channel.py     the frames that travel between the two
    bills.py       what was charged, on disk, for whoever comes after a dead client
    zygote.py      entry point of the helper: preloads the heavy modules once
    supervisor.py  its event loop: forks instances, ends them, keeps them warm
    instance.py    what a forked instance does
    isolation.py   how instances are limited; cgroup1.py, cgroup2.py, watchdog.py, probe.py
"""

from smlt_tune.backend.platforms.local.client import LocalPlatform

__all__ = ["LocalPlatform"]
