"""The verbs of `to-finetune`. Each declares its arguments, and imports what is heavy when it runs."""
