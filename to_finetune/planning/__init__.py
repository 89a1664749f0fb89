"""Memory, time and cost before a run."""

from to_finetune.planning.fit import Proposal, pick_subset, proposals
from to_finetune.planning.memory import Plan, plan
from to_finetune.planning.settings import LAYOUTS, Blueprint, CannotSay, Settings, Workload, load_blueprint
from to_finetune.planning.speed import GPUS, UTILISATION, Speed, speed
from to_finetune.planning.table import gigabytes, parse_size, plan_table

__all__ = [
    "GPUS",
    "LAYOUTS",
    "UTILISATION",
    "Blueprint",
    "CannotSay",
    "Plan",
    "Proposal",
    "Settings",
    "Speed",
    "Workload",
    "gigabytes",
    "load_blueprint",
    "parse_size",
    "pick_subset",
    "plan",
    "plan_table",
    "proposals",
    "speed",
]
