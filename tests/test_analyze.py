"""Watching: recordings, figures, the analysis of every task and net, what W&B is told, sweeps."""

import csv
import json
import re
import struct
import sys
from base64 import b64decode
from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_compat import MAZE, released
from torchmetrics.functional.classification import binary_calibration_error

from ctm import compat, record
from ctm.baselines import LSTM, LSTMConfig
from ctm.model import CTM, CTMConfig
from tasks import analyze, cli, figures, repeat
from tasks.run import Media, UserError, sample_rows
from tasks.seen import Seen, Survey, batches, learned_decays, of_split, spread, survey, telling, watch

SMALL = {
    "model.ctm.d_model": 24, "model.ctm.n_synch_out": 6, "model.ctm.n_synch_action": 6, "model.ctm.ticks": 3,
    "model.lstm.ticks": 3, "model.ctm.memory_length": 3, "data.n_test": 24, "data.n_val": 16,
}  # fmt: skip


class BuildOnly(cli.CLI):
    def instantiate_trainer(self, **kwargs) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture
def module(monkeypatch):
    """The LitCTM of a task file, small."""

    def build(task: str, net: str = "ctm", **changes):
        changes = SMALL | {"model.net": net} | changes
        if task == "image":
            changes = {key: value for key, value in changes.items() if not key.startswith("data.n_")}
        if task in ("sort", "qamnist"):
            changes.pop("model.ctm.ticks"), changes.pop("model.lstm.ticks")
        if task == "sort":
            changes.pop("model.ctm.n_synch_action")
        words = [f"task={task}", *(f"{key}={value}" for key, value in changes.items())]
        monkeypatch.setattr(sys, "argv", ["train.py", *cli.spell(words)])
        return BuildOnly().model

    return build


# ---------------------------------------------------------------------------------------------------------- recording


@pytest.mark.parametrize("path", ["auto", "naive"])
def test_a_recording_knows_the_ticks_at_which_it_looked(path, monkeypatch):
    monkeypatch.setenv("CTM_OPS", path)
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_input": 8, "heads": 2, "n_synch_out": 4, "n_synch_action": 4, "memory_length": 3}
    net = CTM(CTMConfig(**sizes), (1, 5)).eval()
    one, other = torch.randn(2, 2, 6, 8).unbind(0)
    reads = [one] * 2 + [torch.zeros(2, 8)] + [other] * 28
    with torch.no_grad(), record(net) as seen:
        thought = net(reads)
    assert seen.attention_ticks == [0, 1, *range(3, 31)]
    assert seen.attention.shape == (30, 2, 2, 6) and seen.ticks == len(seen.pre_activations) == 31
    assert torch.equal(seen.sync_out[-1], thought.sync) and len(seen.sync_out) == 31


def test_the_hidden_state_of_an_lstm_is_recorded():
    torch.manual_seed(0)
    net = LSTM(LSTMConfig(d_model=10, d_input=8, ticks=4, heads=2, layers=2), (1, 5))
    with torch.no_grad(), record(net) as seen:
        thought = net(torch.randn(3, 6, 8))
    assert seen.post_activations.shape == (4, 3, 10) and seen.attention_ticks == [0, 1, 2, 3]
    assert torch.equal(seen.post_activations[-1], thought.state.hidden[-1])
    assert seen.pre_activations is None and seen.sync_out is None


# ------------------------------------------------------------------------------------------------------------ figures


def lines(figure) -> list:
    return [line for axes in figure.axes for line in axes.get_lines()]


def test_a_maze_moves_from_tick_to_tick_and_does_not_jump():
    walls = np.ones((9, 9), bool)
    walls[1, 1:8] = False
    routes = [[(1, 1)], [(1, 1), (1, 2)], [(1, 1), (1, 2), (1, 3)]]
    attention = np.random.default_rng(0).dirichlet(np.ones(25), (3, 2))
    right = [(1, column) for column in range(1, 8)]
    moving = figures.maze(walls, (1, 1), (1, 7), right, routes, np.array([0.2, 0.9, 0.5]), 1, attention)
    left = next(axes for axes in moving.figure.axes if "Route" in axes.get_title("left"))
    drawn = next(line for line in left.get_lines() if line.get_animated() and line.get_ls() == "-")
    for tick, places in enumerate(routes):
        moving.to(tick)
        assert drawn.get_xydata().tolist() == [[column, row] for row, column in places]
    assert "tick 3 of 3" in left.get_title("left")
    images = figures.frames(moving)
    assert len(images) == 3 and {image.width for image in images} == {830}
    pixels = [np.asarray(image.convert("RGB")).astype(int) for image in images]
    changed = [np.abs(a - b).max(-1) > 40 for a, b in pairwise(pixels)]
    assert all(0.0005 < share.mean() < 0.3 for share in changed), "something moves, and most stays"


