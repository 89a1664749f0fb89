"""The verbs of `to-finetune`. Each declares its arguments, and imports heavy modules only when it runs."""
