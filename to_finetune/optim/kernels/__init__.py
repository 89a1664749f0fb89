"""Faster versions of the update rules, each tested against `to_finetune.optim.rules`."""
