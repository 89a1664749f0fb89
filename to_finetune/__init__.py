"""to_finetune: fine-tune large language models with the Trainable Optimizer."""

from to_finetune.optim import DiagonalTO, FullTO, RankOneTO

__version__ = "0.1.0"
__all__ = ["DiagonalTO", "FullTO", "RankOneTO", "__version__"]
