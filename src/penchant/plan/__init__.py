"""What a run will be, before it trains: settings and their sources, work, memory, disk, time."""

from penchant.plan.plan import Plan, checkpointing, make_plan, misfit
from penchant.plan.text import plan_text

__all__ = ["Plan", "checkpointing", "make_plan", "misfit", "plan_text"]
