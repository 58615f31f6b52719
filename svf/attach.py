"""Any PEFT adapter on a frozen base, as a training run needs it: put on, kept without the base, put on again.

Knows no trainer and nothing of the model; `ctm.lit` and `svf.lit` build on it.
"""

import copy
import hashlib
import json
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import svf.tuner  # noqa: F401 (registers the method)


def attach(model: nn.Module, config: PeftConfig, base: str | None = None, name: str = "default") -> PeftModel:
    """Puts an adapter on a model and freezes the model's own weights.

    Args:
        model: the base; its targets are wrapped in place.
        config: of any PEFT method; left as it is.
        base: where the base is from, which the adapter's own file will say; what the model knows of that if not given.
        name: of the adapter.

    Returns:
        The model in PEFT's hands, with `base_hash`, the identity of the base's weights.

    Raises:
        ValueError: where the adapter fits no part of the model, or has nothing to train.
    """
    if base is not None:
        model.name_or_path = base
    base_hash = fingerprint(model)
    adapted = get_peft_model(model, copy.deepcopy(config), name)
    adapted.base_hash = base_hash
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise ValueError(f"{type(config).__name__} has nothing to train on this model")
    return adapted


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a model's state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def trained(module: nn.Module) -> set[str]:
    """Names in a module's state dict of what trains, with the running statistics of parts that train."""
    names = set()
    for path, part in module.named_modules():
        own = [name for name, parameter in part.named_parameters(recurse=False) if parameter.requires_grad]
        if own:
            names |= {f"{path}.{name}".lstrip(".") for name in [*own, *dict(part.named_buffers(recurse=False))]}
    return names


def describe(adapted: PeftModel) -> dict:
    """Base and adapters as plain values; `reattach` puts them on again, with fresh weights."""
    configs = {name: json.loads(json.dumps(c.to_dict(), default=sorted)) for name, c in adapted.peft_config.items()}
    return {"base": next(iter(configs.values()))["base_model_name_or_path"], "hash": adapted.base_hash} | {
        "configs": configs
    }


def check_base(described: dict, base_hash: str) -> None:
    """Raises ValueError where adapters of that description were trained on another base."""
    if described["hash"] != base_hash:
        raise ValueError(
            f"the adapter was trained on {described['base']} with weights {described['hash'][:12]}, these are "
            f"{base_hash[:12]}: give the base that it was trained on"
        )


def reattach(model: nn.Module, described: dict, state: dict[str, Tensor]) -> PeftModel:
    """Puts trained adapters on their base.

    Args:
        model: the base; its targets are wrapped in place.
        described: what `describe` returned.
        state: the part of the adapted model's state dict that was trained.

    Raises:
        ValueError: where it is another base, or the state is of other adapters.
    """
    check_base(described, fingerprint(model))
    (first, config), *others = described["configs"].items()
    adapted = attach(model, PeftConfig.from_peft_type(**config), described["base"], first)
    for name, config in others:
        adapted.add_adapter(name, PeftConfig.from_peft_type(**config))
    loaded = adapted.load_state_dict(state, strict=False)
    if different := {*loaded.unexpected_keys, *(trained(adapted) - set(state))}:
        raise ValueError(f"this is not the state of these adapters: {min(different)} is in one of the two only")
    return adapted


class Adapting:
    """Mixin of a LightningModule whose `model` may be a `PeftModel`: then the state dict, and with it a checkpoint, is
    what trains and not the base, and the base's BatchNorms keep their statistics."""

    model: nn.Module

    @property
    def adapter(self) -> PeftModel | None:
        return self.model if isinstance(self.model, PeftModel) else None

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        state = super().state_dict(*args, **kwargs)
        if self.adapter:
            names = trained(self)
            state = type(state)((name, value) for name, value in state.items() if name in names)
        return state

    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True, assign: bool = False):
        """Loads what `state_dict` gives.

        Raises:
            ValueError: for names that differ from it.
        """
        if not self.adapter:
            return super().load_state_dict(state, strict, assign)
        if different := set(state) ^ set(self.state_dict()):
            raise ValueError(f"this is not the state of the same adapter: {min(different)} is in one of the two only")
        return super().load_state_dict(state, strict=False, assign=assign)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.adapter:
            for part in self.modules():
                if isinstance(part, _BatchNorm) and not any(p.requires_grad for p in part.parameters(recurse=False)):
                    part.eval()
        return self

    def on_save_checkpoint(self, content: dict) -> None:
        super().on_save_checkpoint(content)
        if self.adapter:
            content["adapter"] = describe(self.adapter)

    def on_load_checkpoint(self, content: dict) -> None:
        """Raises ValueError where the adapter of the checkpoint belongs to another base."""
        super().on_load_checkpoint(content)
        if self.adapter:
            check_base(content["adapter"], self.adapter.base_hash)

    def save_adapter(self, folder: Path) -> bool:
        """Writes the adapter as a PEFT folder, where there is one."""
        if self.adapter:
            # embeddings are the base's, frozen; PEFT would ask the Hub whether they grew
            self.adapter.save_pretrained(str(folder), save_embedding_layers=False)
        return self.adapter is not None
