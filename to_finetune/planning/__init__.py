"""Estimates of a run's memory, time and cost before it starts."""

from to_finetune.planning.fit import Choice, Proposal, pick_subset, proposals
from to_finetune.planning.memory import Plan, plan
from to_finetune.planning.settings import LAYOUTS, Blueprint, CannotSay, Lora, Settings, Workload, load_blueprint
from to_finetune.planning.speed import GPUS, UTILISATION, Speed, check_gpu, speed
from to_finetune.planning.table import plan_line, plan_table, proposals_text, speed_text, verdict

__all__ = [
    "GPUS",
    "LAYOUTS",
    "UTILISATION",
    "Blueprint",
    "CannotSay",
    "Choice",
    "Lora",
    "Plan",
    "Proposal",
    "Settings",
    "Speed",
    "Workload",
    "check_gpu",
    "load_blueprint",
    "pick_subset",
    "plan",
    "plan_line",
    "plan_table",
    "proposals",
    "proposals_text",
    "speed",
    "speed_text",
    "verdict",
]
