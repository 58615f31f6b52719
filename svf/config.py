"""SVFConfig, and PEFT's type "SVF"."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig, PeftType
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND

from svf.decompose import DecompositionOptions

Form = Literal["auto", "one_sided", "factored", "merged"]


def _add_peft_type(name: str) -> None:
    """PEFT's list of methods is a closed enum, and registering asks that the name be in it."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)


_add_peft_type("SVF")

MLP = ["gate_proj", "up_proj", "down_proj"]
TARGETS = {"llama": MLP, "mistral": MLP, "qwen2": MLP, "qwen3": MLP, "gemma": MLP, "gemma2": MLP, "gemma3_text": MLP}
TARGETS |= {"olmo2": MLP, "smollm3": MLP, "granite": MLP, "phi3": ["gate_up_proj", "down_proj"]}
TARGETS |= {"gpt2": ["c_fc", "mlp.c_proj"]}
"""What is adapted where `target_modules` is not given: the MLP, as the published experts."""


@dataclass
class SVFConfig(PeftConfig):
    """Singular Value Fine-tuning."""

    target_modules: list[str] | str | None = None
    """Module names (their ends suffice), a regular expression, or "all-linear"; the MLP of known architectures if not
    given."""
    exclude_modules: list[str] | str | None = None
    """Names or a regular expression of modules to leave out."""
    layers_to_transform: list[int] | int | None = None
    """Only in layers of these numbers."""
    layers_pattern: list[str] | str | None = None
    """Name of the list of layers that `layers_to_transform` counts, where it is not obvious."""
    target_parameters: list[str] | None = None
    """Names of parameters (their ends suffice) to adapt where there is no module for them: 3-D weights of experts."""
    modules_to_save: list[str] | None = None
    """Modules to train and save in full."""
    parametrization: Literal["residual", "exp", "sigmoid"] = "residual"
    """e = 1 + z, exp(z), or max_mult * sigmoid(z) (the published one)."""
    max_mult: float = 1.0
    """Upper bound of e for sigmoid."""
    normalize: Literal["none", "nuclear", "fro"] = "none"
    """Keep the sum (nuclear: the published code) or the root of squares (fro) of the singular values."""
    form: Form = "auto"
    """How it is computed. one_sided (auto): the base layer, and its input or output rescaled; exact at init, and on a
    quantised base. factored: two factors instead of the weight; fastest for few tokens, not exact. merged: the adapted
    weight is made in every forward; for reference and for weights that no input can be rescaled for. Linear layers have
    all three, quantised ones one_sided alone; convolutions one_sided and merged, grouped ones merged alone;
    `target_parameters` merged alone. auto takes the first that a layer has; one that it has not is refused."""
    top_k: int | None = None
    """Adapt only so many directions, those of the largest singular values; None for all."""
    init: float | None = None
    """Mean of z at first; 0 (the identity) for residual and exp, 0.1 for sigmoid if not given."""
    init_std: float | None = None
    """Its standard deviation; 0, or 0.01 for sigmoid if not given."""
    basis_hash: str | None = None
    """Identity of the adapted weights and of the solver; filled in, and compared on loading."""
    check_basis: bool = True
    """Refuse a base with another basis."""
    decomposition: dict[str, Any] | None = field(default=None, repr=False)
    """See `svf.decompose.DecompositionOptions`; not saved."""

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.SVF
        choices = {
            "parametrization": ("residual", "exp", "sigmoid"),
            "normalize": ("none", "nuclear", "fro"),
            "form": ("auto", "one_sided", "factored", "merged"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(allowed)}")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"top_k={self.top_k} must be a whole number from 1 on")
        for name, least in (("max_mult", 1e-30), ("init", -math.inf), ("init_std", 0.0)):
            value = getattr(self, name)
            if value is not None and not (least <= value and math.isfinite(value)):
                raise ValueError(f"{name}={value} must be a finite number{' above 0' if name == 'max_mult' else ''}")
        pattern = (
            isinstance(self.target_modules, str) and self.target_modules.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND
        )
        if pattern and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs target_modules as a list of names, not a regular expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))
            elif isinstance(getattr(self, name), str):
                try:
                    re.compile(getattr(self, name))
                except re.error as problem:
                    raise ValueError(f"{name}={getattr(self, name)!r} is no regular expression: {problem}") from None
        DecompositionOptions.of(self.decomposition)
        sigmoid = self.parametrization == "sigmoid"
        self.init = (0.1 if sigmoid else 0.0) if self.init is None else self.init
        self.init_std = (0.01 if sigmoid else 0.0) if self.init_std is None else self.init_std

    def to_dict(self) -> dict[str, Any]:
        """Without what belongs to this machine or to one loading alone."""
        return {key: value for key, value in super().to_dict().items() if key not in ("decomposition", "check_basis")}


def common_form(configs: Iterable[SVFConfig]) -> Form:
    """The form of all of them; auto where they differ."""
    forms = {config.form for config in configs}
    return forms.pop() if len(forms) == 1 else "auto"
