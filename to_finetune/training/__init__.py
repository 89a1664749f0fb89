"""Training with Hugging Face: arguments, the Trainer mixin, the proofs that a run does what was asked."""

from to_finetune.training.arguments import FinetuneArguments, TOTrainingArguments, TrainableOptimizerArguments
from to_finetune.training.sft import TOSFTTrainer
from to_finetune.training.trainer import TOTrainer, TrainableOptimizerMixin

__all__ = [
    "FinetuneArguments",
    "TOSFTTrainer",
    "TOTrainer",
    "TOTrainingArguments",
    "TrainableOptimizerArguments",
    "TrainableOptimizerMixin",
]
