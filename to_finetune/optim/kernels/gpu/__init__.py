"""The fused path on GPUs, in Triton."""

from to_finetune.optim.kernels.gpu.factored import add_squares, scale
from to_finetune.optim.kernels.gpu.step import measure_and_update, reduce, update

__all__ = ["add_squares", "measure_and_update", "reduce", "scale", "update"]
