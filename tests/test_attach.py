"""Adapters in a training run: what trains, what is kept, put on its base again, and what is said about it."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, relative
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import ctm
from ctm import checkpoint, ops
from ctm.encoders import ResNet
from ctm.lit import LitCTM
from svf import SVFConfig
from svf.attach import Adapting, attach, describe, fingerprint, reattach, trained
from tasks import cli
from tasks.maze import MazeTask
from tasks.run import UserError

SIZES = {"d_model": 32, "d_input": 16, "ticks": 3, "heads": 2, "n_synch_out": 8, "n_synch_action": 4}
SIZES |= {"synapse_depth": 1, "memory_length": 3, "dropout": 0.1}
DATA = {"size": 9, "route_length": 30, "n_val": 16, "n_test": 24, "batch_size": 8, "eval_batch_size": 16}
LINEAR = ["query", "q_proj", "k_proj", "v_proj", "out_proj", "head", "project.0", "synapses.1"]
METHODS = {"svf": SVFConfig(target_modules="all-linear"), "lora": LoraConfig(r=2, target_modules=LINEAR)}


def thinker(seed: int = 0) -> ctm.Thinker:
    torch.manual_seed(seed)
    return ctm.Thinker(ResNet(16, stages=1), ctm.CTM(ctm.CTMConfig(**SIZES), (30, 5))).eval()


def save_base(path: Path, seed: int = 0) -> Path:
    """A checkpoint as training writes it, of a model that has not learned anything."""
    model = thinker(seed)
    data = {"class_path": "tasks.maze.MazeTask", "init_args": DATA}
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"ctm": checkpoint.describe(model), "state_dict": state, "config": {"data": data}}, path)
    return path


@pytest.fixture
def base(tmp_path) -> Path:
    return save_base(tmp_path / "base.ckpt")


@pytest.fixture
def train(tmp_path, monkeypatch):
    """`train.py` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CTM_RUN_FOLDER", "")

    def run(*words: object, kind=cli.CLI):
        monkeypatch.setattr(sys, "argv", ["train.py", *cli.spell([str(word) for word in words])])
        return kind()

    return run


class BuildOnly(cli.CLI):
    def instantiate_trainer(self, **kwargs) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def stir(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)


