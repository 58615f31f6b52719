"""Experts as files and as algebra.

An expert is what `save_pretrained` writes: `adapter_model.safetensors` (z by parameter name) and `adapter_config.json`
(parametrisation, base and revision, basis hash). `Expert` handles one without its base model:

    math, code = Expert.load("math"), Expert.load("code")
    (0.6 * math + 0.4 * code).save("both")
    mix([math, code], [{"*.down_proj.*": 1.0, "*": 0.2}, 0.5]).save("by-layer")

`ExpertLibrary` holds any number of them beside one base model, for mixtures per request.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from safetensors.torch import save_file
from torch import Tensor, nn

from svf import decompose, spectral
from svf.config import SVFConfig, common_form
from svf.decompose import DecompositionOptions, Matrix
from svf.layers import ParamWrapper, SVFConv2d, SVFLayer, SVFLinear
from svf.tuner import SVFModel

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."

Weight = float | Mapping[str, float]
"""How much of an expert: a number, or numbers by pattern of parameter names, the first match counts."""


def check_folder(folder: str | Path) -> SVFConfig:
    """The configuration of the expert in a folder.

    Raises:
        FileNotFoundError: where it holds no expert.
        ValueError: where it holds an adapter of another kind, or a damaged one.
    """
    for name in (CONFIG, WEIGHTS):
        if not (Path(folder) / name).is_file():
            raise FileNotFoundError(f"{folder} is no expert: it has no {name}")
    try:
        kind = json.loads((Path(folder) / CONFIG).read_text()).get("peft_type")
    except (ValueError, AttributeError):
        raise ValueError(f"{Path(folder) / CONFIG} is no configuration of an adapter") from None
    if kind != "SVF":
        raise ValueError(f"{folder} is a {kind} adapter, not an SVF expert")
    with decompose.opened(Path(folder) / WEIGHTS):
        return SVFConfig.from_pretrained(str(folder))


@dataclass
class Expert:
    """z by parameter name (`model.layers.0.mlp.up_proj.weight`), and how it is to be read."""

    z: dict[str, Tensor]
    config: SVFConfig

    @classmethod
    def load(cls, folder: str | Path) -> "Expert":
        """Reads an adapter folder.

        Raises:
            FileNotFoundError: where it holds no expert.
            ValueError: where it holds an adapter of another kind, or one that saved whole modules with it.
        """
        config = check_folder(folder)
        folder = Path(folder)
        z = {}
        with decompose.opened(folder / WEIGHTS) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for key, tensor in tensors.items():
            if ".svf_z" in key and not key.rpartition(".")[2].startswith("svf_z"):
                continue  # PEFT before 0.20 wrote every adapter of the model into each one's file, by its name
            if ".svf_z" not in key:
                raise ValueError(f"{folder} also saved {key} in full; load it with PeftModel.from_pretrained")
            z[_parameter_name(key)] = tensor
        return cls(z, config)

    def save(self, folder: str | Path) -> None:
        """Writes an adapter folder that `PeftModel.from_pretrained` loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        whole = self.whole()
        tensors = {_key(name, name in whole): z.float().contiguous() for name, z in self.z.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        self.config.save_pretrained(str(folder))

    def whole(self) -> set[str]:
        """Names of parameters that are adapted as whole weights (`target_parameters`)."""
        ends = tuple(self.config.target_parameters or ())
        return {name for name in self.z if name.endswith(tuple(f".{end}" for end in ends)) or name in ends}

    def shifts(self) -> dict[str, Tensor]:
        """e - 1 by parameter name.

        Raises:
            ValueError: for a normalised expert, whose multipliers depend on the base's singular values.
        """
        c = self.config
        if c.normalize != "none":
            raise ValueError(
                f"this expert is normalised ({c.normalize}), its multipliers depend on its base: load it there and use "
                "add_weighted_adapter or svf.experts.from_model"
            )
        return {name: spectral.shift(z, z, c.parametrization, "none", c.max_mult) for name, z in self.z.items()}

    def __mul__(self, weight: Weight) -> "Expert":
        return mix([self], [weight])

    __rmul__ = __mul__

    def __add__(self, other: "Expert") -> "Expert":
        return mix([self, other], [1.0, 1.0])

    def __sub__(self, other: "Expert") -> "Expert":
        return mix([self, other], [1.0, -1.0])


def mix(experts: Sequence[Expert], weights: Sequence[Weight]) -> Expert:
    """e = 1 + sum w (e_k - 1), as an ordinary expert (residual, no normalisation).

    Args:
        experts: all of the same base.
        weights: one for each: a number, or numbers by pattern, such as {"*.layers.0.*": 0.5, "*": 1.0}.

    Raises:
        ValueError: for experts of different bases, normalised ones, or a parameter that no pattern matches.
    """
    if len(experts) != len(weights) or not experts:
        raise ValueError(f"{len(experts)} experts need as many weights, got {len(weights)}")
    first = experts[0].config
    same_names = all(expert.z.keys() == experts[0].z.keys() for expert in experts)
    for other in (expert.config for expert in experts[1:]):
        names = ("base_model_name_or_path", "revision", *(["basis_hash"] if same_names else []))
        if any((getattr(first, name) or None) != (getattr(other, name) or None) for name in names):
            raise ValueError(f"experts of different bases cannot be mixed: {_base(first)} and {_base(other)}")
    total: dict[str, Tensor] = {}
    for expert, weight in zip(experts, weights, strict=True):
        for name, d in expert.shifts().items():
            part = _weight_for(weight, name) * d
            if name in total and total[name].shape != part.shape:
                raise _different_directions()
            total[name] = total[name] + part if name in total else part
    if len({expert.config.top_k for expert in experts}) > 1:
        raise _different_directions()
    whole = set().union(*(expert.whole() for expert in experts))
    config = replace(
        first,
        target_modules={name.removesuffix(".weight") for name in total if name not in whole},
        target_parameters=sorted(whole) or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        parametrization="residual",
        normalize="none",
        init=0.0,
        init_std=0.0,
        form=common_form(expert.config for expert in experts),
        basis_hash=first.basis_hash if same_names else None,  # a union's is found when it is first loaded
    )
    return Expert(total, config)


def interpolate(a: Expert, b: Expert, t: float) -> Expert:
    """From a (t = 0) to b (t = 1)."""
    return mix([a, b], [1 - t, t])


def from_model(model: PeftModel | SVFModel, adapter_name: str = "default") -> Expert:
    """The expert of a loaded adapter, in effective multipliers: residual, whatever it was before.

    Raises:
        ValueError: for an unknown adapter, or one that saved whole modules with it.
    """
    layers = _layers(model, adapter_name)
    z = {
        f"{layer.key}.{name}": layer.shift_of(adapter_name, name)[..., :kept].detach().cpu().clone()
        for layer in layers
        for name, kept in layer.experts[adapter_name].kept.items()
    }
    return Expert(z, _effective(model.peft_config[adapter_name], layers))


def _effective(config: SVFConfig, layers: Sequence[SVFLayer], **changes: Any) -> SVFConfig:
    """The same for z that are e - 1 of these layers."""
    _check_z_is_all(config)
    return replace(
        config,
        parametrization="residual",
        normalize="none",
        init=0.0,
        init_std=0.0,
        target_modules={layer.key for layer in layers if not isinstance(layer, ParamWrapper)},
        target_parameters=[f"{x.key}.{n}" for x in layers if isinstance(x, ParamWrapper) for n in x.names()] or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        **changes,
    )


def _check_z_is_all(config: SVFConfig) -> None:
    """Raises ValueError where an adapter is more than its z."""
    if config.modules_to_save:
        raise ValueError(
            f"the adapter also saves {', '.join(config.modules_to_save)} in full (modules_to_save), which only "
            "save_pretrained keeps"
        )


def _weight_for(weight: Weight, name: str) -> float:
    if not isinstance(weight, Mapping):
        return weight
    for pattern, value in weight.items():
        if fnmatch(name, pattern):
            return value
    raise ValueError(f"no pattern of {', '.join(weight)} matches {name}; add '*' for all others")


def _different_directions() -> ValueError:
    return ValueError("experts of different top_k are mixed on their base: load them and use add_weighted_adapter")


def _base(config: SVFConfig) -> str:
    at = f" at {config.revision}" if config.revision else ""
    return f"{config.base_model_name_or_path or 'an unnamed base'}{at} (basis {(config.basis_hash or 'unknown')[:12]})"


def _parameter_name(key: str) -> str:
    """base_model.model.model.layers.0.mlp.up_proj.svf_z -> model.layers.0.mlp.up_proj.weight"""
    module, _, z = key.removeprefix(PREFIX).rpartition(".")
    return f"{module}.{z.removeprefix('svf_z').removeprefix('_') or 'weight'}"


def _key(name: str, whole: bool) -> str:
    module, _, parameter = name.rpartition(".")
    return f"{PREFIX}{module}.svf_z{f'_{parameter}' if whole else ''}"


def _layers(model: PeftModel | SVFModel, adapter_name: str) -> list[SVFLayer]:
    if adapter_name not in model.peft_config:
        raise ValueError(f"there is no adapter {adapter_name!r}; there are {', '.join(model.peft_config)}")
    return [m for m in model.modules() if isinstance(m, SVFLayer) and adapter_name in m.experts]


# ----------------------------------------------------------------------------------------------------------------------
# Experts beside one base, for mixtures per request

DISPATCH = "dispatch"
"""The expert that classifies requests; no mixture contains it unless it is asked for by name."""
RESERVED = (
    *("base", "auto", "other", "__base__"),
    *("prompt", "classifier", "few_shot", "few_shot_layers", "best_single", "shuffled", "lora"),
)
"""Names that strategies, kinds of requests and models served have."""

Mixture = str | Mapping[str, float] | Sequence[float] | Tensor | None
"""An expert by name, weights by name, weights in the library's order, or None for the base."""


class ExpertLibrary:
    """A base model and any number of experts of it, on its device, mixed per request without touching its weights.

    Args:
        model: the base, which gets the experts' layers put into it, or a PEFT model that has SVF adapters already.
        experts: folders, names on the Hub or `Expert`s: by name, or a list of folders, which are then called by the
            last part of their path.

    Raises:
        ValueError: for an expert of another base, or a name that cannot be used.
    """

    def __init__(
        self, model: nn.Module, experts: Mapping[str, Expert | str | Path] | Sequence[str | Path | Expert] = ()
    ):
        self.model = model
        self.changes = 0
        """How often experts have come or gone: what was made of them before is not good any more."""
        self._places: dict[str, int] | None = None
        if not isinstance(experts, Mapping):
            if unnamed := [expert for expert in experts if isinstance(expert, Expert)]:
                raise ValueError(f"{len(unnamed)} experts have no name: give them as {{name: expert}}")
            names = [Path(expert).name for expert in experts]
            if len(set(names)) < len(names):
                raise ValueError(f"two experts of one name among {', '.join(names)}: give them as {{name: folder}}")
            experts = dict(zip(names, experts, strict=True))
        for name, expert in experts.items():
            self.add(name, expert)

    @property
    def names(self) -> tuple[str, ...]:
        """All experts in the order of a mixture's weights."""
        return tuple(self.model.peft_config) if self._adapted else ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The experts that requests are answered with: all but the one that classifies them."""
        return tuple(name for name in self.names if name != DISPATCH)

    @property
    def _adapted(self) -> bool:
        return isinstance(self.model, PeftModel) and isinstance(self.model.base_model, SVFModel)

    @property
    def base(self) -> nn.Module:
        """The model itself, adapted layers inside."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def add(self, name: str, expert: Expert | str | Path) -> None:
        """Adds an expert, frozen; mixtures get one more weight, at the end.

        Raises:
            ValueError: for a name that is taken or cannot be used, or an expert of another base, which leaves the
                library as it was.
            FileNotFoundError: where there is none.
        """
        if name in self.names:
            raise ValueError(f"there is an expert {name!r} already; choose another name")
        if name in RESERVED or not name or "." in name:
            raise ValueError(
                f"an expert cannot be called {name!r}; choose another name, without a dot, that is none of "
                f"{', '.join(RESERVED)}"
            )
        if not isinstance(expert, Expert):
            expert = Expert.load(expert_folder(expert))
        config = replace(expert.config, init_std=0.0, inference_mode=True)
        before = self.model  # an adapter that is refused while it is put in leaves nothing there
        if self._adapted:
            before.add_adapter(name, config)
        else:
            kind = PeftModelForCausalLM if config.task_type == "CAUSAL_LM" else PeftModel
            self.model = kind(before, config, adapter_name=name)
        try:
            self._fill(name, expert)
        except ValueError:
            if self.model is before:
                before.delete_adapter(name)
            else:
                self.model = self.model.unload()
            raise
        self._changed()

    def remove(self, name: str) -> None:
        """Takes an expert out, and its weight out of mixtures.

        Raises:
            ValueError: for an unknown expert.
        """
        if name not in self.names:
            raise ValueError(f"there is no expert {name!r}; there are {', '.join(self.names) or 'none'}")
        if len(self.names) == 1:
            self.model = self.model.unload()
        else:
            kept = [other for other in self.names if other != name]
            self.model.base_model.set_adapter(kept[0], inference_mode=True)  # a deleted active one would wake another
            self.model.delete_adapter(name)
        self._changed()

    def _changed(self) -> None:
        self._places, self.changes = None, self.changes + 1

    @torch.no_grad()
    def _fill(self, name: str, expert: Expert) -> None:
        parts = {
            f"{layer.key}.{n}": layer.z(n)[name]
            for layer in _layers(self.model, name)
            for n in layer.experts[name].kept
        }
        if parts.keys() != expert.z.keys():
            here, there = sorted(parts.keys() - expert.z.keys()), sorted(expert.z.keys() - parts.keys())
            what = f"has nothing for {here[0]}" if here else f"adapts {there[0]}, which this model does not have"
            raise ValueError(f"expert {name!r} {what}")
        for key, z in parts.items():
            if z.shape != expert.z[key].shape:
                raise ValueError(
                    f"expert {name!r} has {tuple(expert.z[key].shape)} numbers for {key}, the base {tuple(z.shape)}"
                )
            z.copy_(expert.z[key])

    # Mixtures

    def weights(self, mixture: Mixture = None) -> Tensor:
        """A mixture as weights (experts,) or, where it differs by layer, (layers, experts).

        Raises:
            ValueError: for an unknown expert, or another number of weights.
        """
        if mixture is None or isinstance(mixture, str):
            mixture = {} if mixture is None or mixture == "base" else {mixture: 1.0}
        if isinstance(mixture, Mapping):
            if unknown := [name for name in mixture if name not in self.names]:
                raise ValueError(f"there is no expert {unknown[0]!r}; there are {', '.join(self.names) or 'none'}")
            return torch.tensor([float(mixture.get(name, 0.0)) for name in self.names])
        weights = torch.as_tensor(mixture, dtype=torch.float32)
        if weights.shape not in ((len(self.names),), (len(self.layers), len(self.names))):
            raise ValueError(
                f"weights of shape {tuple(weights.shape)} do not fit {len(self.names)} experts "
                f"({', '.join(self.names)}) and {len(self.layers)} layers"
            )
        return weights

    @property
    def layers(self) -> tuple[str, ...]:
        """What a mixture by layer has weights for: the model's numbered layers, and adapted modules beside them."""
        return tuple(dict.fromkeys(map(_numbered, self.places)))

    @property
    def places(self) -> dict[str, int]:
        """Key of an adapted layer -> its place among `layers`."""
        if self._places is None:
            keys = [layer.key for layer in self.model.base_model.layers()] if self._adapted else []
            groups = list(dict.fromkeys(map(_numbered, keys)))
            self._places = {key: groups.index(_numbered(key)) for key in keys}
        return self._places

    def batch(self, mixtures: Sequence[Tensor]) -> Tensor:
        """Weights of several requests -> (rows, experts), or (rows, layers, experts) where one differs by layer."""
        if any(weights.ndim > 1 for weights in mixtures):
            shape = len(self.layers), len(self.names)
            mixtures = [weights if weights.ndim > 1 else weights.expand(shape) for weights in mixtures]
        return torch.stack(list(mixtures)) if mixtures else torch.zeros(0, len(self.names))

    @contextmanager
    def mix(self, weights: Tensor) -> Iterator[None]:
        """While the block lasts, row i of a batch has mixture i of (rows, experts) or (rows, layers, experts)."""
        if not self.names:
            yield
            return
        by_layer = weights.ndim == 3
        one = len(weights) and bool((weights == weights[:1]).all())  # cheaper, and for a batch of any size
        with self.model.mix(weights[0] if one else weights, layers=self.places if by_layer else None):
            yield

    @torch.no_grad()
    def expert(self, mixture: Mixture) -> Expert:
        """A mixture as an ordinary expert (residual, no normalisation), to be saved or added."""
        weights = self.weights(mixture)
        chosen = [i for i in range(len(self.names)) if weights[..., i].any()] or [0]
        if not self.names:
            raise ValueError("the library has no experts to mix")
        names = [self.names[i] for i in chosen]
        layers = [m for m in self.model.base_model.layers() if any(name in m.experts for name in names)]
        z = {}
        kept = [self.model.peft_config[name].top_k for name in names]
        for layer in layers:
            place = self.places[layer.key]
            here = weights[place] if weights.ndim > 1 else weights
            for part in layer.names():
                d = sum(float(here[self.names.index(name)]) * layer.shift_of(name, part) for name in names)
                k = max(layer.experts[n].kept.get(part, 0) for n in names if n in layer.experts)
                if k:
                    z[f"{layer.key}.{part}"] = d[..., :k].cpu()
        first = self.model.peft_config[names[0]]
        hashes = {self.model.peft_config[name].basis_hash for name in names}
        changes = {
            "top_k": None if None in kept else max(kept),
            "basis_hash": hashes.pop() if len(hashes) == 1 else None,
            "form": common_form(self.model.peft_config[name] for name in names),
        }
        return Expert(z, _effective(first, layers, **changes))


def expert_folder(source: str | Path) -> Path:
    """Folder of an expert; one of the Hub is fetched first.

    Raises:
        FileNotFoundError: where it is neither a folder nor on the Hub, or the Hub cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    return _fetched(source, [CONFIG, WEIGHTS])


def _fetched(source: str | Path, patterns: list[str]) -> Path:
    """Folder of something on the Hub."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except (OSError, ValueError) as problem:
        why = type(problem).__name__
        raise FileNotFoundError(f"{source} is no folder, and could not be fetched from the Hub ({why})") from None


def _numbered(key: str) -> str:
    """model.layers.3.mlp.up_proj -> model.layers.3; keys without a number stay."""
    found = re.match(r"(.*?\.\d+)(\.|$)", key)
    return found[1] if found else key


# ----------------------------------------------------------------------------------------------------------------------
# Another base: singular values in the same order, vectors of its own


def transfer(expert: Expert, base: nn.Module, shuffle: int | None = None) -> Expert:
    """An expert of one model for another one of the same shapes (arXiv 2501.06252, cross-model compatibility).

    Weights of the same name get the same numbers; where names differ, the first `up_proj` gets those of the first, and
    so on. Whether this helps is to be measured: `shuffle` is the control.

    Args:
        expert: of the one model.
        base: the other one; its weights are not read.
        shuffle: seed for giving every layer the numbers of another one; in order if not given.

    Raises:
        ValueError: where the other model has not as many weights of these shapes.
    """
    shapes = {n.replace(".base_layer.", "."): p.shape for n, p in base.named_parameters() if p.ndim > 1}
    by_leaf: dict[str, list[str]] = {}
    for name in expert.z:
        by_leaf.setdefault(_leaf(name), []).append(name)
    whole, to = expert.whole(), {}
    for leaf, names in by_leaf.items():
        there = names if all(name in shapes for name in names) else [name for name in shapes if _leaf(name) == leaf]
        if len(there) != len(names):
            raise ValueError(f"the expert has {len(names)} vectors for {leaf}, the other model has {len(there)} of it")
        if shuffle is not None:
            there = [there[i] for i in _derangement(len(there), shuffle)]
        for name, other in zip(names, there, strict=True):
            shape = shapes[other] if name in whole else (shapes[other][0], shapes[other][1:].numel())
            directions = (*shape[:-2], min(shape[-2:]))
            top_k = expert.config.top_k
            if expert.z[name].shape != (*directions[:-1], min(directions[-1], top_k or directions[-1])):
                raise ValueError(
                    f"the expert has {tuple(expert.z[name].shape)} numbers for {name}, {other} of the other model has "
                    f"{directions} singular values"
                )
            to[name] = other
    config = replace(
        expert.config,
        target_modules={to[name].removesuffix(".weight") for name in to if name not in whole},
        target_parameters=sorted(to[name] for name in whole) or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        base_model_name_or_path=getattr(base, "name_or_path", None) or None,
        revision=None,
        basis_hash=None,
    )
    order = {name: i for i, name in enumerate(shapes)}
    return Expert({n: expert.z[old] for old, n in sorted(to.items(), key=lambda pair: order[pair[1]])}, config)


def _leaf(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> up_proj.weight"""
    return ".".join(name.split(".")[-2:])


def _derangement(n: int, seed: int) -> list[int]:
    """An order in which nothing is in its place; the same for the same n and seed."""
    if n < 2:
        raise ValueError("there is only one layer, which cannot be shuffled")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(n, generator=generator)
        if not (order == torch.arange(n)).any():
            return order.tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Export: the change of every weight is an SVD already, so its best approximation of rank r is at hand


@torch.no_grad()
def export_lora(
    model: PeftModel | SVFModel, folder: str | Path, rank: int, adapter_name: str = "default"
) -> dict[str, float]:
    """Writes an expert as a PEFT LoRA of rank `rank`: the directions with the largest |s (e - 1)|.

    Returns:
        The share of the change's energy (squared Frobenius norm) that is kept, by module.

    Raises:
        ValueError: where 3-D parameters or grouped convolutions are adapted, which a LoRA has no form for, or whole
            modules were saved.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    tensors, kept = {}, {}
    layers = _layers(model, adapter_name)
    _check_z_is_all(model.peft_config[adapter_name])
    transposed = {layer.fan_in_fan_out for layer in layers if isinstance(layer, SVFLinear)}
    for layer in layers:
        base = layer.get_base_layer()
        if isinstance(layer, ParamWrapper) or (isinstance(layer, SVFConv2d) and base.groups > 1):
            raise ValueError(
                f"{layer.key} ({type(base).__name__}) cannot be exported to LoRA; merge the expert instead"
            )
        a, b, kept[layer.key] = _low_rank(layer, adapter_name, rank)
        if isinstance(layer, SVFConv2d):
            a, b = a.view(rank, *base.weight.shape[1:]), b.view(-1, rank, 1, 1)
        dtype = base.weight.dtype
        tensors[f"{PREFIX}{layer.key}.lora_A.weight"] = a.to("cpu", dtype).contiguous()
        tensors[f"{PREFIX}{layer.key}.lora_B.weight"] = b.to("cpu", dtype).contiguous()
    source = model.peft_config[adapter_name]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[layer.key for layer in layers],
        fan_in_fan_out=transposed == {True},
        task_type=source.task_type,
        base_model_name_or_path=source.base_model_name_or_path,
        revision=source.revision,
        inference_mode=True,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return kept


def _low_rank(layer: SVFLayer, adapter_name: str, rank: int) -> tuple[Tensor, Tensor, float]:
    """A (rank, n_in), B (n_out, rank) and the share of energy kept; zero rows where the matrix has fewer directions."""
    d = layer.shift_of(adapter_name)
    energy = (layer.svf_values * d).square()
    best = energy.topk(min(rank, len(d))).indices
    own = layer._own_matrix("weight")
    q = layer.svf_basis[:, best].to(own.dtype)
    if layer.side("weight") == "in":
        a, b = q.T, (own @ q) * d[best]
    else:
        a, b = q.T @ own, q * d[best]
    missing = rank - len(best)
    share = float(energy[best].sum() / energy.sum()) if energy.sum() > 0 else 1.0
    return nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing)), share


