"""The published implementation's names and layouts. Nothing else in this project knows them.

model = compat.load("ctm", config, state_dict)     the published constructor's arguments and state dict -> our model
compat.outputs(model, images)                      what the published model would return, in its layouts
compat.gradients(model), compat.export(model)      gradients and state dict under the published names
model = compat.load_checkpoint("released.pt")      a released file, or a folder from Hugging Face

python -m ctm.compat convert released.pt new.ckpt  the same as a checkpoint for `train.py` and `ctm.load`
"""

import argparse
import json
import logging
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ctm import checkpoint, encoders
from ctm.agent import Agent
from ctm.baselines import LSTM, FeedForward, FFConfig, LSTMConfig, LSTMState
from ctm.model import CTM, CTMConfig, State, Thinker
from ctm.modules import WindowedSync
from ctm.record import record

KINDS = ("ctm", "sort", "qamnist", "rl", "lstm", "ff")
PAIRINGS = {"first-last": "dense", "random": "semi-dense", "random-pairing": "random"}
POSITIONS = {"custom-rotational": "rotational", "custom-rotational-1d": "rotational-1d"}  # the others keep their name

log = logging.getLogger(__name__)


# ----------------------------------------------------------------------------------------------------------------------
# Names: ours -> published, by the longest beginning that fits

BACKBONE = {
    encoders.ResNet: {
        "encoder.rgb.": "initial_rgb.",
        "encoder.stem.0.": "backbone.conv1.",
        "encoder.stem.1.": "backbone.bn1.",
        **{f"encoder.stages.{i}.": f"backbone.layer{i + 1}." for i in range(4)},
    },
    encoders.ShallowWide: {"encoder.layers.": "backbone.layers."},
    encoders.Parity: {"encoder.embedding.": "backbone.embedding."},
    encoders.Vector: {},
    encoders.QAMNIST: {
        "encoder.digit.": "backbone_digit.layers.",
        "encoder.index": "index_backbone.embedding",
        "encoder.operator.": "operator_backbone.embedding.",
    },
    encoders.ClassicControl: {"encoder.layers.": "backbone.input_projector."},
    encoders.MiniGrid: {
        "encoder.object.": "backbone.object_embedding.",
        "encoder.color.": "backbone.color_embedding.",
        "encoder.state.": "backbone.state_embedding.",
        "encoder.place.": "backbone.position_embedding.",
        "encoder.layers.": "backbone.project_to_d_projection.",
    },
}
POSITION = {
    type(None): {},
    encoders.FourierPosition: {
        "encoder.position.frequencies.": "positional_embedding.Wr.",
        "encoder.position.mlp.": "positional_embedding.mlp.",
    },
    encoders.MultiFourierPosition: {
        "encoder.position.mix": "positional_embedding.combination",
        **{
            f"encoder.position.scales.{i}.{ours}.": f"positional_embedding.embedders.{i}.{theirs}."
            for i in range(10)
            for ours, theirs in (("frequencies", "Wr"), ("mlp", "mlp"))
        },
    },
    encoders.RotationPosition: {
        "encoder.position.start": "positional_embedding.start_vector",
        "encoder.position.project.": "positional_embedding.projection.0.",
    },
    encoders.RotationPosition1d: {"encoder.position.project.": "positional_embedding.projection."},
}
READING = {"encoder.project.": "kv_proj.", "net.query.": "q_proj.", "net.attention.": "attention."}
NET = {
    CTM: {
        "net.z_start": "start_activated_state",
        "net.trace_start": "start_trace",
        "net.sync_out.history_start": "start_activated_trace",
        "net.sync_out.decay": "decay_params_out",
        "net.sync_action.decay": "decay_params_action",
        "net.synapses.": "synapses.",
        "net.synapses.first.1.": "synapses.first_projection.0.",
        "net.synapses.first.2.": "synapses.first_projection.1.",
        "net.synapses.down.": "synapses.down_projections.",
        "net.synapses.up.": "synapses.up_projections.",
        "net.synapses.skip_norm.": "synapses.skip_lns.",
        **{
            f"net.neurons.{layer}.{ours}": f"trace_processor.0.{layer}.{theirs}"
            for layer in (0, 2)
            for ours, theirs in (("weight", "w1"), ("bias", "b1"), ("temperature", "T"), ("norm.", "layernorm."))
        },
        "net.head.": "output_projector.0.",
    },
    LSTM: {
        "net.hidden_start": "start_hidden_state",
        "net.cell_start": "start_cell_state",
        "net.lstm.": "lstm.",
        "net.head.": "output_projector.0.",
    },
    FeedForward: {"net.layers.0.": "output_projector.3.", "net.layers.3.": "output_projector.6."},
}
AGENT = {"thinker.": "recurrent_model.", "actor.": "actor.", "critic.": "critic."}


