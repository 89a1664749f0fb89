"""Tests of the toolkit: here the fine-tuning side, in optim/ the optimizers alone."""