# ----------------------------------------------------------------------------------------------------------------------
# Base models by name or folder


def base_folder(model: str | Path, weights: bool = True) -> Path:
    """Folder of a checkpoint; one of the Hub is fetched first, without its weights where they are not needed.

    Raises:
        ValueError: for a file, such as the checkpoint of a CTM.
        FileNotFoundError: where it is neither a folder nor on the Hub, or the Hub cannot be reached.
    """
    if Path(model).is_dir():
        return Path(model)
    if Path(model).is_file() or Path(model).suffix in (".safetensors", ".ckpt", ".pt"):
        raise ValueError(
            f"{model} names a file, not a folder or a model of the Hub; merge an expert of a CTM in Python with "
            f'PeftModel.from_pretrained(ctm.load("{model}"), EXPERT).merge_and_unload()'
        )
    return _fetched(model, ["*.json", "*.model", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])])


def skeleton(folder: Path) -> nn.Module:
    """The checkpoint's model on the meta device: names and shapes without weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, (config.architectures or [""])[0], None) or transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)


def load_base(folder: Path) -> nn.Module:
    """The model of a checkpoint folder, in the precision that it is stored in.

    Raises:
        ValueError: where a file of it is damaged.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, (config.architectures or [""])[0], None) or transformers.AutoModelForCausalLM
    for path in sorted(folder.glob("*.safetensors")):
        with decompose.opened(path):
            pass
    return kind.from_pretrained(folder, dtype="auto")


