"""The paper's experiments, each with a command: `to-finetune reproduce`. Stands on `to_finetune.optim` alone."""
