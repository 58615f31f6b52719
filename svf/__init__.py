"""Singular Value Fine-tuning (Transformer², arXiv 2501.06252) as a PEFT method; importing it registers "SVF"."""

# ruff: noqa: E402
import logging

# PEFT imports bitsandbytes and torchao where they are installed, and they talk of kernels that are not: an error on the
# command line is one line. Before anything imports PEFT: outside this package it is taken from here (`svf.attach`).
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)

from svf.adapt import Adaptive, FewShot
from svf.config import SVFConfig
from svf.experts import Expert, ExpertLibrary
from svf.tuner import SVFModel

__all__ = ["Adaptive", "Expert", "ExpertLibrary", "FewShot", "SVFConfig", "SVFModel"]
