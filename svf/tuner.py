"""SVF as a PEFT method: `get_peft_model(model, SVFConfig(...))` adapts singular values and nothing else.

Every adapted weight W = U diag(s) Vᵀ gets a vector z, its singular values become e(z) * s (`svf.spectral`). What works
for LoRA works here: saving, loading, switching, disabling, merging, adding with weights, `adapter_names`; and a batch
may mix experts by row and by token, also in training (`SVFModel.mix`). Importing this module registers the method.

    SVFLayer            what all adapted layers share: z, bases, shifts, merging
      SVFLinear         nn.Linear, GPT-2's Conv1D and quantised linear layers
      SVFConv2d         nn.Conv2d, its weight seen as (out, in * kh * kw)
      ParamWrapper      parameters of any module, 3-D ones as stacks of matrices (the experts of a mixture-of-experts)
    SVFModel            finds, wraps, decomposes, mixes
"""

import functools
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    check_adapters_to_merge,
    check_target_module_exists,
)
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, ModulesToSaveWrapper, register_peft_method
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from svf import decompose, spectral
from svf.decompose import DecompositionOptions, Matrix, side_of
from svf.mix import Mix, Mixing, Replay

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
    weight is made in every forward; for reference and for weights that no input can be rescaled for."""
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
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
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
        DecompositionOptions.of(self.decomposition)
        sigmoid = self.parametrization == "sigmoid"
        self.init = (0.1 if sigmoid else 0.0) if self.init is None else self.init
        self.init_std = (0.01 if sigmoid else 0.0) if self.init_std is None else self.init_std

    def to_dict(self) -> dict[str, Any]:
        """Without what belongs to this machine or to one loading alone."""
        return {key: value for key, value in super().to_dict().items() if key not in ("decomposition", "check_basis")}


# ----------------------------------------------------------------------------------------------------------------------
# Layers


@dataclass
class _Expert:
    """How one adapter's z is to be read in one layer."""

    config: SVFConfig
    kept: dict[str, int]
    """Directions adapted, by parameter."""


