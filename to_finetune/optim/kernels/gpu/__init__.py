"""The fused path on GPUs, in Triton."""

from to_finetune.optim.kernels.gpu.factored import add_squares, scale
from to_finetune.optim.kernels.gpu.step import reduce, update

__all__ = ["add_squares", "reduce", "scale", "update"]
