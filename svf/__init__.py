"""Singular Value Fine-tuning (Transformer², arXiv 2501.06252) as a PEFT method; importing it registers "SVF"."""

from svf.adapt import Adaptive, FewShot
from svf.config import SVFConfig
from svf.experts import Expert, ExpertLibrary
from svf.tuner import SVFModel

__all__ = ["Adaptive", "Expert", "ExpertLibrary", "FewShot", "SVFConfig", "SVFModel"]
