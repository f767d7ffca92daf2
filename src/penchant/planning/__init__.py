"""What a run will be, before it trains: settings and their sources, work, memory, disk, time."""

from penchant.planning.plan import Plan, make_plan
from penchant.planning.text import plan_text

__all__ = ["Plan", "make_plan", "plan_text"]
