"""The command line: both forms, every file, precedence, and errors that a person can act on."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from torchvision import datasets

from tasks import cli, image
from tasks.repeat import interval
from tasks.run import UserError

TASKS = sorted(
    str(path.relative_to(ROOT / "configs").with_suffix(""))
    for path in (ROOT / "configs").rglob("*.yaml")
    if "class_path: ctm.lit.LitCTM" in (text := path.read_text()) and "base:" not in text
)  # what starts from a trained model is tested in test_attach.py, language models in test_svf_expert.py
OVERLAYS = sorted(path.stem for path in (ROOT / "configs" / "overlay").glob("*.yaml"))


class ParseOnly(cli.CLI):
    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class BuildOnly(cli.CLI):
    def instantiate_trainer(self, **kwargs) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture
def command(monkeypatch):
    """Reads words as train.py would, and returns the command line object."""

    def read(*words: str, kind=ParseOnly):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        monkeypatch.setattr(sys, "argv", ["train.py", *cli.spell(list(words))])
        return kind()

    return read


@pytest.mark.parametrize("overlay, millions", [("lstm1", 42.3), ("lstm2", 75.9), ("lstm3", 109.4), ("ff", 54.8)])
def test_the_papers_maze_baselines_have_the_sizes_it_prints(overlay, millions, command):
    with torch.device("meta"):
        line = command("task=maze/paper", f"overlay=paper-{overlay}", kind=BuildOnly)
    assert sum(p.numel() for p in line.model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def nets(task: str) -> list[str]:
    """The nets that a task file has to configure: all that its task does not refuse."""
    module, _, name = yaml.safe_load((ROOT / "configs" / f"{task}.yaml").read_text())["data"]["class_path"].rpartition(
        "."
    )
    refused = getattr(importlib.import_module(module), name).refused
    return [net for net in ("ctm", "lstm", "ff") if net not in refused]


def resolved(line) -> dict:
    config = yaml.safe_load(line._parser(line.subcommand).dump(line.config[line.subcommand], skip_none=False))
    config.pop("config", None)
    return config


@pytest.fixture
def data_sets(monkeypatch):
    """Stands for the image sets that are not on this disk: one image of every class."""

    class Published:
        def __init__(self, root, train, download=False):
            n = self.n
            self.data, self.targets = np.zeros((100 * n, 32, 32), np.uint8), np.arange(100 * n) % n
            self.classes = list(map(str, range(n)))

    class Folder:
        classes = list(map(str, range(1000)))

        def __init__(self, root):
            self.samples = [(f"{i}.jpg", i % 1000) for i in range(100_000)]

    kinds = {
        name: type(name, (Published,), {"n": n}) for name, n in (("mnist", 10), ("cifar10", 10), ("cifar100", 100))
    }
    monkeypatch.setattr(image, "PUBLISHED", kinds)
    monkeypatch.setattr(datasets, "MNIST", kinds["mnist"])
    monkeypatch.setattr(datasets, "ImageFolder", Folder)
    monkeypatch.setattr(Path, "is_dir", lambda path: path.name in ("train", "val", "MNIST") or os.path.isdir(path))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_file_names_itself_and_builds_nets_of_one_size(task, command, data_sets):
    sizes = []
    for net in nets(task):
        with torch.device("meta"):
            line = command(f"task={task}", f"model.net={net}", kind=BuildOnly)
        assert resolved(line)["task"] == task
        assert line.model.task is line.datamodule
        sizes.append(sum(p.numel() for p in line.model.parameters()))
    assert max(sizes) / min(sizes) < 1.02, sizes


@pytest.mark.parametrize("task", [task for task in TASKS if "/" not in task])
def test_every_net_learns_from_and_answers_a_batch(task, command):
    for net in nets(task):
        model = command(f"task={task}", f"model.net={net}", "data.batch_size=3", kind=BuildOnly).model
        *inputs, _ = batch = next(iter(model.task.train_dataloader()))
        thought = model(*inputs)
        model.task.loss(thought, batch, model.most_certain).backward()
        without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
        assert not without, net
        values = model.task.metrics(thought, batch, model.most_certain)
        assert {model.task.headline, "ticks", "certainty", "certainty_by_tick"} <= values.keys()
        ticks = thought.predictions.shape[1]
        assert {tuple(value.shape) for value in values.values()} == {(3,), (3, ticks)}
        if (difficulty := model.task.difficulty(batch)) is not None:
            assert difficulty.shape == (3,) and not difficulty.is_floating_point()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_is_read_and_beats_the_task_file(overlay, command):
    content = yaml.safe_load((ROOT / "configs" / "overlay" / f"{overlay}.yaml").read_text())
    config = resolved(command("task=maze", f"overlay={overlay}"))
    for key, value in content.get("trainer", {}).items():
        assert config["trainer"][key] == value
    for key, value in content.get("model", {}).get("init_args", {}).items():
        set_to = config["model"]["init_args"][key]
        assert set_to == value if isinstance(value, str) else value.items() <= set_to.items()
    config = resolved(command(f"overlay={overlay}", "trainer.max_steps=7", "task=maze"))
    assert config["trainer"]["max_steps"] == 7


def test_both_forms_are_the_same(command):
    short = command("task=maze", "model.ctm.ticks=50", "data.size=11", "overlay=fast", "seed_everything=3")
    long = command(
        "fit", "--config", str(ROOT / "configs/maze.yaml"), "--config", str(ROOT / "configs/overlay/fast.yaml"),
        "--model.ctm.ticks", "50", "--data.size=11", "--seed_everything", "3",
    )  # fmt: skip
    assert resolved(short) == resolved(long)
    config = resolved(short)
    assert config["model"]["init_args"]["ctm"]["ticks"] == 50
    assert config["data"]["init_args"]["size"] == 11
    assert config["trainer"]["max_epochs"] == -1, "base.yaml holds for both"


def test_the_published_maze_run(command):
    line = command("task=maze/paper", kind=BuildOnly)
    assert sum(p.numel() for p in line.model.model.parameters()) == 31_998_330
    config = resolved(line)
    optim, data = config["model"]["init_args"]["optim"], config["data"]["init_args"]
    published = {"lr": 1e-4, "warmup": 10_000, "steps": 1_000_000, "final_lr": 1e-7, "weight_decay": 0.0}
    assert optim == published | {
        "muon": False, "beta2": 0.999, "eps": 1e-8, "no_decay": [], "clip_quantile": None, "clip_history": 1000
    }  # fmt: skip
    assert (data["size"], data["route_length"], data["batch_size"], data["lookahead"]) == (39, 100, 64, 5)
    assert data["pace"] == 0 and data["augment"] and not data["expand_range"] and data["algorithm"] == "depth_first"
    assert config["trainer"]["max_steps"] == 1_000_000 and config["trainer"]["gradient_clip_val"] is None


@pytest.mark.parametrize(
    ("task", "n"),
    [
        ("parity/paper", 5_719_714),
        ("sort/paper", 897_197),
        ("qamnist/paper", 3_413_772),
        ("image/cifar10", 1_032_648),
        ("image/imagenet", 185_989_886),
        ("parity/quick", 5_719_714),
        ("maze/ablation", 8_967_160),
        ("maze/quick", 8_967_160),
    ],
)
def test_published_models_have_the_published_number_of_parameters(task, n, command, data_sets):
    with torch.device("meta"):
        line = command(f"task={task}", kind=BuildOnly)
    assert sum(p.numel() for p in line.model.model.parameters()) == n


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=mase"], "there is no task 'mase', did you mean 'maze'?"),
        (["task=maze", "overlay=fats"], "there is no overlay 'fats', did you mean 'fast'?"),
        (["task=maze", "model.ctm.tick=50"], "unknown key 'model.ctm.tick', did you mean 'model.ctm.ticks'?"),
        (["task=maze", "trainer.max_step=3"], "unknown key 'trainer.max_step', did you mean 'trainer.max_steps'?"),
        (["task=maze", "data.siz=9"], "unknown key 'data.siz', did you mean 'data.size'?"),
        (["task=maze", "checkpoint.evry=9"], "unknown key 'checkpoint.evry', did you mean 'checkpoint.every'?"),
        (["task=maze", "model.ctm.ticks=many"], "model.ctm.ticks=many: expected int"),
        (["task=maze", "trainer.max_steps=x"], "trainer.max_steps=x: expected int"),
        (["task=maze", "model.net=gru"], "model.net=gru: expected one of 'ctm', 'lstm', 'ff'"),
        (["task=maze", "data.size=10"], "data.size=10: the side of a maze is odd"),
        (["task=maze", "model.ctm.heads=3"], "d_input=64 must be a multiple of heads=3"),
        (["task=maze", "model.encoder.depth=19"], "model.encoder.depth=19: expected one of 18, 34, 50, 101, 152"),
        (["task=sort", "model.net=ff"], "model.net=ff: sorting is said one number a tick"),
        (["task=qamnist", "model.net=ff"], "model.net=ff: digits and question come one after the other"),
        (["task=sort", "data.n=10"], "model.ctm.d_input=8 must be 10"),
        (["task=sort", "model.ctm.ticks=7"], "model.ctm.ticks=7 must be at least 8 in this task"),
        (["task=sort", "model.net=lstm", "model.lstm.heads=2"], "model.lstm.heads=2: nothing can be attended to"),
        (["task=parity", "model.net=lstm", "model.lstm.heads=0"], "model.lstm.heads=0: this task needs attention"),
        (["task=parity", "model.lstm.heads=3"], "d_input=64 must be a multiple of heads=3"),
        (["task=parity", "model.ctm.query_std=-1"], "query_std=-1.0 must be at least 0"),
        (["task=parity", "model.encoder.place_gain=0"], "model.encoder.place_gain=0.0 must be above 0"),
        (["task=parity", "data.lookahead=1.5"], "data.lookahead=1.5: expected int or null"),
        (["task=maze", "early_exit=2"], "early_exit=2.0 must be a certainty from 0 to 1"),
        (["task=maze", "early_exit=0.8", "model.net=ff"], "early_exit=0.8: a feed-forward net has one tick"),
        (["task=sort", "early_exit=0.8"], "early_exit=0.8: the answer of sorting is what is said at all ticks"),
        (["task=maze", "model.optim.no_decay=[bais]"], "model.optim.no_decay: 'bais' is in no parameter's name"),
        (["task=maze", "model.optim.clip_quantile=2"], "model.optim.clip_quantile=2.0 must be above 0"),
        (["task=maze", "model.optim.clip_quantile=x"], "model.optim.clip_quantile=x: expected float or null"),
        (["task=maze", "model.optim.beta2=1"], "model.optim needs 0 <= beta2 < 1"),
        (["task=image", "data.name=imagenet"], "there is no folder train"),
        (["task=image", "data.size=9"], "data.size=9: the images of digits have 8 pixels a side"),
        (["task=qamnist", "data.source=mnist"], "data.source=mnist: put its files in"),
        (["task=maze", "ckpt_path=last"], "there is no last.ckpt under runs/maze"),
        (["task=maze", "ckpt_path=gone.ckpt"], "there is no checkpoint gone.ckpt"),
        (["ckpt_path=last"], "needs task=NAME"),
        (["fit", "--config", "gone.yaml"], "there is no configuration file 'gone.yaml'"),
        (["task=maze", "ticks"], "cannot read 'ticks'"),
        (["fit"], "name a task"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_answered_in_one_line(words, message, command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, SystemExit)) as error:
        command(*words, kind=BuildOnly)
    if isinstance(error.value, SystemExit):
        assert error.value.code == 2
        printed = capsys.readouterr().err.strip()
        assert len(printed.splitlines()) == 1
    else:
        printed = str(error.value)
    assert message in printed
    assert list(tmp_path.iterdir()) == []


def test_null_takes_an_option_back(command):
    """At every depth: an argument of the task, of the net's sizes, of the optimiser."""
    words = ("data.lookahead=null", "model.ctm.nlm_dropout=null", "model.optim.clip_quantile=null")
    config = resolved(command("task=parity/quick", *words))
    assert config["data"]["init_args"]["lookahead"] is None
    assert config["model"]["init_args"]["ctm"]["nlm_dropout"] is None
    assert config["model"]["init_args"]["optim"]["clip_quantile"] is None
    assert config["model"]["init_args"]["optim"]["muon"] is True


def test_help_explains_the_keys(command, capsys):
    with pytest.raises(SystemExit):
        command("fit", "--help")
    assert "--trainer.max_steps" in capsys.readouterr().out


def test_interval_is_students():
    middle, half = interval([0.8, 0.82, 0.87])
    assert middle == pytest.approx(0.83)
    assert half == pytest.approx(4.302653 * 0.0360555 / 3**0.5, rel=1e-4)


@pytest.mark.parametrize("module", ["tasks.cli", "ctm.lit", "ctm.demo"])
def test_what_peft_imports_keeps_quiet(module):
    """torchao and bitsandbytes, of which the tests' environment has both, say at import what they lack."""
    said = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=True)
    assert not said.stdout + said.stderr
