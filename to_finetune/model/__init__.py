"""The model: loading the base; choosing, saving and merging what trains; prompting and describing the result."""

from to_finetune.model.load import load_finetuned, load_model, load_tokenizer
from to_finetune.model.subset import select_trainable
from to_finetune.model.trained import load_trained, save_trained

__all__ = ["load_finetuned", "load_model", "load_tokenizer", "load_trained", "save_trained", "select_trainable"]