def images(n: int = 3) -> torch.Tensor:
    return torch.rand(n, 3, 9, 9, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------------- without a run


class Module(Adapting, nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


@pytest.mark.parametrize("method", METHODS)
def test_only_the_adapter_trains_and_is_kept(method):
    model = thinker()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module = Module(attach(model, METHODS[method])).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        module.model(images()).predictions.square().sum().backward()
        optimizer.step()
    state = module.state_dict()
    marks = {"svf": "svf_z", "lora": "lora_"}[method]
    assert state.keys() == {name for name, p in module.named_parameters() if p.requires_grad} == trained(module)
    assert state and all(marks in name for name in state)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters() if p.requires_grad)
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "BatchNorm's statistics, too"
    assert module.model.net.synapses[0].training, "dropout is of training"

    other = Module(attach(thinker(), METHODS[method]))
    other.load_state_dict(state)
    module.eval(), other.eval()
    with torch.no_grad():
        assert torch.equal(other.model(images()).predictions, module.model(images()).predictions)
    name = next(iter(state))
    with pytest.raises(ValueError, match="not the state of the same adapter"):
        other.load_state_dict({k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match="not the state of the same adapter"):
        other.load_state_dict(state | {"model.net.z_start": torch.zeros(32)})


def test_parts_that_train_in_full_are_kept_in_full():
    """`modules_to_save`: a BatchNorm that trains counts its statistics, which are kept."""
    config = SVFConfig(target_modules=["query"], modules_to_save=["stem.1"])
    model = thinker()
    assert isinstance(model.encoder.stem[1], nn.BatchNorm2d)
    module = Module(attach(model, config)).train()
    module.model(images())
    kept = {name.rpartition(".")[2]: value for name, value in module.state_dict().items() if "stem" in name}
    assert kept.keys() == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert kept["num_batches_tracked"] == 1


def test_an_adapter_is_put_on_its_base_again_and_on_no_other():
    model = attach(thinker(), METHODS["lora"], "there")
    model.add_adapter("second", LoraConfig(r=3, target_modules=["query"]))
    stir(model)
    model.eval()
    described = describe(model)
    assert described == json.loads(json.dumps(described)) and described["base"] == "there"
    state = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    again = reattach(thinker(), described, state).eval()
    assert list(again.peft_config) == ["default", "second"]
    for adapter in ("default", "second"):
        model.set_adapter(adapter), again.set_adapter(adapter)
        with torch.no_grad():
            assert torch.equal(again(images()).predictions, model(images()).predictions)
    with pytest.raises(ValueError, match="was trained on there with weights"):
        reattach(thinker(seed=1), described, state)
    with pytest.raises(ValueError, match="not the state of these adapters"):
        reattach(thinker(), described, {})


def test_what_was_loaded_in_inference_mode_thinks_and_trains(base):
    with torch.inference_mode():
        model = ctm.load(base)
        model(images())
    attach(model, METHODS["svf"])(images()).predictions.sum().backward()
    assert model.net.query.svf_z["default"].grad.abs().max() > 0


def test_the_fingerprint_is_of_every_value_and_name():
    model = thinker()
    first = fingerprint(model)
    assert first == fingerprint(thinker()) and len(first) == 64
    with torch.no_grad():
        model.net.head.bias[3] += 1e-6
    assert fingerprint(model) != first
    assert fingerprint(nn.Linear(2, 3)) != fingerprint(nn.Sequential(nn.Linear(2, 3)))


def test_an_adapter_needs_a_base_and_something_to_train():
    task = MazeTask(**DATA)

    def build(**more):
        return LitCTM(task, lambda d: ResNet(d, stages=1), ctm=ctm.CTMConfig(**SIZES), **more)

    with pytest.raises(
        ValueError, match=r"model\.adapter needs a trained model: name its checkpoint with model\.base="
    ):
        build(adapter=METHODS["svf"])
    with pytest.raises(ValueError, match=r"model\.old needs"):
        build(old=task)
    with pytest.raises(ValueError, match="nothing to train"):
        attach(thinker(), SVFConfig(target_modules=["query"], inference_mode=True))


# ------------------------------------------------------------------------------------------------------------ the run

FEW = (
    "trainer.val_check_interval=3", "trainer.log_every_n_steps=2", "checkpoint.every=2", "model.optim.warmup=0",
    "data.n_val=16",
)  # fmt: skip


def test_a_run_that_trains_an_adapter(train, base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ops, "said", set())
    monkeypatch.setattr(MazeTask, "headline", "step_accuracy")  # which is not 0 for models that have learned nothing
    words = ("fit", "--config", ROOT / "configs/svf_maze.yaml", f"--model.base={base}", "--data.size", "11", *FEW)
    train(*words, "trainer.max_steps=6", "run=whole")
    printed = capsys.readouterr().out
    assert not ops.said, "the fast path"
    assert "mazes 11x11" in printed and "parameters to train" in printed
    train(*words, "trainer.max_steps=3", "run=half")
    line = train("task=svf_maze", "run=half", "ckpt_path=last", "trainer.max_steps=6")
    assert type(line.model.model) is PeftModel
    whole, half = (tmp_path / "runs/svf_maze" / name for name in ("whole", "half"))
    a, b = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (whole, half))
    assert a["global_step"] == b["global_step"] == 6

    # What trains, and nothing of the base; the same to the bit after a stop.
    assert a["state_dict"].keys() == b["state_dict"].keys() and len(a["state_dict"]) == 14
    assert all(".svf_z." in name and torch.equal(v, b["state_dict"][name]) for name, v in a["state_dict"].items())
    assert any(value.abs().max() > 0 for value in a["state_dict"].values())
    for x, y in zip(*(c["optimizer_states"][0]["state"].values() for c in (a, b)), strict=True):
        assert all(torch.equal(x[name], y[name]) for name in x)
    assert torch.equal(a["rng"]["torch"], b["rng"]["torch"]) and a["loops"] == b["loops"]
    assert a["adapter"] == b["adapter"] and a["adapter"]["base"] == str(base)
    for name in ("metrics.csv", "curves.csv"):
        assert (whole / name).read_bytes() == (half / name).read_bytes()

    # Before and after, of the new mazes and of those that the base was trained for.
    results = json.loads((whole / "test.json").read_text())
    shares = {}
    for name, shown in (("", {"size": 11, "blue_walls": True}), ("old_", {})):
        task = MazeTask(**DATA | shown)
        batches = list(task.test_dataloader())
        for when, path in (("before_", base), ("", whole / "checkpoints/best.ckpt")):
            model = ctm.load(path)
            with torch.no_grad():
                values = torch.cat([task.metrics(model(batch[0]), batch)["step_accuracy"] for batch in batches])
            assert results[f"test/{name}{when}step_accuracy"] == pytest.approx(float(values.mean()))
            shares[f"{name}{when}"] = f"{float(values.mean()):.1%}"
    assert len(set(shares.values())) >= 3
    assert f"step_accuracy, the same samples: {shares['before_']} before, {shares['']} after" in printed
    assert f"the base was trained for: {shares['old_before_']} before, {shares['old_']} after" in printed

    # The expert's own folder, on its base: what the checkpoint is; on another base it is refused.
    best = ctm.load(whole / "checkpoints/best.ckpt")
    expert = PeftModel.from_pretrained(ctm.load(base), whole / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(expert(images()).predictions, best(images()).predictions)
        assert relative(best(images()).predictions, ctm.load(base)(images()).predictions) > 1e-5
    assert expert.peft_config["default"].base_model_name_or_path == str(base)
    other = save_base(tmp_path / "other.ckpt", seed=1)
    with pytest.raises(ValueError, match="this base is"):
        PeftModel.from_pretrained(ctm.load(other), whole / "adapter")

    with pytest.raises(ValueError, match="is an adapter without its base"):
        checkpoint.export(whole / "checkpoints/best.ckpt", tmp_path / "best.safetensors")

    # The other commands read it with its own settings.
    capsys.readouterr()
    train("test", "task=svf_maze", "run=whole", "ckpt_path=best")
    assert f"step_accuracy, the same samples: {shares['before_']} before, {shares['']} after" in capsys.readouterr().out
    save_base(base, seed=1)
    for go in (
        lambda: ctm.load(whole / "checkpoints/best.ckpt"),
        lambda: train("test", "task=svf_maze", "run=whole", "ckpt_path=best"),
    ):
        with pytest.raises((ValueError, UserError), match=r"was trained on .* with weights"):
            go()
    base.unlink()
    with pytest.raises(FileNotFoundError, match="is an adapter, and its base cannot be used: there is no checkpoint"):
        ctm.load(whole / "checkpoints/best.ckpt")
    with pytest.raises(UserError, match=r"model\.base: there is no checkpoint"):
        train("test", "task=svf_maze", "run=whole", "ckpt_path=best")


@pytest.mark.parametrize("words", [["model.adapter=LoraConfig", "model.adapter.r=2"], ["model.adapter=null"]], ids=str)
def test_one_key_makes_it_lora_or_full(words, train, base, tmp_path):
    train("task=svf_maze", f"model.base={base}", "data.size=11", *FEW, "trainer.max_steps=2", "run=x", *words)
    folder = tmp_path / "runs/svf_maze/x"
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    found = ctm.load(folder / "checkpoints/last.ckpt")
    first = thinker().state_dict()
    if words[0] == "model.adapter=null":
        assert state.keys() == {f"model.{name}" for name in first} and not (folder / "adapter").exists()
        moved = [name for name, value in first.items() if not torch.equal(value, state[f"model.{name}"])]
        assert "net.head.weight" in moved and "encoder.stem.1.running_mean" in moved
        assert relative(state["model.net.head.weight"], first["net.head.weight"]) < 0.5, "from the base's weights"
    else:
        assert len(state) == 28 and all(".lora_" in name for name in state)
        expert = PeftModel.from_pretrained(ctm.load(base), folder / "adapter").eval()
        with torch.no_grad():
            assert relative(expert(images()).predictions, found(images()).predictions) < 1e-6
        assert torch.equal(found.net.query.base_layer.weight, first["net.query.weight"])


def directions(model: nn.Module) -> int:
    """Singular values of all linear layers and convolutions."""
    return sum(min(m.weight.flatten(1).shape) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))


def test_the_shipped_model_is_the_default(train):
    line = train("task=svf_maze", kind=BuildOnly)
    shipped = ctm.load("ctm/assets/maze.safetensors")
    assert sum(p.numel() for p in line.model.parameters() if p.requires_grad) == directions(shipped) == 3478
    assert line.model.task.blue_walls and not line.model.old.blue_walls
    assert line.model.task.size == line.model.old.size == 15 and line.model.task.num_workers == 0


def test_a_base_brings_its_sizes_and_data_below_the_file_and_the_words(train, base):
    def built(*words):
        line = train(*words, kind=BuildOnly)
        config = yaml.safe_load(line._parser("fit").dump(line.config.fit, skip_none=False))
        return line, config

    line, config = built("task=svf_maze", f"model.base={base.name}", "data.size=13", "model.ctm.ticks=7")
    arguments = config["model"]["init_args"]
    assert arguments["ctm"]["d_model"] == 32 and arguments["ctm"]["ticks"] == 7 and arguments["net"] == "ctm"
    assert arguments["base"] == str(base), "where it is found from any folder"
    assert (config["data"]["init_args"]["size"], config["data"]["init_args"]["eval_batch_size"]) == (13, 16)
    assert arguments["old"]["init_args"]["size"] == 9 and line.model.old.size == 9
    assert line.model.model.net.config.ticks == 7
    n = sum(p.numel() for p in line.model.parameters() if p.requires_grad)
    assert n == directions(thinker())
    long = built("fit", "--config", ROOT / "configs/svf_maze.yaml", "--model.base", base, "--data.size", "13",
                 "--model.ctm.ticks", "7")[1]  # fmt: skip
    assert {k: v for k, v in long.items() if k != "config"} == {k: v for k, v in config.items() if k != "config"}
    exported = base.with_suffix(".safetensors")
    checkpoint.export(base, exported)
    line, config = built("task=svf_maze", f"model.base={exported}")
    assert line.model.old.size == 9 and config["data"]["init_args"]["eval_batch_size"] == 16, "an exported one, too"
    line, _ = built("task=maze", f"model.base={base}", "data.size=9", *[f"model.ctm.{k}={v}" for k, v in SIZES.items()])
    assert line.model.adapter is None and line.model.task.size == 9, "any task file takes a base"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.adapter=SVFConfg"], "model.adapter=SVFConfg: there is no such class, did you mean 'SVFConfig'?"),
        (["model.adapter.top=3"], "unknown key 'model.adapter.top', did you mean 'model.adapter.top_k'?"),
        (["model.adapter=LoraConfig", "model.adapter.rank=3"], "did you mean 'model.adapter.r'?"),
        (["model.adapter.form=merge"], "model.adapter.form=merge: expected one of 'auto', 'one_sided'"),
        (["model.adapter.target_modules=[nothing]"], "nothing"),
        (["model.old.sise=3"], "unknown key 'model.old.sise', did you mean 'model.old.size'?"),
        (["model.base=gone.ckpt"], "model.base: there is no checkpoint gone.ckpt"),
        (["model.base=null"], "model.encoder is required"),
        (["model.ctm.d_model=64"], "does not fit this model: net.trace_start is (32, 3) there and (64, 3) here"),
        (["data.route_length=40"], "model.old asks for (30, 5) answers (positions, classes), the task for (40, 5)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_answered_in_one_line(words, message, train, base, capsys):
    with pytest.raises((UserError, SystemExit)) as error:
        train("task=svf_maze", f"model.base={base}", *words, kind=BuildOnly)
    printed = str(error.value)
    if isinstance(error.value, SystemExit):
        assert error.value.code == 2
        printed = capsys.readouterr().err.strip()
    assert message in printed and len(printed.splitlines()) == 1


def test_peft_alone_can_adapt_what_ctm_loads(base, tmp_path):
    """No harness: `get_peft_model` on a loaded model, saved and loaded as any adapter is."""
    model = get_peft_model(ctm.load(base), SVFConfig(target_modules="all-linear", init_std=0.1)).eval()
    model.save_pretrained(tmp_path / "expert", save_embedding_layers=False)
    again = PeftModel.from_pretrained(ctm.load(base), tmp_path / "expert").eval()
    with torch.no_grad():
        assert torch.equal(again(images()).predictions, model(images()).predictions)
        merged = model.merge_and_unload()
        assert relative(merged(images()).predictions, again(images()).predictions) < 1e-5
    assert checkpoint.describe(merged) == checkpoint.describe(thinker())
