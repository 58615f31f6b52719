"""Adapted layers: a base layer, z for every adapter, one basis for all of them.

SVFLayer            what all share: z, bases, shifts, merging
  SVFLinear         nn.Linear, GPT-2's Conv1D and quantised linear layers
  SVFConv2d         nn.Conv2d, its weight seen as (out, in * kh * kw)
  ParamWrapper      parameters of any module, 3-D ones as stacks of matrices (the experts of a mixture-of-experts)
"""

import functools
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from svf import decompose, spectral
from svf.config import SVFConfig
from svf.decompose import Matrix, side_of
from svf.mix import Mixing


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
    fan_in_fan_out = False  # whether weights are stored as (n_in, n_out)

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

    def forms(self) -> tuple[str, ...]:
        """How it can be computed, "auto" being the first."""
        return ("one_sided", "factored", "merged")

    # Adapters

    def parameter(self, name: str) -> Tensor:
        """The base's own tensor, also while a merged one stands in for it."""
        return self.unmerged.get(name, getattr(self.get_base_layer(), name))

    def matrix_shape(self, name: str) -> tuple[int, ...]:
        parameter = self.parameter(name)
        return tuple(self.as_matrix(name, torch.empty(parameter.shape, device="meta")).shape)

    def update_layer(self, adapter_name: str, config: SVFConfig, names: Sequence[str] | None = None) -> None:
        """Adds an adapter. Its basis comes later, with those of all layers.

        Raises:
            ValueError: where the layer cannot have the form that the configuration asks for.
        """
        if config.form not in ("auto", *self.forms()):
            raise ValueError(
                f"{self.key} cannot be computed with form={config.form!r}, only with {' or '.join(self.forms())}; use "
                "form='auto', which takes for every layer what it can have"
            )
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
            transposed=self.fan_in_fan_out,
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
        grad = torch.is_grad_enabled()
        if not grad:
            if mix.nothing:
                return None
            made = mix.shifts.get((self.key, name, x.ndim))
            if made is not None and (made.ndim == 1 or len(made) == len(x)):
                return made
            d = mix.made(self.key, name, x)
            if d is not None:
                if d.ndim > 1:
                    self.check_rows()
                return d
        experts = self.experts
        here = [i for i, one in enumerate(mix.names) if one in experts and name in experts[one].kept]
        if not here:
            return None
        shifts = torch.stack([self.shift_of(mix.names[i], name) for i in here])
        one = mix.at(self.key)
        if not mix.per_row:
            weights = one.weights
        else:
            self.check_rows()
            weights = one.for_input(x, self.key)
        if len(here) < len(mix.names):
            weights = weights[..., here]
        weights = weights.to(shifts.device, torch.float32)
        # stacks of experts know only one mixture
        d = torch.tensordot(weights, shifts, dims=1) if shifts.ndim > 2 else weights @ shifts
        rows_alone = one.weights.ndim == 2 and x.ndim > 2 and len(d) == len(x)
        if not grad and (not mix.per_row or rows_alone):
            frozen = not any(self.z(name)[mix.names[i]].requires_grad for i in here)
            if frozen:
                mix.shifts[self.key, name, x.ndim] = d
        return d

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
                return self.forms()[0] if form == "auto" else form
        return self.forms()[0]

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

    def forms(self) -> tuple[str, ...]:
        return ("one_sided",) if is_quantized(self.get_base_layer()) else super().forms()

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

    def change(self) -> Tensor | None:
        """W' - W, (n_out, n_in), of the active adapters or of one mixture for all rows; exactly 0 where d is. Costs one
        product forward and one backward. For code that needs the weight itself, as the recurrence of a CTM does.

        Raises:
            ValueError: where every row has a mixture of its own.
        """
        if self.mixing.active is not None and self.mixing.active.per_row:
            raise ValueError(f"{self.key} has no weight of its own while rows are mixed")
        d = self.shift_for(self.svf_basis)  # any tensor: what is the same for all rows does not look at it
        if d is None:
            return None
        down, up = self._factors()
        return (up * d.to(up.dtype)) @ down

    @torch.inference_mode(False)  # what is kept must be good for training, too
    @torch.no_grad()
    def _factors(self) -> tuple[Tensor, Tensor]:
        """(down, up) of `spectral.factors`, kept once made."""
        if self.svf_down is None:
            own, basis = self._own_matrix("weight"), self.svf_basis
            down, up = spectral.factors(own, basis.to(own.dtype), self.side("weight"))
            self.svf_down, self.svf_up = (part.to(basis.dtype).contiguous() for part in (down, up))
        return self.svf_down, self.svf_up

    def _factored(self, x: Tensor, d: Tensor) -> Tensor:
        down, up = self._factors()
        if self.svf_basis.shape[-1] < min(self.in_features, self.out_features):  # truncated: add to the base's output
            return self.base_layer(x) + spectral.factored(x, down, up, d, None)
        return spectral.factored(x, down, up, 1 + d, self.bias)


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

    def forms(self) -> tuple[str, ...]:
        return ("merged",) if self.get_base_layer().groups > 1 else ("one_sided", "merged")

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
        if self.form == "merged" and d.ndim == 1:
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

    def forms(self) -> tuple[str, ...]:
        return ("merged",)

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
