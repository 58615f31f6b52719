"""Singular Value Fine-tuning (Transformer², arXiv 2501.06252) as a PEFT method; importing it registers "SVF"."""

from svf.tuner import SVFConfig, SVFModel

__all__ = ["SVFConfig", "SVFModel"]