def test_calibration_is_the_expected_calibration_error():
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.02, 0.98, 400)
    right = (rng.uniform(size=400) < sure**2).astype(float)
    drawn = figures.calibration({"all": (sure, right)})
    label = drawn.axes[0].get_legend_handles_labels()[1][-1]
    # of a binary prediction torchmetrics takes the probability of 1 as its confidence
    error = binary_calibration_error(torch.tensor(sure), torch.tensor(right).long(), n_bins=15)
    assert label == f"all: error {float(error):.1%}"


def test_neurons_in_the_plane_are_principal_components():
    rng = np.random.default_rng(0)
    waves = np.sin(np.linspace(0, 6, 40)[:, None] * rng.uniform(0.5, 2, 12)) + 0.1 * rng.standard_normal((40, 12))
    place, explained = figures.plane(waves)
    standard = ((waves - waves.mean(0)) / waves.std(0)).T
    theirs = pytest.importorskip("sklearn.decomposition").PCA(2, svd_solver="full").fit(standard)
    np.testing.assert_allclose(np.abs(place), np.abs(theirs.transform(standard)), atol=1e-8)
    np.testing.assert_allclose(explained, theirs.explained_variance_ratio_, atol=1e-10)


def test_pairs_as_a_matrix():
    square = figures.matrix(np.arange(6.0), mirrored=True)
    assert square.tolist() == [[0, 1, 2], [1, 3, 4], [2, 4, 5]]
    assert np.isnan(figures.matrix(np.arange(6.0), mirrored=False)[2, 0])
    assert figures.matrix(np.arange(5.0), mirrored=True) is None


def test_intervals_of_shares_are_wilsons():
    assert figures.share_with_interval(np.array([1] * 8 + [0] * 2)) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert figures.share_with_interval(np.ones(5))[2] == pytest.approx(1)


def test_success_and_thinking_time_by_difficulty():
    hard, tick, right = np.array([2, 2, 2, 8]), np.array([1.0, 2, 3, 7]), np.array([1, 1, 0, 0])
    left, chart = figures.by_difficulty(hard, tick, right, 10, "moves", "reached").axes
    assert left.containers[0][0].get_xydata() == pytest.approx(np.array([[2, 2 / 3], [8, 0]]))
    assert chart.containers[0][0].get_xydata() == pytest.approx(np.array([[2, 2], [8, 7]]))
    assert (left.get_xlabel(), chart.get_ylabel()) == ("moves", "tick of the answer")


def test_what_is_shown_is_solved_and_failed_by_turns():
    hard = np.array([1, 5, 3, 2, 9, 7])
    values = {"ticks": np.ones(6), "solved": np.array([1, 1, 1, 0, 0, 1])}
    survey = Survey(values, {}, hard, {}, None, {})
    assert telling(survey, "solved", 4) == [5, 3, 2, 4], "hardest solved, easiest failure, middling, next failure"
    assert telling(survey, "solved", 9)[-1] in (0, 1) and len(telling(survey, "solved", 9)) == 6


def test_batches_are_of_one_shape():
    samples = [(np.zeros(n),) for n in (3, 3, 3, 4, 4, 3)]
    assert list(batches(samples, 2)) == [[0, 1], [2], [3, 4], [5]]


# ----------------------------------------------------------------------------------------------------------- analysis

NEURAL = {"neurons", "traces"}
CTM_ONLY = {"synchronization", "decays"}
OF_MANY = {"over_ticks", "thinking_time", "difficulty", "calibration"}


