"""The targets of `to-finetune reproduce`, by name. Imports nothing heavy, since the command's help lists them."""

from __future__ import annotations

ABOUT = {
    "table2": "strongly convex: logistic regression with L2, 17 cases (and figure1, their loss curves)",
    "table3": "logistic regression without L2, two small networks, ResNet (and figure2 to figure4)",
    "table6": "a selected subset of a Llama on Alpaca (and figure5)",
    "theory": "the O(1/t) rates, projection, Proposition 2's bound (and figure6, figure7)",
    "all": "all of it; on a CPU without ResNet-50",
    "CASE": "one row of a table: mnist-0.034, kdd-convex, covtype-ffn, resnet18, resnet50, llm, ...",
}
