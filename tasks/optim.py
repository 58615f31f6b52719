"""The optimiser of every training here: AdamW with a linear warm-up and a cosine to almost zero, as published, and the
published gradient clipping by a quantile."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
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
    no_decay: tuple[str, ...] = ()
    """Parts of names of parameters without weight decay, as in [bias, norm, start, decay]."""
    clip_quantile: float | None = None
    """Clips gradients to this quantile of their last norms, besides trainer.gradient_clip_val."""
    clip_history: int = 1000
    """How many norms that quantile is of, the present one among them."""

    def __post_init__(self):
        if self.clip_quantile is not None and not 0 < self.clip_quantile <= 1:
            raise ValueError(f"model.optim.clip_quantile={self.clip_quantile} must be above 0 and at most 1")
        if self.clip_history < 1:
            raise ValueError(f"model.optim.clip_history={self.clip_history} must be at least 1")
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

    def groups(self, named: Iterable[tuple[str, nn.Parameter]]) -> list[dict]:
        """Parameters with weight decay and, where `no_decay` names any, those without.

        Raises:
            ValueError: for a part that is in no parameter's name.
        """
        named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        for part in self.no_decay:
            if not any(part in name for name, _ in named):
                raise ValueError(
                    f"model.optim.no_decay: {part!r} is in no parameter's name; they end like {named[0][0]}"
                )
        free = {name for name, _ in named if any(part in name for part in self.no_decay)}
        groups = [{"params": [parameter for name, parameter in named if name not in free]}]
        if free:
            groups.append({"params": [parameter for name, parameter in named if name in free], "weight_decay": 0.0})
        return [group for group in groups if group["params"]]

    def configure(self, named: Iterable[tuple[str, nn.Parameter]]) -> dict:
        """For `LightningModule.configure_optimizers`."""
        betas = 0.9, self.beta2
        optimizer = AdamW(self.groups(named), self.lr, betas=betas, eps=self.eps, weight_decay=self.weight_decay)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self.factor), "interval": "step"},
        }


class QuantileClip:
    """Clips gradients to a quantile of their last norms, the present one among them (autoclip, as published for
    parity). Nothing in it waits for the device."""

    def __init__(self, quantile: float, history: int):
        self.quantile, self.history = quantile, history
        self.norms: Tensor | None = None
        self.n = 0

    def __call__(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self.norms is None:
            self.norms = torch.zeros(self.history, device=norm.device)
        self.norms = self.norms.to(norm.device)
        self.norms[self.n % self.history] = norm
        self.n += 1
        limit = self.norms[: self.n].quantile(self.quantile).clamp(min=1e-12)
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm / limit)  # of the limit, a number on the device

    def state_dict(self) -> dict:
        return {"norms": self.norms, "n": self.n}

    def load_state_dict(self, state: dict) -> None:
        self.norms, self.n = state["norms"], state["n"]
