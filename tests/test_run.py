"""A run: its folder, exact resume after every kind of end, and what it refuses."""

import csv
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image

import ctm
from tasks.run import Checkpoints, Table, write_aside

TINY = (
    "task=maze", "data.batch_size=8", "data.n_val=16", "data.n_test=16", "data.eval_batch_size=16",
    "model.ctm.d_model=32", "model.ctm.n_synch_out=8", "model.ctm.n_synch_action=4", "model.ctm.ticks=3",
    "model.ctm.dropout=0.1", "model.encoder.stages=1", "trainer.val_check_interval=4", "trainer.log_every_n_steps=3",
    "checkpoint.every=3",
)  # fmt: skip


def test_the_best_is_the_latest_of_equals():
    checkpoints, new = Checkpoints(), []
    for value in (0.0, 0.0, 0.5, 0.4, 0.5):
        checkpoints.best_is_new = False
        trainer = SimpleNamespace(
            callback_metrics={"val/solved": torch.tensor(value)}, datamodule=SimpleNamespace(headline="solved"),
            state=SimpleNamespace(fn="fit"),
        )  # fmt: skip
        checkpoints.on_validation_end(trainer, None)
        new.append(checkpoints.best_is_new)
    assert new == [True, True, True, False, True] and checkpoints.best == 0.5


def checkpoint(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same_run(one: Path, other: Path) -> None:
    """Every weight, moment, metric and random number generator, to the bit."""
    a, b = checkpoint(one), checkpoint(other)
    assert a["global_step"] == b["global_step"]
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key
    for x, y in zip(
        a["optimizer_states"][0]["state"].values(), b["optimizer_states"][0]["state"].values(), strict=True
    ):
        assert all(torch.equal(x[name], y[name]) for name in x)
    assert torch.equal(a["rng"]["torch"], b["rng"]["torch"])
    assert a["loops"] == b["loops"] and a["lr_schedulers"] == b["lr_schedulers"]
    for name in ("metrics.csv", "curves.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    results = [
        {k: v for k, v in json.loads((run / "test.json").read_text()).items() if k != "checkpoint"}
        for run in (one, other)
    ]
    assert results[0] == results[1]
    best = [checkpoint(run, "best") for run in (one, other)]
    assert best[0]["global_step"] == best[1]["global_step"]


def ok(process) -> str:
    assert process.returncode == 0, process.stderr[-3000:] + process.stdout[-1000:]
    return process.stdout


@pytest.mark.slow
def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(train, tmp_path):
    tests = [train("test", *TINY, "data.n_test=4", wait=False) for _ in range(4)]
    for process in tests:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-2000:]
    assert len(list(tmp_path.glob("runs/maze/*-test*/test.json"))) == 4


