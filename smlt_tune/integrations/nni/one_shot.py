"""NNI's own one-shot strategies (ENAS, DARTS, ...) inside one function."""

from typing import TYPE_CHECKING, Any

from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace

from smlt_tune.integrations.nni import compat

if TYPE_CHECKING:
    from nni.nas.evaluator.pytorch import Lightning
    from nni.nas.nn.pytorch import ModelSpace
    from nni.nas.strategy import Strategy


def search_one_shot(
    model_space: "ModelSpace", evaluator: "Lightning", strategy: "Strategy"
) -> dict[str, Any]:
    """Trains a supernet and chooses an architecture from it; call it in a training function.

    NNI and Lightning hold the training loop. So such a job has one function, no checkpoints (after
    a loss or a time limit it begins anew), and costs one large function for as long as it takes;
    :class:`~smlt_tune.integrations.nni.enas.SmltEnas` has none of these limits.

    Args:
        model_space: What to choose from.
        evaluator: How the supernet is trained and judged.
        strategy: One of NNI's one-shot strategies.

    Returns:
        The choice for each label.
    """
    compat.mend_one_shot()
    space = RawFormatModelSpace.from_model(model_space, evaluator)
    strategy(space, SequentialExecutionEngine())
    return dict(next(iter(strategy.list_models(limit=1))).sample)
