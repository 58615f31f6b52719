"""The published implementation's argument and parameter names. Nothing else in this project knows them.

`load` builds our model from the published constructor's arguments and state dict. It reads image models so far.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from ctm import encoders
from ctm.model import CTM, CTMConfig, Thinker

PAIRINGS = {"first-last": "dense", "random": "semi-dense", "random-pairing": "random"}

# Published name -> ours. Digits stay; the first pattern that matches counts.
RENAME = [
    (r"start_activated_state", "net.z_start"),
    (r"start_trace", "net.trace_start"),
    (r"decay_params_(action|out)", r"net.sync_\1.decay"),
    (r"initial_rgb\.(\w+)", r"encoder.rgb.\1"),
    (r"backbone\.conv1\.(\w+)", r"encoder.stem.0.\1"),
    (r"backbone\.bn1\.(\w+)", r"encoder.stem.1.\1"),
    (r"backbone\.layer(\d)\.(.+)", lambda m: f"encoder.stages.{int(m[1]) - 1}.{m[2]}"),
    (r"kv_proj\.(\d)\.(\w+)", r"encoder.project.\1.\2"),
    (r"q_proj\.(\w+)", r"net.query.\1"),
    (r"attention\.(.+)", r"net.attention.\1"),
    (r"synapses\.first_projection\.([01])\.(\w+)", lambda m: f"net.synapses.first.{int(m[1]) + 1}.{m[2]}"),
    (r"synapses\.(down|up)_projections\.(.+)", r"net.synapses.\1.\2"),
    (r"synapses\.skip_lns\.(.+)", r"net.synapses.skip_norm.\1"),
    (r"synapses\.([13])\.(\w+)", r"net.synapses.\1.\2"),
    (r"trace_processor\.0\.(\d)\.w1", r"net.neurons.\1.weight"),
    (r"trace_processor\.0\.(\d)\.b1", r"net.neurons.\1.bias"),
    (r"trace_processor\.0\.(\d)\.T", r"net.neurons.\1.temperature"),
    (r"trace_processor\.0\.(\d)\.layernorm\.(\w+)", r"net.neurons.\1.norm.\2"),
    (r"output_projector\.0\.(\w+)", r"net.head.\1"),
]


def our_name(name: str) -> str:
    for pattern, ours in RENAME:
        if match := re.fullmatch(pattern, name):
            return ours(match) if isinstance(ours, Callable) else match.expand(ours)
    raise KeyError(f"the published model has no parameter {name!r}")


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published parameters (or gradients of them) under our names and in our layouts; index buffers are left out."""
    ours = {}
    for name, value in state.items():
        if "neuron_indices" in name:
            continue
        new = our_name(name)
        if name.endswith(".w1"):
            ours[new] = value.permute(2, 0, 1)  # (in, out, neuron) -> neuron-major
        elif name.endswith(".b1"):
            ours[new] = value.squeeze(0)
        elif ".in_proj_" in name:  # query, key and value projections are stacked in the published model
            for proj, part in zip("qkv", value.chunk(3), strict=True):
                ours[new.replace("in_proj_", f"{proj}_proj.")] = part
        else:
            ours[new] = value
    return ours


def load(kind: str, config: dict, state_dict: dict[str, Tensor]) -> Thinker:
    """Our model with the published one's configuration and weights.

    Args:
        kind: "ctm".
        config: arguments of the published constructor.
        state_dict: of the published model.
    """
    if kind != "ctm":
        raise ValueError(f"cannot read a published model of kind {kind!r} yet; ctm is what there is")
    backbone = re.fullmatch(r"resnet(\d+)-(\d)", config["backbone_type"])
    if backbone is None or config["positional_embedding_type"] != "none":
        raise ValueError("only ResNet backbones without positional embedding can be read yet")
    n_positions, n_classes = ([1] + config["prediction_reshaper"])[-2:]
    ours = CTMConfig(
        d_model=config["d_model"],
        d_input=config["d_input"],
        ticks=config["iterations"],
        heads=config["heads"],
        n_synch_out=config["n_synch_out"],
        n_synch_action=config["n_synch_action"],
        pairing=PAIRINGS[config["neuron_select_type"]],
        n_self_pairs=config.get("n_random_pairing_self", 0),
        synapse_depth=config["synapse_depth"],
        memory_length=config["memory_length"],
        nlm_hidden=config["memory_hidden_dims"] if config["deep_nlms"] else 0,
        nlm_layernorm=config["do_layernorm_nlm"],
        dropout=config["dropout"],
        nlm_dropout=config.get("dropout_nlm"),
    )
    n_classes = n_classes if n_classes > 0 else config["out_dims"] // n_positions
    depth, stages = map(int, backbone.groups())
    channels = state_dict["initial_rgb.weight"].shape[1]
    encoder = encoders.ResNet(config["d_input"], depth=depth, stages=stages, channels=channels)
    model = Thinker(encoder, CTM(ours, (n_positions, n_classes)))
    state = rename(state_dict)
    for name in ("sync_action", "sync_out"):
        state |= published_pairs(state_dict, name.removeprefix("sync_"), ours.pairing, f"net.{name}")
    model.load_state_dict(state)
    return model


def published_pairs(state_dict: dict[str, Tensor], name: str, pairing: str, ours: str) -> dict[str, Tensor]:
    """Our pair indices from the published neuron indices."""
    left, right = (state_dict[f"{name}_neuron_indices_{side}"] for side in ("left", "right"))
    if pairing != "random":
        i, j = torch.triu_indices(len(left), len(right))
        left, right = left[i], right[j]
    return {f"{ours}.left": left, f"{ours}.right": right}