@pytest.mark.parametrize(
    ("task", "net", "has", "lacks"),
    [
        ("maze", "ctm", NEURAL | CTM_ONLY | OF_MANY | {"maze", "positions", "reapplication"}, set()),
        ("maze", "ff", {"maze", "over_ticks", "calibration"}, NEURAL | CTM_ONLY | {"thinking_time"}),
        ("image", "ctm", NEURAL | CTM_ONLY | OF_MANY - {"difficulty"} | {"image"}, {"positions"}),
        ("parity", "lstm", NEURAL | OF_MANY | {"parity", "positions"}, CTM_ONLY),
        ("sort", "ctm", NEURAL | CTM_ONLY | OF_MANY - {"calibration"} | {"sort"}, {"calibration"}),
        ("qamnist", "ctm", NEURAL | CTM_ONLY | OF_MANY | {"question"}, {"positions"}),
    ],
)
def test_every_task_and_net_has_pictures_that_apply(task, net, has, lacks, module, monkeypatch):
    monkeypatch.setattr("tasks.maze.REAPPLY", 2)
    extra = {"data.source": "digits", "data.n_test": 32} if task == "qamnist" else {}
    lit = module(task, net, **extra)
    task = lit.task
    samples = of_split(task, "test", spread(task, "test", 6))
    surveyed = survey(lit, samples)
    assert surveyed.n == 6 and all(values.shape == (6,) for values in surveyed.values.values())
    seen = Seen(
        watch(lit, [samples[i] for i in telling(surveyed, task.headline, 2)]), learned_decays(lit.model), surveyed
    )
    pictures = task.figures(seen)
    names = [picture.name.removeprefix("sample-1-") for picture in pictures]
    assert set(names) >= has and not set(names) & lacks and len(set(names)) == len(names)
    for picture in pictures:
        drawn = picture.draw()
        moves = isinstance(drawn, figures.Moving)
        assert (drawn.figure if moves else drawn).get_figwidth() == figures.WIDTH
        if moves:
            drawn.to(0)
    assert not getattr(lit.model.net, "recordings", []), "nothing goes on being recorded"
    assert not any(part._forward_hooks for part in lit.model.modules())


def test_what_is_watched_is_what_is_surveyed(module):
    """One by one while recorded, in batches without: the same answers."""
    lit = module("parity")
    samples = of_split(lit.task, "test", range(5))
    surveyed, watched = survey(lit, samples), watch(lit, samples)
    assert lit.training, "as it was before"
    for name, values in surveyed.values.items():
        assert [sample.values[name] for sample in watched] == pytest.approx(values.tolist(), abs=1e-5), name
    sure, right = surveyed.confidence["the answer"]
    said = np.concatenate([sample.probabilities[sample.answer] for sample in watched])
    np.testing.assert_allclose(said.max(-1), sure, atol=1e-5)
    assert (said.argmax(-1) == np.concatenate([sample.batch[1] for sample in watched])).tolist() == right.astype(
        bool
    ).tolist()


def test_a_maze_solved_is_said_in_arrows(module):
    lit = module("maze")
    [sample] = watch(lit, [lit.task.dataset("test")[0]])
    moves = lit.task.dataset("test").maze(0).route
    sample.probabilities[sample.answer] = np.eye(5)[(moves + [4] * 30)[:30]]
    [row] = sample_rows(lit.task, [sample])
    assert row["prediction"] == row["right answer"] == "".join("↑↓←→"[move] for move in moves)
    assert row["ticks"] == sample.answer + 1
    [picture] = lit.task.solving(sample, "sample-1")
    assert f"is {len(moves)} moves from the start" in picture.caption


def test_question_and_answer_ticks_are_told_apart(module):
    lit = module("qamnist", **{"data.source": "digits", "data.n_test": 32})
    [sample] = watch(lit, [lit.task.dataset("test")[31]])
    config = lit.model.encoder.config
    digits, parts = len(sample.batch[0]), len(sample.batch[1])
    assert sample.first == digits * config["digit_ticks"] + parts * config["question_ticks"]
    assert len(sample.certainty) == config["answer_ticks"]
    assert sample.attention_ticks == list(range(digits * config["digit_ticks"]))


def run(words: list[str], monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *cli.spell(words)])
    monkeypatch.delenv("CTM_RUN_FOLDER", raising=False)
    cli.CLI()


