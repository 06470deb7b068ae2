"""What a model asks of a machine, whatever trains it."""

from dataclasses import dataclass
from typing import Any

from smlt_tune.errors import UsageError


@dataclass(frozen=True)
class ModelFeatures:
    """Of one model; what makes trials comparable.

    Attributes:
        parameters: Numbers that are trained.
        gradient_bytes: What a worker synchronises after every backward pass: gradients, and
            floating-point buffers; bytes.
        flops_per_sample: Floating-point operations of a forward and a backward pass, per sample; 0
            if it is not known.
        activation_bytes: What is kept between the two, bytes per sample; 0 if it is not known.
    """

    parameters: int
    gradient_bytes: int
    flops_per_sample: float = 0.0
    activation_bytes: float = 0.0


def model_features(model: Any, *inputs: Any) -> ModelFeatures:
    """What a PyTorch module asks of a machine, without running it.

    The forward and the backward pass of the sum of all floating-point outputs are played through
    with tensors that have no content, so that neither memory nor time for the real size is needed:
    module and inputs may also be on the ``meta`` device. The module is not changed, no random
    number is drawn, no gradient appears. It runs in the mode (training, evaluation) it is in.

    A module whose control flow depends on values (``if x.sum() > 0``) cannot be played through.
    It is run on its real parameters, which are shared and not copied, with two samples of the
    inputs.

    Operations are counted as PyTorch's ``FlopCounterMode`` counts them: matrix products,
    convolutions and attention, a multiplication and an addition being two. Activations are the
    inputs and what the forward pass has made and is alive when the backward pass begins, each
    storage once; parameters do not count, nor does the workspace of an LSTM on a CPU, whose size
    is known only when it runs.

    Args:
        model: A ``torch.nn.Module``.
        *inputs: Of its ``forward``: tensors, or structures of them. The first tensor's first
            dimension is the batch.

    Returns:
        The features; per sample, those of the whole divided by the size of the batch.

    Raises:
        InvalidInput: The model is no module, has uninitialised parameters or cannot be copied, or
            the inputs hold no batch.
        UsageError: PyTorch is not installed, or the module is on ``meta`` and depends on values.
    """
    try:
        from smlt_tune.runtime.frameworks.torch_features import features_of
    except ImportError as error:
        raise UsageError(
            "model_features() needs PyTorch, which is not installed: pip install 'smlt-tune[torch]'"
        ) from error
    return features_of(model, inputs)
