"""The paper's experiments, run by `to-finetune reproduce` with the optimizers and rules of `to_finetune.optim`."""