class Names:
    """Our names of a model's tensors and the published ones, one to one."""

    def __init__(self, model: Thinker):
        encoder, net = model.encoder, model.net
        self.table = BACKBONE[type(encoder)] | POSITION[type(getattr(encoder, "position", None))]
        self.table = self.table | READING | NET[type(net)]
        # With a single layer and ready vectors the published LSTM is an LSTMCell, whose start has no axis of layers.
        self.is_cell = isinstance(net, LSTM) and not isinstance(encoder, encoders.MapEncoder)
        if self.is_cell:
            self.table |= {
                f"net.lstm.{n}_l0": f"lstm_cell.{n}" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            }

    def __call__(self, ours: str) -> str:
        beginning = max((begin for begin in self.table if ours.startswith(begin)), key=len)
        return self.table[beginning] + ours.removeprefix(beginning)


def to_published(model: Thinker, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters, gradients of them or statistics, under the published names and in the published layouts."""
    names, theirs = Names(model), {}
    for name, value in ours.items():
        if ".sync_" in name and name.endswith((".left", ".right")):
            continue  # pairs of neurons: `published_indices`
        new = names(name)
        if new.endswith(".w1"):
            theirs[new] = rearrange(value, "d i o -> i o d")
        elif new.endswith(".b1"):
            theirs[new] = rearrange(value, "d o -> 1 d o")
        elif match := re.fullmatch(r"attention\.[qkv]_proj\.(weight|bias)", new):
            stack = [ours.get(f"net.attention.{proj}_proj.{match[1]}") for proj in "qkv"]
            if all(part is not None for part in stack):
                theirs[f"attention.in_proj_{match[1]}"] = torch.cat(stack)
        elif names.is_cell and new in ("start_hidden_state", "start_cell_state"):
            theirs[new] = value.squeeze(0)
        else:
            theirs[new] = value
    return {name: value.contiguous() for name, value in theirs.items()}


def from_published(model: Thinker, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of our model from the published one, whose names and shapes are right."""
    names, ours = Names(model), {}
    for name in model.state_dict():
        if ".sync_" in name and name.endswith((".left", ".right")):
            continue
        new = names(name)
        if new.endswith(".w1"):
            ours[name] = rearrange(theirs[new], "i o d -> d i o")
        elif new.endswith(".b1"):
            ours[name] = rearrange(theirs[new], "1 d o -> d o")
        elif match := re.fullmatch(r"attention\.([qkv])_proj\.(weight|bias)", new):
            ours[name] = theirs[f"attention.in_proj_{match[2]}"].chunk(3)["qkv".index(match[1])]
        elif names.is_cell and new in ("start_hidden_state", "start_cell_state"):
            ours[name] = theirs[new][None]
        else:
            ours[name] = theirs[new]
    for side in ("action", "out"):
        if hasattr(model.net, f"sync_{side}"):
            left, right = (theirs[f"{side}_neuron_indices_{hand}"] for hand in ("left", "right"))
            ours |= our_pairs(model.net, side, left, right)
    return ours


def our_pairs(net: CTM, side: str, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Our pair indices from the published neuron indices."""
    sync = getattr(net, f"sync_{side}")
    if net.config.pairing == "dense":  # published models slice the neurons and never look at the indices
        left, right = sync.left, sync.right
    elif net.config.pairing == "semi-dense":
        i, j = torch.triu_indices(len(left), len(right), device=left.device)
        left, right = left[i], right[j]
    return {f"net.sync_{side}.left": left, f"net.sync_{side}.right": right}


def published_indices(net: CTM) -> dict[str, Tensor]:
    """The published buffers of neuron indices."""
    buffers, c = {}, net.config
    for side, n in (("action", c.n_synch_action), ("out", c.n_synch_out)):
        if n == 0:
            continue
        sync = getattr(net, f"sync_{side}")
        left, right = sync.left, sync.right
        if c.pairing == "dense":  # (a window keeps 0 ... n-1 and reads the last n all the same)
            first = c.d_model - n if side == "action" else 0
            left = right = torch.arange(first, first + n, device=left.device)
        elif c.pairing == "semi-dense":  # the pairs (i, i) name every neuron once
            i, j = torch.triu_indices(n, n, device=left.device)
            left, right = left[i == j], right[i == j]
        buffers |= {f"{side}_neuron_indices_left": left.clone(), f"{side}_neuron_indices_right": right.clone()}
        if isinstance(sync, WindowedSync):
            buffers["diagonal_mask_out"] = torch.ones(n, n, device=left.device).triu().bool()
    return buffers


# ----------------------------------------------------------------------------------------------------------------------
# In


def load(kind: str, config: dict, state_dict: dict[str, Tensor]) -> Thinker | Agent:
    """Our model with the published one's configuration and weights.

    Args:
        kind: ctm, sort, qamnist, rl, lstm or ff: which of the published models. An LSTM for QAMNIST or for
            reinforcement learning is known by its configuration.
        config: arguments of the published constructor.
        state_dict: of the published model; of a whole agent for an `Agent`.

    Raises:
        ValueError: for an unknown kind or part, or names and shapes that are not the model's, all of them listed.
    """
    state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
    model = build(kind, config, **sizes(kind, config, state_dict))
    refuse_differences(export(model), state_dict)
    if isinstance(model, Agent):
        thinker = {k.removeprefix("recurrent_model."): v for k, v in state_dict.items() if k.startswith("recurrent_")}
        state = {f"thinker.{k}": v for k, v in from_published(model.thinker, thinker).items()}
        state |= {k: v for k, v in state_dict.items() if k.startswith(("actor.", "critic."))}
    else:
        state = from_published(model, state_dict)
    model.load_state_dict(state)
    if bad := [name for name, value in state_dict.items() if value.is_floating_point() and not value.isfinite().all()]:
        warnings.warn(f"the weights hold NaN or infinity in {', '.join(bad)}", stacklevel=2)
    return model


def sizes(kind: str, config: dict, state: dict[str, Tensor]) -> dict:
    """What the published constructor leaves to the first input (its layers are lazy), read off the weights."""
    found = {}

    def shape(name: str) -> torch.Size | None:
        return state[name].shape if name in state else None

    for name in ("initial_rgb.weight", "backbone.layers.0.weight", "backbone_digit.layers.0.weight"):
        if shape(name):
            found["channels"] = shape(name)[1]
    first = shape("synapses.first_projection.0.weight") or shape("synapses.1.weight")
    if kind == "sort" and first:
        found["n_in"] = first[1] - config["d_model"]
    prefix = "recurrent_model." if any(name.startswith("recurrent_model.") for name in state) else ""
    if observation := shape(f"{prefix}backbone.input_projector.1.weight"):
        found["n_in"] = observation[1]
    if prefix and shape("actor.4.weight"):
        found["n_actions"] = shape("actor.4.weight")[0]
    return found


def build(
    kind: str, config: dict, channels: int | None = None, n_in: int | None = None, n_actions: int | None = None
) -> Thinker | Agent:
    """Our model for the published constructor's arguments, with fresh weights.

    Args:
        kind, config: as for `load`.
        channels: of the images; 3, or 1 for the digits of QAMNIST, where not given.
        n_in: numbers in an input of sort or classic control.
        n_actions: for a whole `Agent`; None for its recurrent model alone.

    Raises:
        ValueError: for an unknown kind or part.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no published model of kind {kind!r}; kinds are {', '.join(KINDS)}")
    encoder = build_encoder(kind, config, channels, n_in)
    out_dims = None
    if "out_dims" in config:
        positions, classes = [1, *config.get("prediction_reshaper", [-1])][-2:]
        out_dims = (positions, classes if classes > 0 else config["out_dims"] // positions)
    if kind == "ff":
        net = FeedForward(
            FFConfig(d_model=config["d_model"], pool=True, dropout=config.get("dropout", 0.0)),
            out_dims,
            0,
            encoder.width,
        )
    elif kind == "lstm":
        lstm = LSTMConfig(
            d_model=config["d_model"],
            d_input=encoder.width,
            layers=config.get("num_layers", 1),
            ticks=config["iterations"],
            heads=config.get("heads", 0),
            dropout=config.get("dropout", 0.0),
        )
        net = LSTM(lstm, out_dims)
    else:
        net = CTM(ctm_config(kind, config, encoder.width), out_dims)
    model = Thinker(encoder, net)
    return Agent(model, n_actions) if n_actions else model


def ctm_config(kind: str, config: dict, width: int) -> CTMConfig:
    attends = kind in ("ctm", "qamnist")
    return CTMConfig(
        d_model=config["d_model"],
        d_input=width,
        ticks=config["iterations"],
        heads=config["heads"] if attends else 0,
        n_synch_out=config["n_synch_out"],
        n_synch_action=config["n_synch_action"] if attends else 0,
        pairing=PAIRINGS[config.get("neuron_select_type", "random-pairing")],
        n_self_pairs=config.get("n_random_pairing_self", 0),
        sync="window" if kind == "rl" else "decay",
        synapse_depth=config["synapse_depth"],
        synapse_blocks=2 if kind == "rl" else 1,
        memory_length=config["memory_length"],
        nlm_hidden=config["memory_hidden_dims"] if config["deep_nlms"] else 0,
        nlm_layernorm=config["do_layernorm_nlm"],
        dropout=config.get("dropout", 0.0),
        nlm_dropout=config.get("dropout_nlm"),
    )


def build_encoder(kind: str, config: dict, channels: int | None, n_in: int | None) -> encoders.Encoder:
    width, name = config.get("d_input"), config.get("backbone_type", "none")
    position = config.get("positional_embedding_type", "none")
    position = POSITIONS.get(position, position)
    if kind == "sort":
        return encoders.Vector(n_in or config["out_dims"] - 1)
    if "iterations_per_digit" in config:
        ticks = (config[f"iterations_{what}"] for what in ("per_digit", "per_question_part", "for_answering"))
        return encoders.QAMNIST(width, *ticks, project_question=kind == "lstm", channels=channels or 1)
    if match := re.fullmatch(r"resnet(18|34|50|101|152)-([1-4])", name):
        depth, stages = map(int, match.groups())
        return encoders.ResNet(None if kind == "ff" else width, depth, stages, channels or 3, position)
    if kind != "ff" and name == "shallow-wide":
        return encoders.ShallowWide(width, channels or 3, position)
    if kind != "ff" and name == "parity_backbone":
        return encoders.Parity(width, position)
    if name == "classic-control-backbone":
        return encoders.ClassicControl(width, n_in or 4)
    if name == "navigation-backbone":
        return encoders.MiniGrid(encoders.MiniGrid.CELLS * width)
    raise ValueError(f"there is no backbone {name!r} for a published model of kind {kind!r}")


def refuse_differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Raises ValueError with every name that is missing, extra or of another shape."""
    words = [f"missing {name}" for name in ours if name not in theirs]
    words += [f"extra {name}" for name in theirs if name not in ours]
    words += [
        f"{name} is {tuple(theirs[name].shape)} and must be {tuple(value.shape)}"
        for name, value in ours.items()
        if name in theirs and theirs[name].shape != value.shape
    ]
    if words:
        raise ValueError(f"the state dict does not fit this configuration: {'; '.join(words)}")


# ----------------------------------------------------------------------------------------------------------------------
# Out


def outputs(model: Thinker | Agent, *inputs: Tensor) -> dict[str, Tensor]:
    """What the published model returns for its own inputs, in its names and layouts. Keeps graphs where there are any.

    Args:
        model: from `load`.
        inputs: images, sequences or lists; for qamnist digits (B, ticks, C, H, W) and question (B, ticks), both
            repeated for every tick; for rl observation, state trace and activated trace (B, D, M), for its LSTM
            observation, hidden and cell state (B, D).

    Returns:
        Of these what the model has: predictions (B, C, T), certainties (B, 2, T), synch_out and synch_action (T, B, R),
        pre_activations and post_activations (T, B, D), attention (T, B, heads, 1, S). For rl synch_out (B, R),
        state_trace, activated_trace. For ff predictions (B, C).

    Raises:
        ValueError: where the inputs of qamnist are not repeated as its configuration says.
    """
    thinker = model.thinker if isinstance(model, Agent) else model
    encoder, net = thinker.encoder, thinker.net
    state = None
    if isinstance(encoder, encoders.QAMNIST):
        repeats = encoder.config["digit_ticks"], encoder.config["question_ticks"]
        inputs = [each_once(x, n) for x, n in zip(inputs, repeats, strict=True)]
    elif len(inputs) == 3:
        inputs, (first, second) = inputs[:1], inputs[1:]
        if isinstance(net, CTM):
            state = State(second[..., -1], first, None, second, net.sync_out.value(second))
        else:
            state = LSTMState(first[None], second[None])
    with record(thinker) as seen:
        thought = thinker(*inputs, state=state)
    found = {
        "pre_activations": seen.pre_activations,
        "post_activations": seen.post_activations,
        "synch_action": seen.sync_action,
        "synch_out": seen.sync_out,
        "attention": None if seen.attention is None else seen.attention.unsqueeze(3),
    }
    if net.out_dims:
        found["predictions"] = thought.predictions.mT
        found["certainties"] = torch.stack([1 - thought.certainty, thought.certainty], dim=1)
    if isinstance(net, FeedForward):
        found = {"predictions": thought.predictions[:, 0]}
    elif isinstance(net, CTM) and net.config.sync == "window":
        found["synch_out"] = thought.sync
        found |= {"state_trace": thought.state.trace_BDM, "activated_trace": thought.state.out}
    elif not net.out_dims:
        found |= {"hidden_state": thought.state.hidden[0], "cell_state": thought.state.cell[0]}
    return {name: value for name, value in found.items() if value is not None}


def each_once(values: Tensor, ticks: int) -> Tensor:
    """Values (B, N * ticks, ...), each repeated for `ticks` ticks -> (B, N, ...)."""
    once = values[:, ::ticks]
    if not torch.equal(once.repeat_interleave(ticks, dim=1), values):
        raise ValueError(f"every digit and every part of the question must be repeated for {ticks} ticks")
    return once


def gradients(model: Thinker | Agent) -> dict[str, Tensor]:
    """The gradients of a model from `load`, under the published names; parameters without one are left out."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return under_published_names(model, found)


def export(model: Thinker | Agent) -> dict[str, Tensor]:
    """The published state dict of a model from `load`, bit for bit."""
    return under_published_names(model, model.state_dict(), with_indices=True)


def under_published_names(model: Thinker | Agent, ours: dict[str, Tensor], with_indices: bool = False):
    prefix, thinker, theirs = "", model, {}
    if isinstance(model, Agent):
        prefix, thinker = "recurrent_model.", model.thinker
        theirs = {name: value for name, value in ours.items() if name.startswith(("actor.", "critic."))}
        ours = {name.removeprefix("thinker."): v for name, v in ours.items() if name.startswith("thinker.")}
    found = to_published(thinker, ours)
    if with_indices and isinstance(thinker.net, CTM):
        found |= published_indices(thinker.net)
    return {f"{prefix}{name}": value for name, value in found.items()} | theirs


# ----------------------------------------------------------------------------------------------------------------------
# Files

# What a released checkpoint's pickle may name beside tensors: its arguments, and NumPy's generator state and numbers.
SAFE = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *((function, f"numpy.{module}.multiarray.{function.__name__}")
      for module in ("core", "_core")
      for function in (np._core.multiarray._reconstruct, np._core.multiarray.scalar)),
    *(type(np.dtype(kind)) for kind in ("uint32", "int32", "int64", "float32", "float64", "bool")),
]  # fmt: skip
ARGUMENTS = {"deep_memory": "deep_nlms", "do_normalisation": "do_layernorm_nlm"}  # what older releases called them
MAZE_SIZES = {"mazes-small": 15, "mazes-medium": 19, "mazes-large": 39, "mazes-extralarge": 99}


def load_checkpoint(path: str | Path) -> Thinker | Agent:
    """A released model, in evaluation mode. What of the file was not used is logged as a warning.

    Args:
        path: a `.pt` file of a published trainer, or a folder with `config.json` and `model.safetensors`.

    Raises:
        FileNotFoundError: where there is nothing.
        ValueError: where the file holds no such model, or more than data: nothing in it is ever run.
    """
    return read_released(path)[0]


def read_released(path: str | Path) -> tuple[Thinker | Agent, dict]:
    """`load_checkpoint`, and the arguments found in the file."""
    path = Path(path)
    if path.is_dir():
        from safetensors.torch import load_file

        for name in ("config.json", "model.safetensors"):
            if not (path / name).is_file():
                raise FileNotFoundError(f"there is no {name} in {path}")
        content = {
            "args": json.loads((path / "config.json").read_text()),
            "state_dict": load_file(path / "model.safetensors"),
        }
    else:
        content = unpickle(path)
    key = next((key for key in ("model_state_dict", "state_dict") if key in content), None)
    if key is None or "args" not in content:
        raise ValueError(f"{path} holds no published model: it needs model_state_dict (or state_dict) and args")
    state = {name.removeprefix("module."): value for name, value in content[key].items()}
    arguments = content["args"] if isinstance(content["args"], dict) else vars(content["args"])
    kind, config = understand(arguments, state)
    model = load(kind, config, state).eval()
    unused = sorted(set(content) - {key, "args"})
    unused += [f"args.{name}" for name in sorted(set(arguments) - set(config) - set(ARGUMENTS))]
    if unused:
        log.warning("%s: not used: %s", path, ", ".join(unused))
    return model, arguments


def unpickle(path: Path) -> dict:
    """The content of a `.pt` file, by PyTorch's unpickler that builds data alone."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with torch.serialization.safe_globals(SAFE):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here
        if name := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"{path} is refused: its pickle wants to run {name[1]}") from error
        raise ValueError(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def understand(arguments: dict, state: dict[str, Tensor]) -> tuple[str, dict]:
    """Kind and constructor arguments of a released model, whose trainer stored the command line's arguments."""
    config = {ARGUMENTS.get(name, name): value for name, value in arguments.items()}
    if "backbone_type" not in config and "resnet_type" in config:
        stages = config.get("resnet_feature_scales", [4])
        config["backbone_type"] = (
            f"{config['resnet_type']}-{stages[-1] if isinstance(stages, list | tuple) else stages}"
        )
    names = {name.removeprefix("recurrent_model.") for name in state}
    if any(name.startswith(("lstm.", "lstm_cell.")) for name in names):
        kind = "lstm"
    elif "output_projector.3.weight" in names:
        kind = "ff"
    elif "start_activated_trace" in names:
        kind = "rl"
    elif "backbone_digit.layers.0.weight" in names:
        kind = "qamnist"
    else:
        kind = "ctm" if "attention.in_proj_weight" in names else "sort"
    defaults = {"neuron_select_type": "first-last", "n_random_pairing_self": 0, "do_layernorm_nlm": False}
    config = defaults | {"deep_nlms": "trace_processor.0.2.w1" in names} | config
    head = next(
        (state[f"output_projector.{i}.weight"] for i in (6, 0) if f"output_projector.{i}.weight" in state), None
    )
    if head is not None:
        config["out_dims"] = len(head)
        if "maze_route_length" in config:
            config.setdefault("prediction_reshaper", [config["maze_route_length"], 5])
        elif "parity_sequence_length" in config:
            config.setdefault("prediction_reshaper", [config["parity_sequence_length"], 2])
    used = {
        "iterations", "d_model", "d_input", "heads", "n_synch_out", "n_synch_action", "synapse_depth", "memory_length",
        "deep_nlms", "memory_hidden_dims", "do_layernorm_nlm", "backbone_type", "positional_embedding_type", "out_dims",
        "prediction_reshaper", "dropout", "dropout_nlm", "neuron_select_type", "n_random_pairing_self", "num_layers",
        "iterations_per_digit", "iterations_per_question_part", "iterations_for_answering",
    }  # fmt: skip
    needed = {"d_model"} if kind == "ff" else {"d_model", "d_input", "iterations"}
    if missing := sorted(needed - set(config)):
        raise ValueError(f"the arguments stored with this model lack {', '.join(missing)}")
    return kind, {name: value for name, value in config.items() if name in used}


def convert(source: str | Path, target: str | Path) -> None:
    """Writes a released model as a checkpoint that `ctm.load` and `train.py` read.

    Raises:
        FileExistsError: where the target is there already.
        FileNotFoundError, ValueError: as `load_checkpoint`.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target} is there already; nothing was written")
    model, arguments = read_released(source)
    if isinstance(model, Agent):
        raise ValueError("an agent has no task here; compat.load_checkpoint reads it")
    spec = checkpoint.describe(model)
    settings = {"model": {"class_path": "ctm.lit.LitCTM", "init_args": checkpoint.arguments(spec)}}
    if "maze_route_length" in arguments:
        data = {"route_length": spec["out_dims"][0]}
        if arguments.get("dataset") in MAZE_SIZES:
            data["size"] = MAZE_SIZES[arguments["dataset"]]
        settings["data"] = {"class_path": "tasks.maze.MazeTask", "init_args": data}
    torch.save(
        {
            "ctm": spec,
            "config": settings,
            "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
            "global_step": 0,
            "epoch": 0,
            "pytorch-lightning_version": "2.6.1",
        },
        target,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ctm.compat", description="Released models of the published code.")
    command = parser.add_subparsers(required=True, metavar="convert").add_parser("convert", help="to a checkpoint")
    command.add_argument("source", help="a .pt file, or a folder with config.json and model.safetensors")
    command.add_argument("target", help="the checkpoint to write")
    arguments = parser.parse_args()
    try:
        convert(arguments.source, arguments.target)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {arguments.target}")


if __name__ == "__main__":
    main()