def test_analyze_on_the_command_line(monkeypatch, tmp_path, capsys):
    """The analysis of a run, and a checkpoint of another task."""
    monkeypatch.setattr("tasks.maze.REAPPLY", 1)
    small = [f"{key}={value}" for key, value in SMALL.items()] + ["data.batch_size=4", "trainer.logger=false"]
    run(["task=maze", *small, "overlay=fast", "run=m"], monkeypatch, tmp_path)
    run(["analyze", "task=maze", "ckpt_path=last", "run=m", "n=5", "shown=1"], monkeypatch, tmp_path)
    [folder] = (tmp_path / "runs/maze").glob("*-analyze")
    assert {p.name for p in folder.iterdir()} == {"report.html", "media", "samples.csv", "analysis.json", "config.yaml"}
    assert "of 5 test samples" in capsys.readouterr().out
    media = {path.name: Image.open(path) for path in (folder / "media").iterdir()}
    assert {"sample-1-maze.gif", "neurons.gif", "over_ticks.png"} <= set(media)
    assert {image.width for name, image in media.items() if name.endswith("gif")} == {830}
    page = (folder / "report.html").read_text()
    assert not re.search(r"https?://|<link|@import|url\(", page), "nothing from a network"
    sources = re.findall(r'src="([^"]+)"', page)
    assert len(sources) == sum(image.n_frames if name.endswith("gif") else 1 for name, image in media.items())
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert page.count(" hidden>") == sum(image.n_frames - 1 for name, image in media.items() if name.endswith("gif"))
    assert "img[hidden] { display: none }" in page, "of every animation one tick is shown"
    assert Image.open(BytesIO(b64decode(sources[0].partition(",")[2]))).width == 830
    result = json.loads((folder / "analysis.json").read_text())
    assert result["n"] == 5 and 0 <= result["reached"] <= 1
    rows = list(csv.DictReader((folder / "samples.csv").open()))
    assert [row["sample"] for row in rows] == ["1"] and set(rows[0]["right answer"]) <= set("↑↓←→")
    checkpoint = tmp_path / "runs/maze/m/checkpoints/last.ckpt"
    before = sorted(path.name for path in (tmp_path / "runs/maze").iterdir())
    with pytest.raises(UserError, match="n=0 and shown=4 must be at least 1"):
        run(["analyze", "task=maze", "ckpt_path=last", "run=m", "n=0"], monkeypatch, tmp_path)
    assert sorted(path.name for path in (tmp_path / "runs/maze").iterdir()) == before
    for subcommand in ("analyze", "test"):
        with pytest.raises(UserError, match="is a checkpoint of task=maze, not of task=parity"):
            cli.spell([subcommand, "task=parity", f"ckpt_path={checkpoint}"])
    assert cli.spell(["analyze", "task=maze/ablation", f"ckpt_path={checkpoint}"])[0] == "analyze"


def test_a_converted_checkpoint_is_analyzed(monkeypatch, tmp_path):
    torch.manual_seed(0)
    torch.save(released(compat.export(compat.build("ctm", MAZE))), tmp_path / "old.pt")
    compat.convert(tmp_path / "old.pt", tmp_path / "new.ckpt")
    monkeypatch.setattr("tasks.maze.REAPPLY", 1)
    monkeypatch.setattr("tasks.maze.MazeTask.figures", lambda self, seen: self.solving(seen.samples[0], "sample-1"))
    words = ["analyze", "task=maze", "ckpt_path=new.ckpt", "n=3", "shown=1", "run=c"]
    monkeypatch.chdir(tmp_path)
    run(words, monkeypatch, tmp_path)
    with Image.open(tmp_path / "runs/maze/c/media/sample-1-maze.gif") as gif:
        assert gif.n_frames == MAZE["iterations"]
    assert json.loads((tmp_path / "runs/maze/c/analysis.json").read_text())["checkpoint"].endswith("new.ckpt")


