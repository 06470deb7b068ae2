"""What a model asks of a machine, whatever trains it."""

from dataclasses import dataclass


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