class SVFLayer(nn.Module, BaseTunerLayer):
    """What all adapted layers share. Its parameters (`names`) each have a z for every adapter and one basis for all.

    z lives in a `ParameterDict` `svf_z` (or `svf_z_<parameter>` in a `ParamWrapper`), in fp32 whatever the model is
    cast to. Bases are buffers that are not saved.
    """

    adapter_layer_names: tuple[str, ...] = ("svf_z",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str, key: str, mixing: Mixing):
        super().__init__()
        self.base_layer = base_layer
        self.key = key
        self.mixing = mixing
        self.experts: dict[str, _Expert] = {}
        self.merged_adapters: list[str] = []
        self.unmerged: dict[str, Tensor] = {}  # the base's own tensors while others stand in for them
        self.digests: dict[str, str] = {}
        self.mixed_last = False
        self.routed = re.search(r"(^|\.)experts?\.\d+(\.|$)", key) is not None
        self._disable_adapters = False
        self._active_adapter = adapter_name

    # What a kind of layer says about itself

    def names(self) -> list[str]:
        """Names of the adapted parameters of the base layer."""
        return ["weight"]

    def as_matrix(self, name: str, weight: Tensor) -> Tensor:
        """A parameter as it is stored -> (..., n_out, n_in), a view."""
        return weight

    def as_stored(self, name: str, matrix: Tensor) -> Tensor:
        return matrix

    def z(self, name: str) -> nn.ParameterDict:
        return self.svf_z

    def basis(self, name: str) -> Tensor | None:
        """Q (..., N, K)."""
        return self.svf_basis

    def values(self, name: str) -> Tensor | None:
        return self.svf_values

    def side(self, name: str) -> str:
        return side_of(self.matrix_shape(name))

    # Adapters

    def parameter(self, name: str) -> Tensor:
        """The base's own tensor, also while a merged one stands in for it."""
        return self.unmerged.get(name, getattr(self.get_base_layer(), name))

    def matrix_shape(self, name: str) -> tuple[int, ...]:
        parameter = self.parameter(name)
        return tuple(self.as_matrix(name, torch.empty(parameter.shape, device="meta")).shape)

    def update_layer(self, adapter_name: str, config: SVFConfig, names: Sequence[str] | None = None) -> None:
        """Adds an adapter. Its basis comes later, with those of all layers."""
        expert = self.experts.setdefault(adapter_name, _Expert(config, {}))
        for name in names or self.names():
            *stack, n_out, n_in = self.matrix_shape(name)
            kept = min(n_out, n_in, config.top_k or n_out)
            expert.kept[name] = kept
            device = self.parameter(name).device
            z = torch.full((*stack, kept), config.init, dtype=torch.float32, device=device)
            if config.init_std:
                z += config.init_std * torch.randn(z.shape).to(device)
            self.z(name)[adapter_name] = nn.Parameter(z)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        self.experts.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def matrix(self, name: str) -> Matrix:
        """What to decompose for a parameter."""
        return Matrix(
            f"{self.key}.{name}",
            self.matrix_shape(name),
            lambda: self.parameter(name),
            functools.partial(self.as_matrix, name),
        )

    def wanted(self, name: str) -> int:
        """Directions that the basis of a parameter must have."""
        return max((expert.kept.get(name, 0) for expert in self.experts.values()), default=0)

    def set_basis(self, name: str, basis: decompose.Basis) -> None:
        device = self.parameter(name).device
        self.svf_basis = basis.vectors.to(device)
        self.svf_values = basis.values.to(device, torch.float32)

    def _apply(self, fn, recurse: bool = True):
        """z and singular values follow to another device, but not to another precision."""
        exact = {name: tensor for name, tensor in self._exact_tensors() if not tensor.is_meta}
        before = {name: tensor.detach() for name, tensor in exact.items()}
        super()._apply(fn, recurse)
        for name, tensor in self._exact_tensors():
            if name in before and tensor.dtype != torch.float32 and tensor.is_floating_point():
                tensor.data = before[name].to(tensor.device)
        return self

    def _exact_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.named_parameters():
            if name.startswith("svf_"):
                yield name, parameter
        for name, buffer in self.named_buffers(recurse=False):
            if name.startswith("svf_values"):
                yield name, buffer

    # Shifts

    def shift_of(self, adapter_name: str, name: str = "weight") -> Tensor:
        """d = e - 1 of one adapter, fp32 (..., K), zero along directions that it does not adapt."""
        basis, values = self.basis(name), self.values(name)
        if basis is None:
            raise RuntimeError(f"{self.key} has no basis, its weight was on the meta device; call model.decompose()")
        expert = self.experts.get(adapter_name)
        if expert is None or name not in expert.kept:
            return values.new_zeros(values.shape)
        kept, config = expert.kept[name], expert.config
        z = self.z(name)[adapter_name]
        d = spectral.shift(z, values[..., :kept], config.parametrization, config.normalize, config.max_mult)
        return d if kept == values.shape[-1] else F.pad(d, (0, values.shape[-1] - kept))

    def total_shift(self, adapter_names: Sequence[str], name: str = "weight") -> Tensor | None:
        """Sum over adapters, None where none of them adapts this layer."""
        total = None
        for adapter in adapter_names:
            if adapter in self.experts and name in self.experts[adapter].kept:
                d = self.shift_of(adapter, name)
                total = d if total is None else total + d
        return total

    def shift_for(self, x: Tensor, name: str = "weight") -> Tensor | None:
        """d for an input: of the active adapters (K,), or of the mixture, then with as many axes as x where it differs.

        Raises:
            RuntimeError: where a checkpointed forward is recomputed without the mixture that it ran with.
        """
        mix = self.mixing.active
        if mix is None:
            if self.mixed_last and not self.mixing.replaying and torch._C._current_graph_task_id() != -1:
                raise RuntimeError(
                    "a checkpointed forward under a mixture is recomputed without it; call backward inside `with "
                    "model.mix(...)`, or use the model's own gradient_checkpointing_enable"
                )
            if self.mixed_last:
                self.mixed_last = False
            return self.total_shift(self.active_adapters, name)
        if not self.mixed_last:
            self.mixed_last = True
        experts = self.experts
        here = [i for i, one in enumerate(mix.names) if one in experts and name in experts[one].kept]
        if not here:
            return None
        shifts = torch.stack([self.shift_of(mix.names[i], name) for i in here])
        if not mix.per_row:
            weights = mix.weights
        else:
            self.check_rows()
            weights = mix.for_input(x, self.key)
        if len(here) < len(mix.names):
            weights = weights[..., here]
        weights = weights.to(shifts.device, torch.float32)
        if shifts.ndim > 2:  # stacks of experts, one mixture
            return torch.tensordot(weights, shifts, dims=1)
        return weights @ shifts

    def check_rows(self) -> None:
        """Raises ValueError where the rows of a batch do not reach this layer in their order."""
        if self.routed:
            raise ValueError(
                f"{self.key} sees tokens in its router's order, so rows cannot be mixed there; leave it out of "
                "target_modules, or give one mixture for all rows"
            )

    @property
    def form(self) -> str:
        for name in self.active_adapters:
            if name in self.experts:
                form = self.experts[name].config.form
                return "one_sided" if form == "auto" else form
        return "one_sided"

    # Merging

    def get_delta_weight(self, adapter: str, name: str = "weight") -> Tensor:
        """W' - W of one adapter, as the parameter is stored, in fp32."""
        return self.as_stored(name, self._merged_matrix([adapter], name) - self._own_matrix(name))

    def _own_matrix(self, name: str) -> Tensor:
        own = self.parameter(name).data
        return self.as_matrix(name, own).to(torch.promote_types(own.dtype, torch.float32))

    def _merged_matrix(self, adapters: Sequence[str], name: str) -> Tensor:
        own = self._own_matrix(name)
        d = self.total_shift(adapters, name)
        return own if d is None else spectral.compose(own, self.basis(name).to(own.dtype), d.detach(), self.side(name))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the adapted weight in the base's place; its own tensor is kept, so that unmerging restores every bit.

        Raises:
            ValueError: where the base is quantised, or `safe_merge` and the adapted weight is not finite.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        adapter_names = [name for name in adapter_names if name in self.experts]
        if not adapter_names:
            return
        merged = [*self.merged_adapters, *adapter_names]
        standing_in = {}
        for name in self.names():
            if self.total_shift(merged, name) is None:
                continue
            own = self.parameter(name)
            if is_quantized(self.get_base_layer()):
                raise ValueError(
                    f"{self.key} is quantised and cannot take a merged weight; merge into the unquantised checkpoint "
                    "with python -m svf merge"
                )
            adapted = self.as_stored(name, self._merged_matrix(merged, name)).to(own.dtype)
            if safe_merge and not torch.isfinite(adapted).all():
                raise ValueError(f"the weight of {self.key} merged with {', '.join(merged)} is not finite")
            standing_in[name] = adapted.contiguous()
        for name, adapted in standing_in.items():
            parameter = getattr(self.get_base_layer(), name)
            self.unmerged.setdefault(name, parameter.data)
            parameter.data = adapted
        self.merged_adapters = merged

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for name, own in self.unmerged.items():
            parameter = getattr(self.get_base_layer(), name)
            parameter.data = own.to(parameter.device, parameter.dtype)
        self.unmerged, self.merged_adapters = {}, []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    # Forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            if self.mixing.active is not None:
                raise ValueError("a mixture needs the base's own weights; call unmerge_adapter() first")
            return self.base_layer(x, *args, **kwargs)
        return self.adapted(x, *args, **kwargs)

    def adapted(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __repr__(self) -> str:
        return "svf." + super().__repr__()


class SVFLinear(SVFLayer):
    """nn.Linear, GPT-2's Conv1D (weight stored transposed), or a quantised linear layer."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, key: str, mixing: Mixing):
        super().__init__(base_layer, adapter_name, key, mixing)
        self.svf_z = nn.ParameterDict({})
        self.fan_in_fan_out = type(base_layer) is Conv1D
        self.in_features, self.out_features = linear_features(base_layer)
        for name in ("svf_basis", "svf_values", "svf_down", "svf_up"):
            self.register_buffer(name, None, persistent=False)

    def matrix_shape(self, name: str) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def as_matrix(self, name: str, weight: Tensor) -> Tensor:
        return weight.mT if self.fan_in_fan_out else weight

    as_stored = as_matrix

    def set_basis(self, name: str, basis: decompose.Basis) -> None:
        super().set_basis(name, basis)
        self.svf_down = self.svf_up = None

    def adapted(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        d = self.shift_for(x)
        if d is None:
            return self.base_layer(x, *args, **kwargs)
        form = self.form
        if form == "merged" and d.ndim == 1:
            return F.linear(x, self._composed(d), self.bias)
        if form == "factored":
            return self._factored(x, d)
        if self.out_features >= self.in_features:
            return self.base_layer(spectral.rescale(x, self.svf_basis, d), *args, **kwargs)
        return spectral.rescale(self.base_layer(x, *args, **kwargs), self.svf_basis, d, self.bias)

    def _composed(self, d: Tensor) -> Tensor:
        weight = self.as_matrix("weight", self.parameter("weight"))
        return spectral.compose(weight, self.svf_basis.to(weight.dtype), d, self.side("weight"))

    def _factored(self, x: Tensor, d: Tensor) -> Tensor:
        if self.svf_down is None:
            own, basis = self._own_matrix("weight"), self.svf_basis
            down, up = spectral.factors(own, basis.to(own.dtype), self.side("weight"))
            self.svf_down, self.svf_up = (part.to(basis.dtype).contiguous() for part in (down, up))
        if self.svf_basis.shape[-1] < min(self.in_features, self.out_features):  # truncated: add to the base's output
            return self.base_layer(x) + spectral.factored(x, self.svf_down, self.svf_up, d, None)
        return spectral.factored(x, self.svf_down, self.svf_up, 1 + d, self.bias)


class SVFConv2d(SVFLayer):
    """nn.Conv2d, its weight seen as (out, in * kh * kw). Output channels are rescaled; the weight where grouped."""

    def __init__(self, base_layer: nn.Conv2d, adapter_name: str, key: str, mixing: Mixing):
        super().__init__(base_layer, adapter_name, key, mixing)
        self.svf_z = nn.ParameterDict({})
        for name in ("svf_basis", "svf_values"):
            self.register_buffer(name, None, persistent=False)

    def as_matrix(self, name: str, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def as_stored(self, name: str, matrix: Tensor) -> Tensor:
        return matrix.view(self.base_layer.weight.shape)

    def side(self, name: str) -> str:
        return "out"

    def set_basis(self, name: str, basis: decompose.Basis) -> None:
        """The output side also where it is the longer one: U = W V / s, without the directions that W does not have."""
        if side_of(self.matrix_shape(name)) == "in":
            vectors, values = basis.vectors.double(), basis.values.double()
            there = values > 1e-7 * values.max()
            w = self.as_matrix(name, self.parameter(name)).to(vectors)
            u = (w @ vectors) / torch.where(there, values, torch.inf)
            basis = decompose.Basis(u.to(basis.vectors.dtype), basis.values)
        super().set_basis(name, basis)

    def check_rows(self) -> None:
        if self.base_layer.groups > 1:
            raise ValueError(
                f"{self.key} is a grouped convolution, where rows cannot be mixed; leave it out of target_modules, or "
                "give one mixture for all rows"
            )

    def adapted(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        if self.mixing.active is not None and self.mixing.active.per_row:
            # the mixture is told by rows of x; what is rescaled has its channels last
            d = self.shift_for(x.movedim(1, -1))
        else:
            d = self.shift_for(x)
        if d is None:
            return base(x)
        if base.groups > 1 or (self.form == "merged" and d.ndim == 1):
            weight = base.weight
            adapted = spectral.compose(weight.flatten(1), self.svf_basis.to(weight.dtype), d, "out")
            return base._conv_forward(x, adapted.view(weight.shape), base.bias)
        y = base(x)
        out = spectral.rescale(y.movedim(1, -1), self.svf_basis, d, base.bias).movedim(-1, 1)
        # as the base lays it out: the convolutions that follow choose their algorithm, and its rounding, by that
        return out.contiguous() if y.is_contiguous() else out


class ParamWrapper(SVFLayer):
    """Parameters of a module that reads them itself; stacks (E, n, m) are E matrices, each with its own z and basis.

    The adapted weights are made in every forward and stand in for the parameters while the module runs. PEFT tells
    this kind of layer by the name of its class.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, key: str, mixing: Mixing):
        super().__init__(base_layer, adapter_name, key, mixing)
        self.adapter_layer_names = ()
        self.parameter_name = ""

    def names(self) -> list[str]:
        return [name.removeprefix("svf_z_") for name in self.adapter_layer_names]

    def z(self, name: str) -> nn.ParameterDict:
        return getattr(self, f"svf_z_{name}")

    def basis(self, name: str) -> Tensor | None:
        return getattr(self, f"svf_basis_{name}")

    def values(self, name: str) -> Tensor | None:
        return getattr(self, f"svf_values_{name}")

    def set_basis(self, name: str, basis: decompose.Basis) -> None:
        device = self.parameter(name).device
        setattr(self, f"svf_basis_{name}", basis.vectors.to(device))
        setattr(self, f"svf_values_{name}", basis.values.to(device, torch.float32))

    def add_parameter(self, adapter_name: str, config: SVFConfig, name: str) -> None:
        """Adapts one more parameter of the module.

        Raises:
            ValueError: where it is no matrix or stack of matrices.
        """
        if self.parameter(name).ndim not in (2, 3):
            raise ValueError(f"{self.key}.{name} has {self.parameter(name).ndim} axes; only 2 and 3 can be adapted")
        if name not in self.names():
            setattr(self, f"svf_z_{name}", nn.ParameterDict({}))
            for kind in ("basis", "values"):
                self.register_buffer(f"svf_{kind}_{name}", None, persistent=False)
            self.adapter_layer_names = (*self.adapter_layer_names, f"svf_z_{name}")
        self.update_layer(adapter_name, config, [name])

    def check_rows(self) -> None:
        raise ValueError(
            f"{self.key} is adapted as a whole weight (target_parameters), where rows cannot be mixed; use one active "
            "adapter, or one mixture for all rows"
        )

    def adapted(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        composed = {}
        for name in self.names():
            d = self.shift_for(x, name)
            if d is not None:
                own = self.parameter(name)
                composed[name] = spectral.compose(own, self.basis(name).to(own.dtype), d, self.side(name))
        return torch.func.functional_call(self.base_layer, composed, (x, *args), kwargs)


# ----------------------------------------------------------------------------------------------------------------------
# Which modules can be adapted


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer's weight is held quantised by bitsandbytes (its layer types) or torchao (its tensor types)."""
    kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in (type(module), type(getattr(module, "weight", None)))]
    kinds += [f"{type(w.data).__module__}" for w in [getattr(module, "weight", None)] if isinstance(w, Tensor)]
    return any(kind.startswith(("bitsandbytes.", "torchao.")) for kind in kinds)


