"""Tests of the optimizers, each against a reference: the textbook, a closed form, or a theorem."""
