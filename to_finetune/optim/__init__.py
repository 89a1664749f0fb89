"""Trainable Optimizers for any PyTorch training loop. Requires only torch."""

from to_finetune.optim.diagonal import DiagonalTO
from to_finetune.optim.full import FullTO
from to_finetune.optim.optimizer import TrainableOptimizer
from to_finetune.optim.rank_one import RankOneTO
from to_finetune.optim.release import release_gradients

__all__ = ["DiagonalTO", "FullTO", "RankOneTO", "TrainableOptimizer", "release_gradients"]
