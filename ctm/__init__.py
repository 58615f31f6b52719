"""Continuous Thought Machines (arXiv 2505.05522)."""

from ctm.checkpoint import load
from ctm.model import CTM, CTMConfig, State, Thinker, Thought
from ctm.record import record

__all__ = ["CTM", "CTMConfig", "State", "Thinker", "Thought", "load", "record"]