def checkpoint_matrices(folder: Path, config: SVFConfig, dtype: torch.dtype | None = None) -> list[Matrix]:
    """What an adapter of that configuration would decompose, to be read from the checkpoint one at a time.

    Raises:
        KeyError: where the checkpoint does not hold a weight.
    """
    base = skeleton(folder)
    tensors = decompose.checkpoint_tensors(folder, base)
    model = SVFModel(base, config, "default")
    found = [decompose.in_checkpoint(layer.matrix(name), tensors) for layer in model.layers() for name in layer.names()]
    return found if dtype is None else [replace(m, load=lambda load=m.load: load().to(dtype)) for m in found]


# ----------------------------------------------------------------------------------------------------------------------
# The published implementation's files


def convert_published(path: str | Path, base: str | Path) -> Expert:
    """`policy_params.pt` (positional) or `learnable_params.pt` (by name) of the published code -> an expert.

    Both hold logits in bf16, read as sigmoid with the nuclear norm kept. Positions count the matrices of the MLPs in
    the order of the base's state dict.

    Raises:
        ValueError: where the file is neither, or does not fit the base.
    """
    try:
        stored: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # whatever reading another kind of file runs into
        stored = {}
    if not isinstance(stored, dict) or not stored or not all(isinstance(key, str) for key in stored):
        raise ValueError(f"{path} is neither a policy_params.pt nor a learnable_params.pt")
    folder = base_folder(base)
    model = skeleton(folder)
    shapes = {n: p.shape for n, p in model.state_dict().items() if p.ndim == 2}
    if all(key.startswith("learnable_params_module_list.") for key in stored):
        names = [name for name in shapes if "mlp" in name]
        numbers = sorted(int(key.rpartition(".")[2]) for key in stored)
        if numbers != list(range(len(names))):
            raise ValueError(f"{path} has {len(numbers)} vectors, the MLPs of {base} have {len(names)} matrices")
        z = {name: stored[f"learnable_params_module_list.{i}"] for i, name in enumerate(names)}
    else:
        z = dict(stored)
        if unknown := [name for name in z if name not in shapes]:
            raise ValueError(f"{path} adapts {unknown[0]}, which {base} does not have")
    for name, vector in z.items():
        if not isinstance(vector, Tensor) or vector.shape != (min(shapes[name]),):
            raise ValueError(f"{path} does not fit {base}: {name} has {min(shapes[name])} singular values")
    modules = {name.removesuffix(".weight") for name in z}
    suffixes = {module.rpartition(".")[2] for module in modules}
    matched = {n for n, m in model.named_modules() if n.rpartition(".")[2] in suffixes}
    config = SVFConfig(
        target_modules=sorted(suffixes if matched == modules else modules),
        parametrization="sigmoid",
        normalize="nuclear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    )
    tensors = decompose.checkpoint_tensors(folder, model)
    matrices = [decompose.in_checkpoint(Matrix(name, tuple(shapes[name]), lambda: None), tensors) for name in z]
    config.basis_hash = decompose.basis_hash(dict(zip(z, decompose.digests(matrices), strict=True)))
    return Expert({name: vector.detach().float() for name, vector in z.items()}, config)


def fill_cache(model: str | Path, config: SVFConfig, options: DecompositionOptions, dtype=None) -> str:
    """Decomposes what an adapter of that configuration needs of a checkpoint into the cache. Returns the basis hash."""
    matrices = checkpoint_matrices(base_folder(model), config, dtype)
    known = decompose.fill(matrices, options)
    return decompose.basis_hash({m.name: key for m, key in zip(matrices, known, strict=True)})