def linear_features(module: nn.Module) -> tuple[int, int]:
    """(in, out) features of a linear layer."""
    if type(module) is Conv1D:
        return tuple(module.weight.shape)
    return module.in_features, module.out_features


@functools.cache
def _reads_weight(kind: type, child: str) -> bool:
    """Whether the code of a class reads the weight of its child `child` itself, so that wrapping it does nothing.

    `nn.MultiheadAttention` does so with `out_proj`, `nn.TransformerEncoderLayer` with `linear1`, fused state-space
    layers with their projections. Looking at a weight's dtype or device is not reading it.
    """
    harmless = ("__init__", "_init_weights", "reset_parameters", "_reset_parameters", "extra_repr", "__setstate__")
    read = re.compile(rf"(?<!isinstance\()self\.{re.escape(child)}\.weight\b(?!\.(dtype|device|shape|size|ndim|is_))")
    for base in kind.__mro__:
        if base in (nn.Module, object) or base.__name__ in ("PreTrainedModel", "Sequential", "ModuleList"):
            continue
        for name, member in vars(base).items():
            if name in harmless or not inspect.isfunction(member):
                continue
            try:
                if read.search(inspect.getsource(member)):
                    return True
            except (OSError, TypeError):
                continue
    return False


@torch.no_grad()
def _is_linear(module: nn.Linear) -> bool:
    """Whether a linear layer, perhaps with a forward of its own, does what its weight and bias say."""
    if type(module).forward is nn.Linear.forward or is_quantized(module):
        return True
    if module.weight.is_meta:
        return False
    x = torch.randn(2, module.in_features).to(module.weight)
    out, expected = module(x), F.linear(x, module.weight, module.bias)
    return (
        isinstance(out, Tensor) and out.shape == expected.shape and torch.allclose(out, expected, rtol=0.05, atol=0.05)
    )


