"""Mixtures of experts' shifts: one for all, per row, per token or per layer, while a `with model.mix(...)` block lasts.

The model and its layers share one `Mixing`. The block states what is wanted; every forward of the whole model fixes it
for its own batch (rows repeated by `generate`, rows and tokens flattened by some layers); layers only read it.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Mix:
    """Which experts, in what proportions: weights (experts,), (rows, experts) or (rows, tokens, experts)."""

    names: tuple[str, ...]
    weights: Tensor
    tokens: int | None = None
    """Tokens a row of the batch in progress has, where that is known."""
    layers: Mapping[str, int] | None = None
    """Key of an adapted layer -> its place on an axis of its own in weights, ([rows,] layers, experts)."""
    nothing: bool = False
    """All weights are zero: the base."""
    shifts: dict[tuple, Tensor] = field(default_factory=dict, repr=False)
    """What frozen experts come to in a layer, made once for the whole block."""
    together: dict[int | None, dict[tuple[str, str], Tensor]] = field(default_factory=dict, repr=False)
    """The same for many layers, made at once: number of rows, or None -> layer and parameter -> (K,) or (rows, K)."""

    @property
    def per_row(self) -> bool:
        return self.weights.ndim > 1 + (self.layers is not None)

    def at(self, key: str) -> "Mix":
        """As one layer sees it: weights without the axis of layers.

        Raises:
            ValueError: for a layer that the mixture has no weights for.
        """
        if self.layers is None:
            return self
        if key not in self.layers:
            raise ValueError(f"the mixture has no weights for {key}; give every adapted layer its place in `layers`")
        return replace(self, weights=self.weights[..., self.layers[key], :], layers=None)

    @property
    def rows(self) -> int | None:
        return len(self.weights) if self.per_row else None

    def made(self, key: str, name: str, x: Tensor) -> Tensor | None:
        """What was made at once for a layer, with as many axes as its input where rows differ."""
        d = self.together.get(self.rows, {}).get((key, name))
        if d is None or d.ndim == 1:
            return d
        return d.view(len(d), *[1] * (x.ndim - 2), d.shape[-1]) if x.ndim > 2 and len(x) == len(d) else None

    def for_batch(self, rows: int, tokens: int | None, repeated: bool) -> "Mix":
        """The same for a batch; `repeated` where `generate` may have copied every row a number of times.

        Raises:
            ValueError: where weights and batch have different rows or tokens.
        """
        if not self.per_row:
            return self
        weights = self.weights
        if repeated and rows > len(weights) and rows % len(weights) == 0:
            weights = weights.repeat_interleave(rows // len(weights), dim=0)
        if len(weights) != rows:
            raise ValueError(f"the mixture has weights for {len(weights)} rows, the batch has {rows}")
        if self.layers is None and weights.ndim == 3 and tokens is not None and weights.shape[1] != tokens:
            raise ValueError(f"the mixture has weights for {weights.shape[1]} tokens a row, the batch has {tokens}")
        return replace(self, weights=weights, tokens=tokens)

    def for_input(self, x: Tensor, where: str) -> Tensor:
        """Weights with an axis for every axis of a layer's input (rows, ..., features), the last one for experts.

        Raises:
            ValueError: where the layer sees other rows than the batch has.
        """
        weights, rows = self.weights, len(self.weights)
        if x.ndim == 2 and self.tokens is not None and len(x) == rows * self.tokens:  # rows and tokens in one axis
            weights = (
                weights.expand(rows, self.tokens, -1)
                if weights.ndim == 3
                else weights[:, None].expand(rows, self.tokens, weights.shape[-1])
            )
            return weights.flatten(0, 1)
        if len(x) == rows and weights.ndim == 2:
            return weights.view(rows, *[1] * (x.ndim - 2), weights.shape[-1])
        if x.ndim == 3 and len(x) == rows and x.shape[1] == weights.shape[1]:
            return weights
        raise ValueError(
            f"{where} sees an input {tuple(x.shape)}, which cannot be told into the {rows} rows of the mixture; leave "
            "it out of target_modules, or give one mixture for all rows"
        )


@dataclass(eq=False)
class Mixing:
    """What the layers of one model share: the mixture in force, if any."""

    wanted: Mix | None = None
    """Of the block that the program is in."""
    current: Mix | None = None
    """The same, for the batch in progress."""
    repeated: bool = False
    """Inside `generate`."""
    replaying: bool = field(default=False, repr=False)
    """Inside a checkpointed part that brought its mixture along."""

    @property
    def active(self) -> Mix | None:
        return self.current or self.wanted

    @contextmanager
    def use(self, mix: Mix) -> Iterator[None]:
        if self.wanted is not None:
            raise ValueError("there is a mixture already; leave its block before the next one")
        self.wanted = mix
        try:
            yield
        finally:
            self.wanted = self.current = None

    def see(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Fixes the mixture for a batch, from what the whole model is called with."""
        if "adapter_names" in kwargs:
            raise ValueError("adapter_names must be given to the PEFT model, not to the model inside it")
        if self.wanted is None:
            return
        named = [kwargs.get(name) for name in ("input_ids", "inputs_embeds", "pixel_values", "decoder_input_ids")]
        tensors = [value for value in (*named, *args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
        if not tensors:
            raise ValueError("a mixture needs to see its rows: give the model a tensor")
        first = tensors[0]
        text = first is kwargs.get("input_ids") or (first.ndim == 2 and not first.is_floating_point())
        tokens = first.shape[1] if text or first.ndim == 3 else None
        self.current = self.wanted.for_batch(len(first), tokens, self.repeated)


class Replay:
    """A checkpointing function that brings the mixture along: recomputation in backward happens after the block."""

    def __init__(self, checkpoint: Callable, mixing: Mixing):
        self.checkpoint, self.mixing = checkpoint, mixing

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        then = self.mixing.wanted, self.mixing.current
        return self.checkpoint(functools.partial(self.run, then, function), *args, **kwargs)

    def run(self, then: tuple[Mix | None, Mix | None], function: Callable, *args: Any, **kwargs: Any) -> Any:
        mixing = self.mixing
        now = mixing.wanted, mixing.current, mixing.replaying
        mixing.wanted, mixing.current, mixing.replaying = *then, True
        try:
            return function(*args, **kwargs)
        finally:
            mixing.wanted, mixing.current, mixing.replaying = now
