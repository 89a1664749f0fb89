"""The training data: files and hub sets, the Alpaca prompt, a preview of the prepared rows."""

from to_finetune.data.alpaca import alpaca_prompt
from to_finetune.data.load import load_data
from to_finetune.data.preview import check_labels, preview

__all__ = ["alpaca_prompt", "check_labels", "load_data", "preview"]
