"""A sweep described in a file: reading it, following it, telling how it went.

Knows no tuner: an integration turns a :class:`~smlt_tune.backend.sweeps.sweep.Sweep` into trials.
"""