def test_without_matplotlib_analysis_ends_and_training_goes_on(module, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "tasks.figures")
    monkeypatch.delattr("tasks.figures")
    with pytest.raises(UserError, match="figures need Matplotlib and Pillow"):
        analyze.analyze(module("parity"), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    small = [f"{key}={value}" for key, value in SMALL.items()] + ["trainer.logger=false", "trainer.max_steps=2"]
    run(["task=parity", *small, "overlay=fast", "run=m", "media_every=2"], monkeypatch, tmp_path)
    assert "no pictures: figures need Matplotlib" in capsys.readouterr().out
    assert (tmp_path / "runs/parity/m/test.json").exists()


def test_what_has_no_ticks_is_neither_drawn_nor_analyzed(monkeypatch, tmp_path, capsys):
    small = [f"{key}={value}" for key, value in SMALL.items()] + ["trainer.logger=false", "trainer.max_steps=2"]
    monkeypatch.setattr("tasks.base.Task.in_ticks", False)
    run(["task=parity", *small, "overlay=fast", "run=m", "media_every=2"], monkeypatch, tmp_path)
    assert not (tmp_path / "runs/parity/m/media").exists() and "pictures" not in capsys.readouterr().out
    with pytest.raises(UserError, match="this task is not solved in ticks"):
        run(["analyze", "task=parity", "ckpt_path=last", "run=m"], monkeypatch, tmp_path)
    assert [path.name for path in (tmp_path / "runs/parity").iterdir()] == ["m"]


def test_media_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match=r"media\.samples=0 at least 1"):
        Media(samples=0)
    assert spread(type("Task", (), {"dataset": lambda self, split: range(10)})(), "val", 4) == [0, 3, 6, 9]


