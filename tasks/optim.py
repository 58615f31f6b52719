"""The optimiser of every training here: AdamW with a linear warm-up and a cosine to almost zero, as published, or Muon
for the matrices, and the published gradient clipping by a quantile."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Optim:
    """How a model is trained."""

    muon: bool = False
    """Muon for the matrices but embeddings, its steps scaled to the size of AdamW's (arXiv 2502.16982); AdamW for the
    rest."""
    lr: float = 1e-4
    """Highest learning rate."""
    warmup: int = 0
    """Steps of linear warm-up to it."""
    steps: int = 100_000
    """Steps until the cosine ends; not taken from trainer.max_steps, so that a run can go on past it unchanged."""
    final_lr: float = 1e-7
    """Learning rate at the end of the cosine and after it."""
    weight_decay: float = 0.0
    """Of AdamW and Muon."""
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
        if not 0 <= self.beta2 < 1 or min(self.eps, self.weight_decay, self.final_lr) < 0:
            raise ValueError(
                f"model.optim needs 0 <= beta2 < 1 and eps, weight_decay and final_lr of at least 0, got "
                f"beta2={self.beta2}, eps={self.eps}, weight_decay={self.weight_decay}, final_lr={self.final_lr}"
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

    def configure(self, model: nn.Module) -> dict:
        """For `LightningModule.configure_optimizers`."""
        groups = self.groups(model.named_parameters())
        adamw = partial(AdamW, lr=self.lr, betas=(0.9, self.beta2), eps=self.eps, weight_decay=self.weight_decay)
        optimizer = MuonAdamW(matrices(model), groups, adamw) if self.muon else adamw(groups)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self.factor), "interval": "step"},
        }


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights that map one vector to another: two axes, called weight..., and not an embedding's."""
    tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    return [
        p
        for name, p in model.named_parameters()
        if p.ndim == 2 and name.rpartition(".")[2].startswith("weight") and p.requires_grad and id(p) not in tables
    ]


class MuonAdamW(Optimizer):
    """PyTorch's Muon for some parameters and AdamW for the others, with one state and one list of groups.

    Args:
        matrices: what Muon trains.
        groups: all parameters, grouped by weight decay.
        adamw: makes an AdamW from groups; Muon takes its learning rate and weight decay.

    Raises:
        ValueError: where there is no matrix.
    """

    def __init__(self, matrices: list[nn.Parameter], groups: list[dict], adamw: Callable[[list[dict]], AdamW]):
        if not matrices:
            raise ValueError("model.optim.muon=true: nothing that trains here is a matrix; leave it out")
        chosen = {id(p) for p in matrices}

        def part(of_muon: bool) -> list[dict]:
            parts = [g | {"params": [p for p in g["params"] if (id(p) in chosen) is of_muon]} for g in groups]
            return [g for g in parts if g["params"]]

        rest = part(False)
        self.parts = [adamw(rest)] if rest else []
        options = self.parts[0].defaults if rest else adamw(part(True)).defaults
        self.parts.append(Muon(part(True), options["lr"], options["weight_decay"], adjust_lr_fn="match_rms_adamw"))
        super().__init__([g for part in self.parts for g in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Gives the two parts the groups and the state of the whole, whose learning rates are what schedules set."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"parts": self.parts}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._share()

    def step(self, closure: Callable | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


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
        if state["norms"] is not None and len(state["norms"]) == self.history:  # another history begins anew
            self.norms, self.n = state["norms"], state["n"]
