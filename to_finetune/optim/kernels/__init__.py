"""Faster twins of the update rules, each checked against `to_finetune.optim.rules`."""