@pytest.mark.gpu
def test_analysis_on_a_gpu(module, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.maze.REAPPLY", 2)
    lit = module("maze")
    here = watch(lit, [lit.task.dataset("test")[0]])[0]
    there = watch(lit.to("cuda"), [lit.task.dataset("test")[0]])[0]
    for name in ("probabilities", "certainty", "attention", "pre", "post"):
        np.testing.assert_allclose(getattr(there, name), getattr(here, name), atol=2e-2)
    assert analyze.analyze(lit, tmp_path, n=6, shown=2).stat().st_size > 100_000


# ---------------------------------------------------------------------------------------------------------------- W&B


def records(path) -> list:
    """Everything in a W&B file: LevelDB's log format, 32 KiB blocks of (checksum, length, kind) and a protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, found, part, at = path.read_bytes(), [], b"", 7
    while at < len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(part)
            found.append(record)
            part = b""
    return found


def test_what_an_offline_run_tells_wandb(train, tmp_path):
    small = [f"{key}={value}" for key, value in SMALL.items()]
    process = train(
        "task=maze", *small, "data.batch_size=4", "overlay=fast", "run=w", "media_every=4",
        WANDB_MODE=None, WANDB_API_KEY=None, HOME=str(tmp_path),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    media = tmp_path / "runs/maze/w/media"
    pictures = {p.name for p in (media / "step-0000004").iterdir()}
    assert pictures >= {"sample-1-maze.gif", "sample-2-maze.gif", "neurons.gif", "traces.png", "decays.png"}
    assert [p.name for p in (media / "test").iterdir()] == ["sample-maze.gif"]
    [path] = (tmp_path / "runs/maze/w/wandb").glob("offline-run-*/run-*.wandb")
    told = records(path)
    rows = []
    for one in told:
        if one.HasField("history"):
            items = one.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    keys = {key for row in rows for key in row}
    assert keys >= {"train/loss", "train/reached", "optim/grad_norm", "optim/lr", "speed/steps_per_second"}
    assert keys >= {"speed/samples_per_second", "val/reached", "val/certainty", "val/ticks", "test/reached"}
    assert {key.partition("/")[0] for key in keys if "/" in key and not key.startswith("_")} <= {
        "train", "val", "test", "optim", "speed", "samples", "trainer",
    }  # fmt: skip
    assert not {key for key in keys if re.search(r"_by_tick/\d", key)}, "a curve is one chart"
    axis = "trainer/global_step"
    assert [row[axis] for row in rows if "train/loss" in row] == [0, 1, 2, 3]
    kinds = {key.removesuffix("/_type"): value for row in rows for key, value in row.items() if key.endswith("/_type")}
    assert kinds["samples/sample-1-maze"] == kinds["samples/neurons"] == kinds["test/sample-maze"] == "video-file"
    assert kinds["samples/traces"] == "image-file" and kinds["samples/table"] == "table-file"
    [table] = (path.parent / "files/media/table/samples").glob("table_*.json")
    table = json.loads(table.read_text())
    assert table["columns"] == ["sample", "prediction", "right answer", "reached", "certainty", "ticks"]
    assert len(table["data"]) == 2
    charts = {
        item.nested_key[2]
        for one in told if one.HasField("config") for item in one.config.update
        if list(item.nested_key[:2]) == ["_wandb", "visualize"]
    }  # fmt: skip
    assert charts >= {"val/solved_by_tick", "val/certainty_by_tick", "test/step_accuracy_by_tick"}
    metrics = {(one.metric.name or one.metric.glob_name): one.metric for one in told if one.HasField("metric")}
    assert metrics["*"].step_metric == axis
    assert metrics["val/reached"].summary.max and metrics["val/reached"].step_metric == axis
    assert metrics["val/loss"].summary.min and metrics["epoch"].options.hidden
    config = {
        item.key or item.nested_key[0]: json.loads(item.value_json)
        for one in told if one.HasField("run") for item in one.run.config.update
    }  # fmt: skip
    assert config["model"]["ctm"]["d_model"] == 24 and config["data"]["class"] == "tasks.maze.MazeTask"


# ------------------------------------------------------------------------------------------------------------- sweeps


def test_the_sweep_file_is_what_wandbs_agent_runs(monkeypatch):
    from wandb.sdk.launch.sweeps import utils

    config = utils.load_sweep_config(str(ROOT / "configs/sweep.yaml"))
    assert (ROOT / config["program"]).is_file()
    assert config["metric"]["goal"] in ("maximize", "minimize") and config["method"] in ("grid", "random", "bayes")
    assert set(config) <= {
        "program", "project", "entity", "name", "description", "method", "metric", "command", "parameters",
        "early_terminate", "run_cap",
    }  # fmt: skip
    for spec in config["parameters"].values():
        assert set(spec) <= {"value", "values", "min", "max", "distribution", "mu", "sigma", "q", "probabilities"}
    drawn = {name: {"value": spec["values"][-1]} for name, spec in config["parameters"].items()}
    macros = utils.create_sweep_command_args({"args": drawn})
    words = []
    for chunk in utils.create_sweep_command(config["command"]):
        name = chunk[2:-1] if chunk.startswith("${") else None
        words += macros.get(name, []) if name else [chunk]
    assert words[0] == "task=maze"
    monkeypatch.setattr(sys, "argv", ["train.py", *cli.spell(words)])
    line = BuildOnly()
    assert line.model.model.net.config.ticks == 8 and line.model.optim.lr == 3e-3
    assert config["metric"]["name"] == f"val/{line.datamodule.headline}"


def test_a_sweep_is_a_local_grid():
    words = repeat.sweep_words(str(ROOT / "configs/sweep.yaml"))
    rest, axes = repeat.grid([*words, "model.optim.lr=1e-2", "model.optim.no_decay=[bias,norm]"])
    assert axes == {"model.ctm.ticks": ["4", "6", "8"], "seed_everything": ["0", "1", "2"]}
    assert "task=maze" in rest and rest[-2:] == ["model.optim.lr=1e-2", "model.optim.no_decay=[bias,norm]"]
    assert repeat.values_of("[1,2],3,{a: 1,b: 2}") == ["[1,2]", "3", "{a: 1,b: 2}"]


def test_what_is_no_grid_is_said(tmp_path):
    path = tmp_path / "sweep.yaml"
    for text, message in [
        ("parameters:\n  a: {min: 0, max: 1}", "a has no `values`"),
        ("method: grid", "cannot be read as a sweep"),
        ("a: [", "cannot be read as a sweep"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            repeat.sweep_words(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        repeat.sweep_words(str(tmp_path / "gone.yaml"))


def test_a_grid_is_reported_best_first(capsys):
    rows = [
        {"model.ctm.ticks": ticks, "seed": seed, "headline": "reached", "test/reached": value}
        for ticks, values in (("4", (0.2, 0.3)), ("6", (0.5, 0.7)))
        for seed, value in enumerate(values)
    ]
    rows[0] = {"model.ctm.ticks": "4", "seed": 0}  # its loss was not finite
    repeat.report("maze", {"model.ctm.ticks": ["4", "6"]}, {"model.ctm.ticks": "ticks"}, [0, 1], rows)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[3:]] == ["ticks=6", "ticks=4", "ticks=4"]
    assert "0.6000 ± 1.2706" in printed[3] and "not finite in 1 of 2 runs" in printed[5]