def _why_not(target: nn.Module, name: str, parent: nn.Module, owners: Mapping[int, list[str]]) -> str | None:
    """Why a matched module must be left alone, or None."""
    if isinstance(target, BaseTunerLayer):
        return f"adapted already by {type(target).__module__.split('.')[-2]}"
    if _reads_weight(type(parent), name):
        return f"{type(parent).__name__} reads its weight itself"
    if isinstance(target, nn.Linear) and not _is_linear(target):
        return f"{type(target).__name__} is more than a linear layer"
    sharing = owners.get(id(getattr(target, "weight", None)), [])
    return f"tied: its weight is {' and '.join(sharing)}" if len(sharing) > 1 else None


def _layer_type(target: nn.Module) -> type[SVFLayer] | None:
    if isinstance(target, nn.Linear) or type(target) is Conv1D:
        return SVFLinear
    return SVFConv2d if type(target) is nn.Conv2d else None


# ----------------------------------------------------------------------------------------------------------------------
# Model


class SVFModel(BaseTuner):
    """A model with SVF adapters, what `get_peft_model(model, SVFConfig(...))` puts around the base."""

    prefix = "svf_"
    tuner_layer_cls = SVFLayer
    target_module_mapping = TARGETS

    def __init__(self, model: nn.Module, config: Any, adapter_name: str, **kwargs: Any):
        nn.Module.__init__(self)
        self.mixing = Mixing()
        self.skipped: dict[str, str] = {}
        """Matched modules that were left alone, and why."""
        self._owners: dict[int, list[str]] = {}
        super().__init__(model, config, adapter_name, **kwargs)
        self._hook = self.model.register_forward_pre_hook(self.mixing.see, with_kwargs=True)
        self._bring_mixtures_along()

    def layers(self) -> Iterator[SVFLayer]:
        for module in self.model.modules():
            if isinstance(module, SVFLayer):
                yield module

    # Injection

    def _prepare_adapter_config(self, peft_config: SVFConfig, model_config: dict) -> SVFConfig:
        targets = peft_config.target_modules
        if targets is None and peft_config.target_parameters:
            peft_config.target_modules = set()
            return peft_config
        if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            linear = all_linear(self.model)
            if peft_config.layers_to_transform is not None:  # PEFT does not count layers of full names
                ends = replace(peft_config, target_modules={name.rpartition(".")[2] for name in linear})
                linear = {name for name in linear if check_target_module_exists(ends, name)}
                peft_config.target_modules = linear
                peft_config.layers_to_transform = peft_config.layers_pattern = None
            elif not isinstance(self.model, PreTrainedModel):  # which PEFT before 0.20 refuses
                peft_config.target_modules = linear
            return peft_config
        if targets is None and model_config.get("model_type") not in TARGETS:
            raise ValueError(
                f"{model_config.get('model_type', 'this model')!r} has no default targets; give target_modules"
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wraps the targets, decomposes their weights and compares their identity with the adapter's.

        Raises:
            ValueError: where no target could be adapted, or the adapter belongs to another base.
        """
        self.skipped = {}
        self._owners = _parameter_owners(model)
        config = self.peft_config[adapter_name]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self.skipped:
            listed = "; ".join(f"{name} ({why})" for name, why in self.skipped.items())
            warnings.warn(f"SVF left alone: {listed}", stacklevel=3)
        adapted = [layer for layer in self.layers() if adapter_name in layer.experts]
        if not adapted and self.skipped:
            raise ValueError(f"no target of adapter {adapter_name!r} can be adapted; see the warning for the reasons")
        if config.revision is None:
            config.revision = getattr(getattr(model, "config", None), "_commit_hash", None)
        if all(not layer.parameter(name).is_meta for layer in adapted for name in layer.names()):
            self.decompose(adapter_name)
        self._bring_mixtures_along()

    def _create_and_replace(
        self,
        peft_config: SVFConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if parameter_name is not None:
            self._wrap_parameter(peft_config, adapter_name, target, target_name, parent, current_key, parameter_name)
            return
        if isinstance(target, SVFLayer) and not isinstance(target, ParamWrapper):
            target.update_layer(adapter_name, peft_config)
            return
        if why := _why_not(target, target_name, parent, self._owners):
            self.skipped[current_key] = why
            return
        kind = _layer_type(target)
        if kind is None:
            raise ValueError(
                f"{current_key} is a {type(target).__name__}; SVF adapts Linear, Conv1D (GPT-2) and Conv2d "
                "modules, and other parameters through target_parameters"
            )
        if is_quantized(target) and peft_config.form in ("factored", "merged"):
            raise ValueError(f"{current_key} is quantised, form={peft_config.form!r} needs its weight; use one_sided")
        layer = kind(target, adapter_name, current_key, self.mixing)
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # everything is where it belongs, also for modules without a weight

    def _wrap_parameter(self, config, adapter_name, target, target_name, parent, key, parameter_name) -> None:
        layer = next((part for part in (target, parent) if isinstance(part, ParamWrapper)), None)
        if layer is None:
            layer = ParamWrapper(target, adapter_name, key.removesuffix(f".{parameter_name}"), self.mixing)
            layer.add_parameter(adapter_name, config, parameter_name)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        else:
            layer.add_parameter(adapter_name, config, parameter_name)

    def decompose(self, adapter_name: str | None = None) -> None:
        """Gives every layer the basis that it lacks, and checks (or notes) what base an adapter belongs to.

        Called on injection; to be called by hand only where the base was on the meta device then.

        Raises:
            ValueError: where an adapter belongs to another base.
        """
        adapters = list(self.peft_config) if adapter_name is None else [adapter_name]
        options = DecompositionOptions.of(self.peft_config[adapters[0]].decomposition)
        parts = [(layer, name) for layer in self.layers() for name in layer.names() if layer.wanted(name)]
        lacking = []
        for layer, name in parts:
            basis = layer.basis(name)
            if basis is None or basis.shape[-1] < layer.wanted(name):
                lacking.append((layer, name))
        matrices = [layer.matrix(name) for layer, name in lacking]
        if any(is_quantized(layer.get_base_layer()) for layer, _ in lacking):
            matrices = self._from_checkpoint(matrices, options)
        unknown = [i for i, (layer, name) in enumerate(lacking) if name not in layer.digests]
        for i, found in zip(unknown, decompose.digests([matrices[i] for i in unknown]), strict=True):
            lacking[i][0].digests[lacking[i][1]] = found
        for adapter in adapters:
            self._check_base(adapter)
        kept = [layer.wanted(name) for layer, name in lacking]
        known = [layer.digests[name] for layer, name in lacking]
        for (layer, name), basis in zip(lacking, decompose.bases(matrices, options, known, kept), strict=True):
            layer.set_basis(name, basis)

    def _from_checkpoint(self, matrices: list[Matrix], options: DecompositionOptions) -> list[Matrix]:
        where = options.checkpoint or getattr(getattr(self.model, "config", None), "_name_or_path", None)
        try:
            tensors = decompose.checkpoint_tensors(where or "the base")
        except FileNotFoundError:
            raise ValueError(
                "the base is quantised, its bases come from the unquantised weights: give their folder as "
                "decomposition={'checkpoint': FOLDER}"
            ) from None
        return [decompose.in_checkpoint(matrix, tensors) for matrix in matrices]

    def _check_base(self, adapter_name: str) -> None:
        config = self.peft_config[adapter_name]
        found = {
            f"{layer.key}.{name}": layer.digests[name]
            for layer in self.layers()
            if adapter_name in layer.experts
            for name in layer.experts[adapter_name].kept
        }
        here = decompose.basis_hash(found)
        if config.basis_hash is None:
            config.basis_hash = here
        elif config.basis_hash != here and config.check_basis:
            made_for = config.base_model_name_or_path or "another model"
            at = f", revision {config.revision}" if config.revision else ""
            mine = getattr(getattr(self.model, "config", None), "_name_or_path", None) or type(self.model).__name__
            raise ValueError(
                f"expert {adapter_name!r} was made for {made_for}{at} (basis {config.basis_hash[:12]}), this base is "
                f"{mine} (basis {here[:12]}): load it onto its own base in the same precision, or set "
                "check_basis=False in its configuration"
            )

    # Experts

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        space: Literal["effective", "published"] = "effective",
    ) -> None:
        """A new expert from others, an ordinary one (residual, no normalisation).

        Args:
            adapters: names of the experts to mix.
            weights: one number for each.
            adapter_name: name of the new one.
            space: "effective" mixes what happens to the singular values, e = 1 + sum w (e_k - 1); "published" mixes
                the sigmoids of sigmoid experts and normalises once, as the published few-shot adaptation means to.

        Raises:
            ValueError: for unknown or too few names, a name that is taken, or experts that cannot be mixed so.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already; delete it or choose another name")
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"there is no adapter {unknown[0]!r}; there are {', '.join(self.peft_config)}")
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(f"{len(adapters)} adapters need as many weights, got {len(weights)}")
        configs = [self.peft_config[name] for name in adapters]
        kinds = {(c.parametrization, c.normalize, c.max_mult) for c in configs}
        if space == "published" and (len(kinds) > 1 or configs[0].parametrization != "sigmoid"):
            raise ValueError("the published space mixes sigmoid experts of one normalisation; use space='effective'")
        if space not in ("effective", "published"):
            raise ValueError(f"space={space!r} is none of effective, published")
        saved = [m for m in self.model.modules() if isinstance(m, ModulesToSaveWrapper)]
        if any(sum(name in m.modules_to_save for name in adapters) > 1 for m in saved):
            raise ValueError("experts that both saved the same module in full (modules_to_save) cannot be mixed")

        layers = [layer for layer in self.layers() if any(name in layer.experts for name in adapters)]
        keys = {layer.key for layer in layers if not isinstance(layer, ParamWrapper)}
        parameters = {f"{layer.key}.{n}" for layer in layers if isinstance(layer, ParamWrapper) for n in layer.names()}
        whole = [c.top_k for c in configs]
        self.peft_config[adapter_name] = replace(
            configs[0],
            target_modules=keys,
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            target_parameters=sorted(parameters) or None,
            parametrization="residual",
            normalize="none",
            init=0.0,
            init_std=0.0,
            top_k=None if None in whole else max(whole),
            basis_hash=None,
        )
        self.inject_adapter(self.model, adapter_name)
        for layer in layers:
            for name, kept in layer.experts[adapter_name].kept.items():
                with torch.no_grad():
                    mixed = self._mixed(layer, name, adapters, weights, space)
                    layer.z(name)[adapter_name].copy_(mixed[..., :kept])

    def _mixed(self, layer: SVFLayer, name: str, adapters, weights, space: str) -> Tensor:
        if space == "effective":
            return sum(w * layer.shift_of(adapter, name) for adapter, w in zip(adapters, weights, strict=True))
        config = self.peft_config[adapters[0]]
        values = layer.values(name)
        mean = torch.zeros_like(values)
        for adapter, weight in zip(adapters, weights, strict=True):
            if adapter in layer.experts:
                sigmoid = torch.sigmoid(layer.z(name)[adapter].float()) * config.max_mult
                mean += weight * F.pad(sigmoid, (0, values.shape[-1] - sigmoid.shape[-1]))
        return spectral.shift(mean - 1, values, "residual", config.normalize, 1.0)

    def delete_adapter(self, adapter_name: str) -> None:
        if self.mixing.wanted is not None:
            raise ValueError("adapters cannot be deleted inside a mixture; leave its block first")
        super().delete_adapter(adapter_name)

    # Mixtures

    @contextmanager
    def mix(self, weights: Tensor | Mapping[str, float] | Sequence) -> Iterator[None]:
        """While the block lasts, every row (or token) of a batch has its own mixture of experts, in training too.

        The effective multiplier of a singular value is 1 + sum w (e_k - 1): weights of zero are the base. Gradients go
        to the experts' z, where they are trainable (`set_requires_grad`), and to the weights.

        Args:
            weights: (experts,) for all rows, (rows, experts) or (rows, tokens, experts), columns in the order in which
                the experts were added; or a dict, expert -> number, for all rows.

        Raises:
            ValueError: for an unknown name, or a number of experts, rows or tokens that is not the model's; where an
                adapter saved whole modules.
        """
        names = tuple(self.peft_config)
        if isinstance(weights, Mapping):
            if unknown := [name for name in weights if name not in names]:
                raise ValueError(f"there is no adapter {unknown[0]!r}; there are {', '.join(names)}")
            weights = torch.tensor([float(weights.get(name, 0.0)) for name in names])
        elif not isinstance(weights, Tensor):
            weights = torch.tensor(weights, dtype=torch.float32)
        if weights.ndim not in (1, 2, 3) or weights.shape[-1] != len(names):
            raise ValueError(
                f"weights of shape {tuple(weights.shape)} do not fit {len(names)} experts ({', '.join(names)}): give "
                "(experts,), (rows, experts) or (rows, tokens, experts)"
            )
        if saved := [name for name in names if self.peft_config[name].modules_to_save]:
            raise ValueError(
                f"{saved[0]!r} has modules of its own (modules_to_save), which cannot be mixed; delete it first"
            )
        parameter = next(self.model.parameters(), weights)
        mixture = Mix(names, weights.to(parameter.device))
        self._bring_mixtures_along()
        with self.mixing.use(mixture), self._generating():
            yield

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """Inside the model's `generate`, rows may have been repeated (beams, several sequences from one prompt)."""
        generate = getattr(self.model, "generate", None)
        if generate is None:
            yield
            return

        @functools.wraps(generate)
        def repeated(*args: Any, **kwargs: Any) -> Any:
            self.mixing.repeated = True
            try:
                return generate(*args, **kwargs)
            finally:
                self.mixing.repeated = False

        self.model.generate = repeated
        try:
            yield
        finally:
            del self.model.generate

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """`adapter_names=[...]` of PEFT: one expert for every row, `__base__` for none."""
        chosen = kwargs.get("adapter_names")
        if chosen is None:
            yield
            return
        names = list(self.peft_config)
        if unknown := [name for name in chosen if name not in names and name != "__base__"]:
            raise ValueError(f"there is no adapter {unknown[0]!r}; there are __base__, {', '.join(names)}")
        weights = torch.tensor([[float(name == row) for name in names] for row in chosen])
        with self.mix(weights):
            yield

    def _bring_mixtures_along(self) -> None:
        for module in self.model.modules():
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if checkpoint is not None and not isinstance(checkpoint, Replay):
                module._gradient_checkpointing_func = Replay(checkpoint, self.mixing)

    # Unloading

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        self._hook.remove()
        for module in self.model.modules():
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(checkpoint, Replay):
                module._gradient_checkpointing_func = checkpoint.checkpoint
        return unloaded

    def unload(self) -> nn.Module:
        for layer in self.layers():
            if layer.merged:
                layer.unmerge()
        return super().unload()


def all_linear(model: nn.Module) -> set[str]:
    """Names of all linear modules but a language model's head."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | SVFLinear) and module is not head and not name.endswith("base_layer")
    }


def _parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> names of all that hold it."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.replace(".base_layer.", "."))
    return owners


register_peft_method(name="svf", config_cls=SVFConfig, model_cls=SVFModel)
