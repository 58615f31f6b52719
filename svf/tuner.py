"""SVF as a PEFT method: `get_peft_model(model, SVFConfig(...))` adapts singular values and nothing else.

Every adapted weight W = U diag(s) Vᵀ gets a vector z, its singular values become e(z) * s (`svf.spectral`). What works
for LoRA works here: saving, loading, switching, disabling, merging, adding with weights, `adapter_names`; and a batch
may mix experts by row and by token, also in training (`SVFModel.mix`). Importing this module registers the method.

`SVFModel` finds the targets, wraps them (`svf.layers`), gives them their bases (`svf.decompose`) and mixes (`svf.mix`).
"""

import difflib
import functools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, ModulesToSaveWrapper, register_peft_method
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from svf import decompose, spectral
from svf.config import TARGETS, SVFConfig, common_form
from svf.decompose import DecompositionOptions, Matrix
from svf.layers import ParamWrapper, SVFConv2d, SVFLayer, SVFLinear, is_quantized
from svf.mix import Mix, Mixing, Replay
from svf.reads import reader

# ----------------------------------------------------------------------------------------------------------------------
# Which modules can be adapted


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


COMPUTED = "its weight is computed in every forward"


def _why_not(target: nn.Module, key: str, model: nn.Module, owners: Mapping[int, list[str]]) -> str | None:
    """Why a matched module must be left alone, or None."""
    if isinstance(target, BaseTunerLayer):
        return f"adapted already by {type(target).__module__.split('.')[-2]}"
    if by := reader(model, f"{key}.weight"):
        return f"{by} reads its weight itself"
    if _layer_type(target) is not None and "weight" not in target._parameters:
        return COMPUTED
    if isinstance(target, nn.Linear) and not _is_linear(target):
        return f"{type(target).__name__} is more than a linear layer"
    return _tied(getattr(target, "weight", None), owners)


def _why_not_parameter(target: nn.Module, name: str, key: str, model: nn.Module, owners) -> str | None:
    """Why a matched parameter (`name` of `target`, `key` from the model on) must be left alone, or None."""
    if isinstance(target, BaseTunerLayer):
        return f"adapted already by {type(target).__module__.split('.')[-2]}"
    if by := reader(model, key):
        return f"{by} reads its weight itself"
    if name not in target._parameters:
        return COMPUTED
    return _tied(getattr(target, name), owners)


