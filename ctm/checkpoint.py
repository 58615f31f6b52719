"""Checkpoints that describe themselves: a model as plain values, and back. Needs torch alone.

A file written by training holds, beside Lightning's own entries, the key `ctm`: what `describe` returns. `load` needs
nothing but the path. `export` writes the same as a small safetensors file, with the plain values as its metadata.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ctm import encoders
from ctm.baselines import LSTM, FeedForward, FFConfig, LSTMConfig
from ctm.model import CTM, CTMConfig, Thinker

SHIPPED = Path(__file__).parent.parent
"""Where a path such as ctm/assets/maze.safetensors holds from, wherever a program was started."""
EXPORTED = ("ctm", "config", "global_step")
"""What of a checkpoint goes into the metadata of an exported one."""
NETS = {"ctm": (CTM, CTMConfig), "lstm": (LSTM, LSTMConfig), "ff": (FeedForward, FFConfig)}


def describe(model: Thinker) -> dict:
    """The model as plain values; `build` makes it again, with fresh weights."""
    net = model.net
    kind = next(name for name, (cls, _) in NETS.items() if type(net) is cls)
    sizes = {"n_tokens": net.n_tokens, "width": net.width} if kind == "ff" else {}
    return {
        "net": kind,
        "config": asdict(net.config),
        "out_dims": list(net.out_dims),
        "sizes": sizes,
        "d_input": getattr(net.config, "d_input", None),
        "encoder": encoders.describe(model.encoder),
    }


def build(spec: dict) -> Thinker:
    """A model of this description, with fresh weights."""
    cls, config_cls = NETS[spec["net"]]
    encoder = encoders.build(spec["d_input"], **spec["encoder"])
    return Thinker(encoder, cls(config_cls(**spec["config"]), tuple(spec["out_dims"]), **spec["sizes"]))


def arguments(spec: dict) -> dict:
    """The arguments of `ctm.lit.LitCTM`, as in a configuration file, for a model of this description."""
    encoder = {name: value for name, value in spec["encoder"].items() if name != "name"}
    return {
        "net": spec["net"],
        spec["net"]: spec["config"],
        "encoder": {"class_path": f"ctm.encoders.{spec['encoder']['name']}", "init_args": encoder},
    }


def locate(path: str | Path) -> Path:
    """The path from where the program was started, or, where there is no such file, of one that is shipped."""
    path = Path(path)
    return SHIPPED / path if not path.is_file() and (SHIPPED / path).is_file() else path


def read(path: str | Path) -> dict:
    """A checkpoint's content, on the CPU, by `torch.load(weights_only=True)`; or that of a file that `export` wrote.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is not a whole, readable checkpoint.
    """
    path = locate(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        return read_exported(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds here, all of which mean this
        raise ValueError(f"{path} is not a readable checkpoint, or only part of one") from error


def read_exported(path: Path) -> dict:
    """As `read`; numbers that were rounded to bf16 come back as fp32."""
    try:
        with safe_open(path, "pt") as file:
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            about = {name: json.loads(text) for name, text in (file.metadata() or {}).items() if name in EXPORTED}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable checkpoint, or only part of one") from error
    state = {name: value.float() if value.is_floating_point() else value for name, value in values.items()}
    return about | {"state_dict": state}


def export(source: str | Path, target: str | Path) -> None:
    """Writes the model of a checkpoint, without what training needs, as a safetensors file that `load` reads.

    Matrices are rounded to bf16. Vectors (biases, norms and their statistics, decays) stay as they are: they are few.
    The description of the model and the settings of its task and itself are the metadata, as JSON.

    Raises:
        FileExistsError: where the target is there already.
        FileNotFoundError, ValueError: as `load`; or where the target's name does not end in .safetensors.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: the name of an exported model ends in .safetensors")
    if target.exists():
        raise FileExistsError(f"{target} is there already; nothing was written")
    load(source)  # refuses what is no whole model
    content = read(source)
    if "adapter" in content:
        raise ValueError(f"{source} is an adapter without its base; its own small file is in its run's folder adapter")
    config = {name: content.get("config", {}).get(name) for name in ("task", "seed_everything", "model", "data")}
    about = {"ctm": content["ctm"], "config": config, "global_step": content.get("global_step", 0)}
    state = {
        name: (value.bfloat16() if value.is_floating_point() and value.ndim > 1 else value).contiguous()
        for name, value in content["state_dict"].items()
    }
    save_file(state, target, {"format": "pt"} | {name: json.dumps(about[name]) for name in EXPORTED})


@torch.inference_mode(False)  # tensors made in it could never be trained, nor thought with on the fast path
def load(path: str | Path) -> Thinker:
    """The trained model of a checkpoint, in evaluation mode. No Lightning, no task, no configuration needed.

    That of an adapter run, which does not hold its base, is put on the base that it names.

    Raises:
        FileNotFoundError, ValueError: where the file (or its base) is missing, damaged or no checkpoint of a model of
            this package, or the base is no longer the one that was adapted.
    """
    checkpoint = read(path)
    if "ctm" not in checkpoint:
        raise ValueError(f"{path} is a checkpoint, but not of a model of this package: it does not describe one")
    model = build(checkpoint["ctm"])
    state = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()}
    if adapter := checkpoint.get("adapter"):
        from svf.attach import reattach

        try:
            load_weights(model, load(adapter["base"]).state_dict(), adapter["base"])
            reattach(model, adapter, state)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{path} is an adapter, and its base cannot be used: {error}") from error
    else:
        load_weights(model, state, path)
    return model.eval()


def load_weights(model: nn.Module, state: dict, path: str | Path) -> None:
    """Loads a state dict of exactly the model's names and shapes.

    Raises:
        ValueError: naming the first that differs.
    """
    if difference := compare(model.state_dict(), state):
        raise ValueError(f"{path} does not fit this model: {difference}")
    model.load_state_dict(state)


def compare(ours: dict, theirs: dict) -> str | None:
    """The first difference in names or shapes of two state dicts, in words, or None."""
    for name, value in ours.items():
        if name not in theirs:
            return f"it has no {name}"
        if theirs[name].shape != value.shape:
            return f"{name} is {tuple(theirs[name].shape)} there and {tuple(value.shape)} here"
    extra = next((name for name in theirs if name not in ours), None)
    return f"this model has no {extra}" if extra else None
