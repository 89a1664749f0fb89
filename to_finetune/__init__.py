"""to_finetune: fine-tune large language models with the Trainable Optimizer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from to_finetune.optim import DiagonalTO, FullTO, RankOneTO

__version__ = "0.1.0"
__all__ = ["DiagonalTO", "FullTO", "RankOneTO", "__version__"]

# On some CPUs bitsandbytes warns, as soon as peft imports it, that a kernel for inference is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Without a GPU, DeepSpeed warns of that as soon as it is imported, whoever imports it and whether it is used or not.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def __getattr__(name: str) -> Any:
    """Import the optimizers on first access, so that the command line's help does not wait for torch."""
    if name in __all__:
        from to_finetune import optim

        return getattr(optim, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
