"""ENAS whose children are jobs: they train at once, each at its own size, and share weights."""

from smlt_tune.integrations.nni.enas.shared import SharedWeights
from smlt_tune.integrations.nni.enas.strategy import SmltEnas

__all__ = ["SharedWeights", "SmltEnas"]