def test_a_run_its_folder_and_its_continuation(train, tmp_path):
    printed = ok(
        train(*TINY, "run=whole", "trainer.max_steps=12", "media_every=10", "media.samples=1")
    )  # which changes nothing else
    whole = tmp_path / "runs/maze/whole"
    assert "of 16 unseen test samples" in printed and "0.0% of routes are longer" in printed
    assert {p.name for p in whole.iterdir()} >= {
        "config.yaml",
        "checkpoints",
        "metrics.csv",
        "curves.csv",
        "media",
        "test.json",
    }
    assert {p.name for p in (whole / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    with Image.open(whole / "media/test/sample-maze.gif") as gif:
        assert gif.n_frames == 3, "one a tick"
    assert {p.name for p in (whole / "media").iterdir()} == {"step-0000010", "test"}
    rows = list(csv.DictReader((whole / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["val/reached"]] == ["3", "7", "11"]
    assert [row["step"] for row in rows if row["train/loss"]] == ["2", "5", "8", "11"]
    assert float(rows[-1]["test/step_accuracy"]) == json.loads((whole / "test.json").read_text())["test/step_accuracy"]

    ok(train(*TINY, "run=half", "trainer.max_steps=6"))
    printed = ok(
        train("task=maze", "ckpt_path=last", "run=half", "trainer.max_steps=12")
    )  # the rest is in the checkpoint
    half = tmp_path / "runs/maze/half"
    assert "(continued)" in printed and "checkpoint: runs/maze/half/checkpoints/last.ckpt (step 6)" in printed
    assert_same_run(whole, half)
    assert (half / "config-2.yaml").is_file(), "the first configuration is kept"

    # What describes itself: rebuilt without Lightning, and read by the other subcommands with its own settings.
    model = ctm.load(whole / "checkpoints/best.ckpt")
    assert model.net.config.d_model == 32 and not model.training
    state = checkpoint(whole, "best")["state_dict"]
    assert all(torch.equal(value, state[f"model.{name}"]) for name, value in model.state_dict().items())
    assert "of 16 unseen" in ok(train("test", "task=maze", "run=half", "ckpt_path=best"))
    [again] = (tmp_path / "runs/maze").glob("*-test")
    again = json.loads((again / "test.json").read_text())
    assert again["test/loss"] == json.loads((half / "test.json").read_text())["test/loss"]
    ok(train("predict", f"ckpt_path={whole / 'checkpoints/best.ckpt'}", "run=answers"))
    from safetensors.torch import load_file

    answers = load_file(tmp_path / "runs/maze/answers/predictions.safetensors")
    assert answers["predictions"].shape == (16, 150) and set(answers["tick"].tolist()) <= {1, 2, 3}

    # What is refused, in one line and before anything is written.
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    last = whole / "checkpoints/last.ckpt"
    part = tmp_path / "part.ckpt"
    part.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    for words, message in [
        (("task=maze", "run=whole"), "exists already: continue it with ckpt_path=last"),
        (("test", f"ckpt_path={part}"), "is not a readable checkpoint, or only part of one"),
        (
            ("test", "task=maze", f"ckpt_path={last}", "model.ctm.d_model=40"),
            "does not fit this model: model.net.trace_start is (32, 4) there and (40, 4) here",
        ),
        (("task=maze", "run=x", "trainer.default_root_dir=y", "trainer.accelerator=abc"), "invalid accelerator name"),
    ]:
        process = train(*words)
        assert process.returncode == 2, process.stderr
        assert len(process.stderr.strip().splitlines()) == 1 and message in process.stderr
    part.unlink()
    assert sorted(str(path) for path in tmp_path.rglob("*") if path != part) == before


def test_an_unwritable_run_folder(train, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    process = train(*TINY, "trainer.max_steps=1")
    assert process.returncode == 2
    assert len(process.stderr.strip().splitlines()) == 1 and "cannot make the run folder runs/maze/" in process.stderr


def test_a_loss_that_is_not_finite_ends_the_run(train, tmp_path):
    process = train(
        *TINY, "run=nan", "model.optim.lr=1e30", "model.optim.warmup=0", "checkpoint.every=1", "trainer.max_steps=20"
    )
    assert process.returncode == 1
    line = process.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and "finite at step" in line and "Traceback" not in process.stderr
    last = tmp_path / "runs/maze/nan/checkpoints/last.ckpt"
    if last.exists():
        assert str(last.relative_to(tmp_path)) in line
        assert all(
            v.isfinite().all() for v in checkpoint(last.parent.parent)["state_dict"].values() if v.is_floating_point()
        )
    else:
        assert "nothing had been saved yet" in line


# ------------------------------------------------------------------------------------------------------ unit by unit


def test_a_table_drops_what_will_be_computed_again(tmp_path):
    table = Table(tmp_path / "metrics.csv", ["step"])
    for step in range(6):
        table.add({"step": step, "loss": step / 2} | ({"new": 1} if step > 3 else {}))
    Table(tmp_path / "metrics.csv", ["step"], keep_below=3).add({"step": 3, "loss": 7})
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [(row["step"], row["loss"]) for row in rows] == [("0", "0.0"), ("1", "0.5"), ("2", "1.0"), ("3", "7")]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "last.ckpt"
    write_aside(path, lambda aside: aside.write_text("first"))

    def break_off(aside: Path) -> None:
        aside.write_text("sec")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_aside(path, break_off)
    assert path.read_text() == "first"


def test_load_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        ctm.load(tmp_path / "gone.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="does not describe one"):
        ctm.load(tmp_path / "other.ckpt")


# ---------------------------------------------------------------------------------------------------- slow: real ends


@pytest.fixture
def whole(train, tmp_path):
    ok(train(*TINY, "run=whole", "trainer.max_steps=40"))
    return tmp_path / "runs/maze/whole"


def wait_for(condition, process, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def rows_in(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_resume_after_a_signal(train, tmp_path, whole, signum):
    run = tmp_path / "runs/maze/cut"
    process = train(*TINY, "run=cut", "trainer.max_steps=40", wait=False)
    wait_for(lambda: rows_in(run / "metrics.csv") > 8, process)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    stopped = checkpoint(run)["global_step"]
    assert 3 < stopped < 40 and f"stopped after step {stopped}; continue with ckpt_path=last" in errors
    assert "Traceback" not in errors
    ok(train("task=maze", "run=cut", "ckpt_path=last"))
    assert_same_run(whole, run)


@pytest.mark.slow
def test_resume_after_kill_at_several_points_and_during_a_save(train, tmp_path, whole):
    run = tmp_path / "runs/maze/cut"
    last, aside = run / "checkpoints/last.ckpt", run / "checkpoints/last.ckpt.part"
    words = [*TINY, "run=cut", "trainer.max_steps=40"]
    killed_in_a_save = 0
    for rows, in_a_save in ((5, False), (9, True), (13, False), (17, True)):
        process = train(*words, wait=False)
        wait_for(lambda rows=rows: rows_in(run / "metrics.csv") > rows and last.exists(), process)
        if in_a_save:
            wait_for(aside.exists, process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        killed_in_a_save += aside.exists()
        words = ["task=maze", "run=cut", "ckpt_path=last"]
    assert killed_in_a_save > 0
    ok(train(*words))
    assert_same_run(whole, run)


@pytest.mark.slow
def test_resume_with_workers_and_accumulation(train, tmp_path):
    extra = ("data.num_workers=2", "trainer.accumulate_grad_batches=2")
    ok(train(*TINY, *extra, "run=whole", "trainer.max_steps=10"))
    ok(train(*TINY, *extra, "run=half", "trainer.max_steps=5"))
    ok(train("task=maze", "run=half", "ckpt_path=last", "trainer.max_steps=10"))
    assert_same_run(tmp_path / "runs/maze/whole", tmp_path / "runs/maze/half")


@pytest.mark.slow
def test_two_processes(train, tmp_path):
    ddp = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp", "model.ctm.dropout=0")
    printed = ok(train(*TINY, *ddp, "run=two", "data.batch_size=4", "trainer.max_steps=4"))
    assert "of 16 unseen test samples" in printed
    assert [p.name for p in (tmp_path / "runs/maze").iterdir()] == ["two"]
    ok(train("task=maze", "run=two", "ckpt_path=last", "trainer.max_steps=6"))
    assert checkpoint(tmp_path / "runs/maze/two")["global_step"] == 6


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("task", ["maze/small", "parity/quick"])
def test_two_gpus(task, train):
    """By recorded steps, twenty of them, with an even share of the test for each."""
    tiny = ["data.n_val=8", "data.n_test=8", "data.batch_size=8", "data.num_workers=0", "model.optim.warmup=2"]
    gpus = ["trainer.accelerator=gpu", "trainer.devices=2", "trainer.strategy=ddp", "trainer.logger=false", "run=two"]
    steps = ["trainer.max_steps=20", "trainer.val_check_interval=20", "media.every=0"]
    printed = ok(train(f"task={task}", *tiny, *gpus, *steps))
    assert "of 8 unseen test samples" in printed and "step 20" in printed


@pytest.mark.slow
def test_repeat_over_seeds(train, tmp_path):
    printed = ok(train("repeat", *TINY, "overlay=fast", "trainer.max_steps=2", "seeds=0,1", "run=r"))
    values = [json.loads((tmp_path / f"runs/maze/r-seed{k}/test.json").read_text())["test/loss"] for k in (0, 1)]
    assert values[0] != values[1] and f"({values[0]:.4f}, {values[1]:.4f})" in printed and "±" in printed


@pytest.mark.slow
def test_repeat_over_a_grid(train, tmp_path):
    sweep = {"command": ["${env}", "overlay=fast"], "parameters": {"model.ctm.ticks": {"values": [2, 3]}}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep | {"program": "train.py"}))
    printed = ok(train("repeat", "sweep=sweep.yaml", *(w for w in TINY if "ticks" not in w), "seeds=0", "run=g"))
    rows = list(csv.DictReader((tmp_path / "runs/maze/g.csv").open()))
    assert [(row["model.ctm.ticks"], row["seed"]) for row in rows] == [("2", "0"), ("3", "0")]
    assert (tmp_path / "runs/maze/g-ticks=3-seed0/test.json").exists() and "ticks=2 " in printed
    again = train("repeat", "sweep=sweep.yaml", *(w for w in TINY if "ticks" not in w), "seeds=0", "run=g")
    assert again.returncode == 2 and "runs/maze/g.csv exists already" in again.stderr


@pytest.mark.slow
def test_a_step_of_the_published_run_on_a_cpu(train, tmp_path):
    printed = ok(train(
        "task=maze/paper", "run=p", "overlay=fast", "trainer.max_steps=1", "trainer.limit_val_batches=0",
        "data.batch_size=2", "data.eval_batch_size=2", "data.num_workers=0", "data.n_val=20", "data.n_test=20",
    ))  # fmt: skip
    assert "31,998,330 parameters" in printed


@pytest.mark.slow
def test_one_batch_can_be_learned_by_heart(train, tmp_path):
    ok(train("task=maze", "run=o", "overlay=overfit", "data.batch_size=16", "data.augment=false", OMP_NUM_THREADS="2"))
    rows = list(csv.DictReader((tmp_path / "runs/maze/o/metrics.csv").open()))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert losses[-1] < 0.05 < losses[0]


@pytest.mark.slow
def test_a_short_training_beats_chance_by_far(train, tmp_path):
    """400 steps of the default run: about 20 % of unseen mazes are reached, an untrained model reaches none."""
    ok(
        train(
            "task=maze",
            "run=l",
            "trainer.max_steps=400",
            "model.optim.steps=400",
            "data.n_test=300",
            OMP_NUM_THREADS="2",
        )
    )
    result = json.loads((tmp_path / "runs/maze/l/test.json").read_text())
    assert result["test/reached"] > 0.1 and result["test/step_accuracy"] > 0.7


@pytest.mark.gpu
def test_a_run_on_a_gpu(train, tmp_path):
    printed = ok(train(*TINY, "run=g", "trainer.accelerator=gpu", "trainer.logger=false", "trainer.max_steps=6"))
    assert "of 16 unseen test samples" in printed
    ok(train("task=maze", "run=g", "ckpt_path=last", "trainer.max_steps=9"))
    assert checkpoint(tmp_path / "runs/maze/g")["global_step"] == 9


def test_the_files_of_the_project():
    allowed = {"ctm", "svf", "tasks", "tests", "configs", "train.py", "pyproject.toml", "README.md", "LICENSE", "runs"}
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith(".") and not p.name.endswith(".egg-info")}
    assert found - {"build", "dist", "data"} <= allowed
