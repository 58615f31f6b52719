"""Singular Value Fine-tuning (Transformer², arXiv 2501.06252) as a PEFT method; importing it registers "SVF"."""

from svf.config import SVFConfig
from svf.experts import Expert
from svf.tuner import SVFModel

__all__ = ["Expert", "SVFConfig", "SVFModel"]
