"""The optimiser of every training here: AdamW with a linear warm-up and a cosine to almost zero, as published."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Optim:
    """How a model is trained."""

    lr: float = 1e-4
    """Highest learning rate."""
    warmup: int = 0
    """Steps of linear warm-up to it."""
    steps: int = 100_000
    """Steps until the cosine ends; not taken from trainer.max_steps, so that a run can go on past it unchanged."""
    final_lr: float = 1e-7
    """Learning rate at the end of the cosine and after it."""
    weight_decay: float = 0.0
    """Of AdamW."""
    beta2: float = 0.999
    """Of AdamW."""
    eps: float = 1e-8
    """Of AdamW."""

    def __post_init__(self):
        if self.lr <= 0 or self.steps < 1 or not 0 <= self.warmup <= self.steps:
            raise ValueError(
                f"model.optim needs lr > 0 and 0 <= warmup <= steps, got lr={self.lr}, "
                f"warmup={self.warmup}, steps={self.steps}"
            )

    def factor(self, step: int) -> float:
        """Share of the highest learning rate that step number `step` (from 0) takes."""
        if step < self.warmup:
            return step / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        final = self.final_lr / self.lr
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2

    def configure(self, parameters: Iterable[nn.Parameter]) -> dict:
        """For `LightningModule.configure_optimizers`."""
        optimizer = AdamW(parameters, self.lr, betas=(0.9, self.beta2), eps=self.eps, weight_decay=self.weight_decay)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self.factor), "interval": "step"},
        }