def _tied(parameter: Any, owners: Mapping[int, list[str]]) -> str | None:
    sharing = owners.get(id(parameter), [])
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
        self._switched: list[SVFLayer] | None = None  # all layers; found when first needed
        self._alike: list[tuple[tuple[str, str], dict[str, Tensor], int]] | None = None  # see _layers_alike; likewise
        self._checkpointing: list[nn.Module] | None = None  # what may recompute its forward; likewise
        super().__init__(model, config, adapter_name, **kwargs)
        self._hook = self.model.register_forward_pre_hook(self._see, with_kwargs=True)
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
        self.skipped, self._switched, self._alike, self._checkpointing = {}, None, None, None
        self._owners = _parameter_owners(model)
        before = set(self.layers())
        try:
            self._inject(model, adapter_name, *args, **kwargs)
        except Exception:
            self._take_out(adapter_name, before)
            raise
        self._bring_mixtures_along()

    def _inject(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        _check_parameters(config.target_parameters or (), self._owners)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self.skipped:
            listed = "; ".join(f"{name} ({why})" for name, why in self.skipped.items())
            warnings.warn(f"SVF left alone: {listed}", stacklevel=4)
        adapted = [layer for layer in self.layers() if adapter_name in layer.experts]
        if not adapted and self.skipped:
            raise ValueError(f"no target of adapter {adapter_name!r} can be adapted; see the warning for the reasons")
        if config.revision is None:
            config.revision = getattr(getattr(model, "config", None), "_commit_hash", None)
        if all(not layer.parameter(name).is_meta for layer in adapted for name in layer.names()):
            self.decompose(adapter_name)

    def _take_out(self, adapter_name: str, before: set[SVFLayer]) -> None:
        """What an adapter that was refused has left in the model: its z, and layers that were made for it."""
        self._switched = self._alike = self._checkpointing = None
        for parent in list(self.model.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, SVFLayer) and layer not in before:
                    setattr(parent, name, layer.base_layer)
        for layer in before:
            if adapter_name in layer.experts:
                layer.delete_adapter(adapter_name)

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
        if why := _why_not(target, current_key, self.model, self._owners):
            self.skipped[current_key] = why
            return
        kind = _layer_type(target)
        if kind is None:
            raise ValueError(
                f"{current_key} is a {type(target).__name__}; SVF adapts Linear, Conv1D (GPT-2) and Conv2d "
                "modules, and other parameters through target_parameters"
            )
        layer = kind(target, adapter_name, current_key, self.mixing)
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # everything is where it belongs, also for modules without a weight

    def _wrap_parameter(self, config, adapter_name, target, target_name, parent, key, parameter_name) -> None:
        layer = next((part for part in (target, parent) if isinstance(part, ParamWrapper)), None)
        if layer is None or parameter_name not in layer.names():
            module = target if layer is None else layer.get_base_layer()
            if why := _why_not_parameter(module, parameter_name, key, self.model, self._owners):
                self.skipped[key] = why
                return
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
        self._alike = None

    def _from_checkpoint(self, matrices: list[Matrix], options: DecompositionOptions) -> list[Matrix]:
        where = options.checkpoint or getattr(getattr(self.model, "config", None), "_name_or_path", None)
        try:
            tensors = decompose.checkpoint_tensors(where or "the base", self.model)
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

    def _check_names(self, names: str | Sequence[str], also: Sequence[str] = ()) -> None:
        """Raises ValueError for an adapter that is not there."""
        there = [*also, *self.peft_config]
        if unknown := [name for name in ([names] if isinstance(names, str) else names) if name not in there]:
            raise ValueError(f"there is no adapter {unknown[0]!r}; there are {', '.join(there)}")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes adapters the active ones, and trainable unless `inference_mode`; all others are frozen.

        Raises:
            ValueError: for an unknown name.
        """
        self._check_names(adapter_name)
        if any(config.modules_to_save for config in self.peft_config.values()):
            super().set_adapter(adapter_name, inference_mode)
            return
        if self._switched is None:
            self._switched = list(self.layers())
        for layer in self._switched:  # not over all modules of the model, which takes longer than the rest
            if layer.merged:
                warnings.warn(
                    "Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2
                )
                layer.unmerge()
            layer.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

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
        self._check_names(adapters)
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(f"{len(adapters)} adapters need as many weights, got {len(weights)}")
        if not all(map(math.isfinite, weights)):
            raise ValueError(f"weights {', '.join(map(str, weights))} are not all finite")
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
            form=common_form(configs),
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

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        self._check_names(adapter_names)
        super().set_requires_grad(adapter_names, requires_grad)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_names(adapter_names or [])
        super().merge_adapter(adapter_names, safe_merge)

    def delete_adapter(self, adapter_name: str) -> None:
        if self.mixing.wanted is not None:
            raise ValueError("adapters cannot be deleted inside a mixture; leave its block first")
        self._alike = None
        super().delete_adapter(adapter_name)

    # Mixtures

    @contextmanager
    def mix(
        self, weights: Tensor | Mapping[str, float] | Sequence, layers: Mapping[str, int] | None = None
    ) -> Iterator[None]:
        """While the block lasts, every row (or token) of a batch has its own mixture of experts, in training too.

        The effective multiplier of a singular value is 1 + sum w (e_k - 1): weights of zero are the base. Gradients go
        to the experts' z, where they are trainable (`set_requires_grad`), and to the weights. Without gradients the
        mixture of frozen experts is made once for the block: leave it before you change them.

        Args:
            weights: (experts,) for all rows, (rows, experts) or (rows, tokens, experts), columns in the order in which
                the experts were added; or a dict, expert -> number, for all rows.
            layers: key of an adapted layer -> its place on an axis of weights before the last, for weights that differ
                by layer: (layers, experts) for all rows, or (rows, layers, experts).

        Raises:
            ValueError: for an unknown name or layer, or a number of experts, rows or tokens that is not the model's;
                where an adapter saved whole modules.
        """
        names = tuple(self.peft_config)
        if isinstance(weights, Mapping):
            self._check_names(list(weights))
            weights = torch.tensor([float(weights.get(name, 0.0)) for name in names])
        elif not isinstance(weights, Tensor):
            try:
                weights = torch.tensor(weights, dtype=torch.float32)
            except (TypeError, ValueError):
                raise ValueError(f"weights={weights!r} are neither numbers nor a dict of them by expert") from None
        if weights.ndim not in ((1, 2, 3) if layers is None else (2, 3)) or weights.shape[-1] != len(names):
            shapes = "(experts,), (rows, experts) or (rows, tokens, experts)"
            shapes = shapes if layers is None else "(layers, experts) or (rows, layers, experts)"
            raise ValueError(
                f"weights of shape {tuple(weights.shape)} do not fit {len(names)} experts ({', '.join(names)}): give "
                f"{shapes}"
            )
        if self._switched is None:
            self._switched = list(self.layers())
        keys = {layer.key: None for layer in self._switched}
        if unknown := [key for key in layers or () if key not in keys]:
            some = ", ".join([*list(keys)[:8], *(["..."] if len(keys) > 8 else [])])
            raise ValueError(f"there is no adapted layer {unknown[0]!r}; there are {some}")
        if saved := [name for name in names if self.peft_config[name].modules_to_save]:
            raise ValueError(
                f"{saved[0]!r} has modules of its own (modules_to_save), which cannot be mixed; delete it first"
            )
        parameter = next(self.model.parameters(), weights)
        nothing = not weights.requires_grad and not weights.any()
        mixture = Mix(names, weights.to(parameter.device), layers=layers, nothing=nothing)
        self._bring_mixtures_along()
        with self.mixing.use(mixture), self._generating():
            yield

    def _see(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model."""
        self.mixing.see(model, args, kwargs)
        if self.mixing.current is not None and not torch.is_grad_enabled():
            self._mix_together(self.mixing.current)

    def _mix_together(self, mix: Mix) -> None:
        """Makes the shifts of frozen experts for all layers at once, one product instead of one for every layer."""
        if mix.nothing or mix.layers is not None or mix.weights.ndim > 2 or mix.rows in mix.together:
            return
        made = mix.together[mix.rows] = {}
        configs = [self.peft_config[name] for name in mix.names]
        if any(config.normalize != "none" for config in configs):
            return
        if self._alike is None:
            self._alike = self._layers_alike()
        device = mix.weights.device
        here = [
            (place, zs, k)
            for place, zs, k in self._alike
            if not any(zs[name].requires_grad or zs[name].device != device for name in mix.names)
        ]
        if not here:
            return
        flat = ((torch.cat([zs[name] for _, zs, _ in here]), c) for name, c in zip(mix.names, configs, strict=True))
        shifts = torch.stack([spectral.shift(z, z, c.parametrization, "none", c.max_mult) for z, c in flat])
        parts = (mix.weights.float() @ shifts).split([k for _, _, k in here], dim=-1)
        made.update(zip((place for place, _, _ in here), parts, strict=True))

    def _layers_alike(self) -> list[tuple[tuple[str, str], dict[str, Tensor], int]]:
        """Matrices of which every expert adapts all directions: layer and parameter, z by expert, directions."""
        return [
            ((layer.key, name), layer.z(name)._parameters, k)
            for layer in self.layers()
            for name in layer.names()
            if (basis := layer.basis(name)) is not None and basis.ndim == 2
            for k in basis.shape[-1:]
            if all(one in layer.experts and layer.experts[one].kept.get(name) == k for one in self.peft_config)
        ]

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """Inside the model's `generate`, rows may have been repeated (beams, several sequences from one prompt).

        What the prompts themselves have of rows is compared before: later the two cannot be told apart.
        """
        generate = getattr(self.model, "generate", None)
        if generate is None:
            yield
            return

        @functools.wraps(generate)
        def repeated(*args: Any, **kwargs: Any) -> Any:
            named = [kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")]
            prompts = next((value for value in (*args[:1], *named) if isinstance(value, Tensor) and value.ndim), None)
            if prompts is not None and self.mixing.wanted is not None:
                self.mixing.wanted.for_batch(len(prompts), None, repeated=False)
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
        self._check_names(chosen, also=["__base__"])
        weights = torch.tensor([[float(name == row) for name in names] for row in chosen])
        with self.mix(weights):
            yield

    def _bring_mixtures_along(self) -> None:
        """Recomputation under gradient checkpointing uses the mixture of its forward, whenever it was switched on."""
        if self._checkpointing is None:
            can = "gradient_checkpointing"
            self._checkpointing = [m for m in self.model.modules() if can in vars(m) or hasattr(type(m), can)]
        for module in self._checkpointing:
            checkpoint = vars(module).get("_gradient_checkpointing_func")
            if checkpoint is not None and not isinstance(checkpoint, Replay):
                module._gradient_checkpointing_func = Replay(checkpoint, self.mixing)

    # Unloading

    def _unload_and_optionally_merge(self, *args: Any, adapter_names: list[str] | None = None, **kwargs) -> nn.Module:
        self._check_names(adapter_names or [])
        unloaded = super()._unload_and_optionally_merge(*args, adapter_names=adapter_names, **kwargs)
        self._hook.remove()
        for module in self.model.modules():
            checkpoint = vars(module).get("_gradient_checkpointing_func")
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


def _check_parameters(targets: Sequence[str], owners: Mapping[int, list[str]]) -> None:
    """Raises ValueError where no parameter's name is or ends in one of `targets`; PEFT asks only that one does."""
    names = [name for sharing in owners.values() for name in sharing]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = {".".join(name.split(".")[-1 - target.count(".") :]) for name in names}
            near = ", ".join(difflib.get_close_matches(target, sorted(ends), n=1))
            raise ValueError(
                f"target_parameters: no parameter is called {target!r}{f'; did you mean {near}?' if near else ''}"
            )


def _parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> names of all that hold it."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.replace(".base_layer.", "."))
    return owners


register_peft_method(name="svf", config_cls=SVFConfig, model_cls=SVFModel)
