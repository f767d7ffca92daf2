"""`penchant plan`: a run's settings and their sources, its work, memory, disk and time, estimated before it trains."""

from penchant.plan.plan import Plan, checkpointing, make_plan, memory_warning
from penchant.plan.text import plan_text

__all__ = ["Plan", "checkpointing", "make_plan", "memory_warning", "plan_text"]
