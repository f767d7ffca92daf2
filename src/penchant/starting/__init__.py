"""A starting config from three answers: data, model, goal."""

from penchant.starting.start import Start, propose, write_config

__all__ = ["Start", "propose", "write_config"]
