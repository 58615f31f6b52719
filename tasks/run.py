"""Logging and callbacks of every run: what is written to its folder, when it is saved, how it stops.

    runs/<task>/<name>/   config.yaml   checkpoints/{last,best}.ckpt   metrics.csv   curves.csv   test.json
                          difficulty.csv   media/   wandb/
                          media/test/ the test, media/step-N/ validation samples while it trained

Everything in metrics.csv and curves.csv follows from the configuration alone: two equal runs have equal files, a
resumed run those of an uninterrupted one. What depends on the machine (speed) goes to the progress bar and to W&B.
"""

import csv
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)

from ctm.checkpoint import read
from tasks.seen import Sample, Seen, learned_decays, of_split, spread, survey, telling, watch

CURVE = "_by_tick/"
"""Metrics named NAME_by_tick/001, 002, ... are the points of one curve over ticks."""
STEP = "trainer/global_step"
"""The axis of everything in W&B, by Lightning's name for it."""


class UserError(Exception):
    """Something only the user can put right. Shown as one line; the process ends with exit code 2."""


class Stopped(Exception):
    """The run was asked to stop by a signal; everything is saved."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped after step {step}")
        self.signum = signum


class NotFinite(Exception):
    """The loss or a weight is NaN or infinite."""


def say(text: str) -> None:
    """A line to the person, from the first process only."""
    if rank_zero_only.rank == 0:
        print(text, flush=True)


def progress(steps: list, what: str) -> Iterator:
    """Goes through steps and shows how far it is, where somebody looks."""
    console = Console()
    hidden = not console.is_terminal or rank_zero_only.rank != 0
    return track(steps, what, console=console, disable=hidden, transient=True)


@contextmanager
def drawing() -> Iterator[None]:
    """What is imported in it can draw.

    Raises:
        UserError: where Matplotlib or Pillow cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(f"figures need Matplotlib and Pillow ({error}): pip install matplotlib pillow") from error


def write_aside(path: Path, write) -> None:
    """Calls `write(temporary path)` and puts the file in its place only once it is whole and on the disk."""
    aside = path.with_name(path.name + ".part")
    write(aside)
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


# ----------------------------------------------------------------------------------------------------------------------
# Loggers


class Table:
    """A CSV file that grows by rows, and by columns when a new one turns up. Every row is on the disk at once."""

    def __init__(self, path: Path, columns: list[str], keep_below: int | None = None):
        self.path, self.columns, self.rows = path, columns, []
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or columns)
                self.rows = [row for row in reader if keep_below is None or int(row["step"]) < keep_below]
            self._rewrite()

    def add(self, row: dict[str, Any]) -> None:
        new = [name for name in row if name not in self.columns]
        self.rows.append(row)
        if new or not self.path.exists():
            self.columns += sorted(new)
            self._rewrite()
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    def _rewrite(self) -> None:
        text = StringIO()
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(self.rows)
        write_aside(self.path, lambda aside: aside.write_text(text.getvalue(), newline=""))


class FileLogger(Logger):
    """metrics.csv, and curves.csv (one row a tick) in the run's folder.

    Args:
        folder: of the run.
        resume_step: rows of this step and later are dropped: they will be computed again.
    """

    def __init__(self, folder: Path, resume_step: int = 0):
        super().__init__()
        self.folder, self.resume_step = folder, resume_step
        self.tables: dict[str, Table] = {}

    def table(self, name: str, columns: list[str]) -> Table:
        if name not in self.tables:
            self.tables[name] = Table(self.folder / name, columns, self.resume_step)
        return self.tables[name]

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        values = {name: value for name, value in metrics.items() if name != "epoch" and CURVE not in name}
        if values:
            self.table("metrics.csv", ["step"]).add({"step": step, **values})
        for name, value in metrics.items():
            if CURVE in name:
                curve, _, tick = name.rpartition("/")
                self.table("curves.csv", ["step", "curve", "tick", "value"]).add(
                    {"step": step, "curve": curve, "tick": int(tick), "value": value}
                )

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs) -> None:
        """The configuration is in config.yaml."""

    @property
    def name(self) -> str:
        return "files"

    @property
    def version(self) -> str:
        return ""


class RunWandbLogger(WandbLogger):
    """W&B, so that a new workspace is a dashboard: a section for each of train, val, test, optim, speed and samples,
    everything over training steps, curves over ticks as one chart each instead of a scalar a tick.

    Args:
        headline: the task's metric; a run's summary has its best value in validation, not its last.
    """

    def __init__(self, headline: str | None = None, **kwargs):
        super().__init__(**kwargs)
        self.headline, self.defined = headline, False
        self._wandb_init.pop("anonymous", None)  # Lightning passes it always, W&B warns of it always

    def define_metrics(self) -> None:
        """Axes and summaries. Lightning has made `trainer/global_step` the axis of everything."""
        self.defined, run = True, self.experiment
        run.define_metric("epoch", hidden=True)
        run.define_metric("train/loss", step_metric=STEP, summary="min")
        run.define_metric("val/loss", step_metric=STEP, summary="min")
        if self.headline:
            run.define_metric(f"val/{self.headline}", step_metric=STEP, summary="max")

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        import wandb

        if not self.defined:
            self.define_metrics()
        scalars = {name: value for name, value in metrics.items() if CURVE not in name}
        curves: dict[str, list] = {}
        for name, value in metrics.items():
            if CURVE in name:
                curve, _, tick = name.rpartition("/")
                curves.setdefault(curve, []).append([int(tick), value])
        for curve, points in curves.items():
            table = wandb.Table(["tick", curve], points)
            scalars[curve] = wandb.plot.line(table, "tick", curve, title=curve)
        super().log_metrics(scalars, step)

    @rank_zero_only
    def log_media(self, section: str, paths: list[Path], rows: list[dict], step: int) -> None:
        """Pictures and animations, and a table of the samples in them."""
        import wandb

        content = {STEP: step}
        for path in paths:
            moving = path.suffix == ".gif"
            content[f"{section}/{path.stem}"] = (
                wandb.Video(str(path), format="gif") if moving else wandb.Image(str(path))
            )
        if rows:
            content[f"{section}/table"] = wandb.Table(list(rows[0]), [list(row.values()) for row in rows])
        self.experiment.log(content)


# ----------------------------------------------------------------------------------------------------------------------
# Saving and stopping


class Checkpoints(Checkpoint):
    """Saves a run so that it can go on bit for bit, and stops it in good order.

    `last.ckpt` is written every `every` steps, when the run ends, and on SIGTERM or the first Ctrl-C; `best.ckpt` after
    a validation with the highest value of the task's headline metric so far, of equal ones the latest (a share of
    samples that are wholly right stays 0 for long). All of them are written at one point, before a step begins: every
    step before it is complete, its validation included, and the next has drawn no random number.

    Args:
        every: steps between two saves.
    """

    def __init__(self, every: int = 500):
        if every < 1:
            raise ValueError(f"checkpoint.every={every} must be at least 1")
        self.every = every
        self.folder: Path | None = None  # these three are set by whoever starts the run
        self.config: dict = {}
        self.wandb_id: str | None = None
        self.best: float | None = None
        self.best_is_new = False
        self.rng: dict | None = None
        self.signum: int | None = None
        self.saved_at = -1
        self.previous_handlers: dict = {}

    # --------------------------------------------------------------------------------------------------------- when
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved_at = trainer.global_step
        for signum in (signal.SIGTERM, signal.SIGINT):
            self.previous_handlers[signum] = signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame) -> None:
        if self.signum is not None and signum == signal.SIGINT:  # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.signum = signum
        say("\nstopping after this step; press Ctrl-C again to stop at once without saving")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.total.completed % trainer.accumulate_grad_batches:
            return
        loop._batches_that_stepped = trainer.global_step  # Lightning miscounts it, the loggers' step, after a resume
        if self.rng is not None:
            set_rng(self.rng)
            self.rng = None
        stop = trainer.strategy.reduce_boolean_decision(self.signum is not None, all=False)
        if stop or self.best_is_new or (trainer.global_step - self.saved_at) >= self.every:
            self.save(trainer, pl_module)
        if stop:
            raise Stopped(self.signum or signal.SIGTERM, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get(f"val/{trainer.datamodule.headline}")
        if trainer.state.fn == "fit" and value is not None and (self.best is None or float(value) >= self.best):
            self.best, self.best_is_new = float(value), True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self.saved_at or self.best_is_new:
            self.save(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for signum, handler in self.previous_handlers.items():
            signal.signal(signum, handler)
        self.previous_handlers = {}

    # ---------------------------------------------------------------------------------------------------------- what
    def save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes last.ckpt, and best.ckpt before it where it is due: a crash between the two repeats both."""
        step = trainer.global_step
        for name, value in pl_module.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                raise NotFinite(f"{name} is no longer finite at step {step}; {self.kept()}")
        last, best = self.folder / "last.ckpt", self.folder / "best.ckpt"
        best_is_new, self.best_is_new = self.best_is_new, False

        def write(aside: Path) -> None:
            trainer.save_checkpoint(aside)
            if best_is_new and trainer.is_global_zero:
                write_aside(best, lambda other: shutil.copyfile(aside, other))

        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_aside(last, write)
        else:
            trainer.save_checkpoint(last)  # takes part in collecting the state; only the first process writes
        self.saved_at = step

    def kept(self) -> str:
        last = self.folder / "last.ckpt"
        return f"the last good checkpoint is {last}" if last.exists() else "nothing had been saved yet"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        checkpoint["config"] = self.config
        checkpoint["rng"] = get_rng()
        checkpoint["wandb_id"] = self.wandb_id
        # A batch whose step has not begun has not been taken; and the run is one epoch that does not end.
        loops = checkpoint["loops"]["fit_loop"]
        batches = loops["epoch_loop.batch_progress"]
        for counts in (batches["total"], batches["current"]):
            counts.update(ready=counts["completed"], started=counts["completed"], processed=counts["completed"])
        for counts in (loops["epoch_progress"]["total"], loops["epoch_progress"]["current"]):
            counts.update(ready=1, started=1, processed=0, completed=0)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        self.rng = checkpoint.get("rng")

    def state_dict(self) -> dict:
        return {"best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.best = state["best"]


def get_rng() -> dict:
    """The state of every global random number generator, as plain values and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng(state: dict) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class StopAtNaN(Callback):
    """Ends the run when the loss is not finite, and says at which step.

    The first such step is kept on the device and read only when metrics are logged, so that a GPU never waits for it.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first = torch.full((), -1, device=pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        bad = ~outputs["loss"].detach().isfinite() & (self.first < 0)
        self.first = torch.where(bad, trainer.global_step, self.first)
        due = self.first.device.type == "cpu" or trainer.global_step % trainer.log_every_n_steps == 0
        if due and self.first >= 0:
            kept = next(c for c in trainer.callbacks if isinstance(c, Checkpoints)).kept()
            raise NotFinite(f"the loss was not finite at step {int(self.first)}; {kept}")


# ----------------------------------------------------------------------------------------------------------------------
# Showing


class RunProgress(ProgressBar):
    """A bar over steps with loss, the task's headline metric, ticks used and steps per second; a line a validation."""

    def __init__(self):
        super().__init__()
        self.bar: Progress | None = None
        self.task_id = None
        self.began, self.began_at = 0.0, 0

    def disable(self) -> None:
        """Lightning silences all but the first process so."""
        self.silent = True

    silent = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began, self.began_at = time.monotonic(), trainer.global_step
        console = Console()
        if self.silent or not console.is_terminal:
            return
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[metrics]}"), console=console, refresh_per_second=4)
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self.task_id = self.bar.add_task("", total=total, completed=trainer.global_step, metrics="")
        self.bar.start()

    def steps_per_second(self, trainer: Trainer) -> float:
        return (trainer.global_step - self.began_at) / max(1e-9, time.monotonic() - self.began)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        step, speed = trainer.global_step, self.steps_per_second(trainer)
        if step % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    samples = len(batch[0]) * trainer.world_size * trainer.accumulate_grad_batches
                    rates = {"speed/steps_per_second": speed, "speed/samples_per_second": speed * samples}
                    logger.log_metrics(rates, step=step - 1)
        if self.bar is not None:
            shown = {
                k.removeprefix("train/"): v for k, v in trainer.progress_bar_metrics.items() if isinstance(v, float)
            }
            text = " ".join(f"{name} {value:.3g}" for name, value in shown.items())
            self.bar.update(self.task_id, completed=step, metrics=f"{text} {speed:.1f} steps/s")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or self.silent:
            return
        values = summary(trainer, "val")
        line = f"step {trainer.global_step}: {values}, {self.steps_per_second(trainer):.1f} steps/s"
        self.bar.console.print(line) if self.bar is not None else say(line)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def summary(trainer: Trainer, split: str) -> str:
    """The scalar metrics of a split in a line."""
    metrics = {k: v for k, v in trainer.callback_metrics.items() if k.startswith(f"{split}/") and CURVE not in k}
    return ", ".join(f"{name.partition('/')[2]} {float(value):.4g}" for name, value in metrics.items())


class Report(Callback):
    """At the end of a test: the result in a line and in test.json, and pictures to media/ and W&B.

    Args:
        folder: of the run.
        start: the checkpoint whose weights the run began with, where the trainer does not know of one.
    """

    def __init__(self, folder: Path, start: str | None = None):
        self.folder, self.start, self.n = folder, start, 0

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, *args) -> None:
        self.n += trainer.datamodule.count(batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        n = int(trainer.strategy.reduce(torch.tensor(self.n, device=pl_module.device), reduce_op="sum"))
        if trainer.is_global_zero:
            self.report(trainer, pl_module, n)

    def report(self, trainer: Trainer, pl_module: LightningModule, n: int) -> None:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test/") and CURVE not in k}
        seconds = getattr(pl_module, "seconds", {})  # not a metric: it depends on the machine
        cost = getattr(pl_module, "cost", {})
        headline, checkpoint = trainer.datamodule.headline, str(trainer.ckpt_path or self.start)
        content = {"n": n, "checkpoint": checkpoint, "headline": headline, **metrics, **seconds, **cost}
        write_aside(self.folder / "test.json", lambda aside: aside.write_text(json.dumps(content, indent=2)))
        if rows := getattr(pl_module, "difficulty_rows", []):
            text = StringIO()
            writer = csv.DictWriter(text, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
            write_aside(self.folder / "difficulty.csv", lambda aside: aside.write_text(text.getvalue(), newline=""))
        if trainer.datamodule.in_ticks:
            self.show(trainer, pl_module)
        say(f"test: {summary(trainer, 'test')}")
        if seconds:
            say(f"early exit: {seconds['early_exit_seconds']:.2f} s instead of {seconds['full_seconds']:.2f} s")
        say(f"{headline}: {metrics[f'test/{headline}']:.1%} of {n} unseen test samples ({checkpoint})")
        for prefix, where in (("", "the same samples"), ("old_", "what the base was trained for")):
            if (before := metrics.get(f"test/{prefix}before_{headline}")) is not None:
                say(f"{headline}, {where}: {before:.1%} before, {metrics[f'test/{prefix}{headline}']:.1%} after")

    def show(self, trainer: Trainer, pl_module: LightningModule, among: int = 100) -> None:
        """The hardest test sample that is solved, among some, being solved; all the rest is `analyze`'s."""
        task = trainer.datamodule
        samples = of_split(task, "test", spread(task, "test", among))
        [hardest] = telling(survey(pl_module, samples), task.headline, 1)
        seen = Seen(watch(pl_module, [samples[hardest]]), {})
        show(trainer, seen, lambda: task.solving(seen.samples[0], "sample"), "test")


class Media(Callback):
    """Shows how the same validation samples are thought about, again and again while the model learns.

    Pictures go to media/step-N/ in the run's folder and to W&B, with a table of the samples. Nothing else changes: no
    random number is drawn, and no metric.

    Args:
        every: steps from one time to the next; 0 for never.
        samples: how many.
    """

    def __init__(self, every: int = 1000, samples: int = 2):
        if every < 0 or samples < 1:
            raise ValueError(f"media.every={every} must be at least 0, media.samples={samples} at least 1")
        self.every, self.samples, self.done = every, samples, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.done = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args) -> None:
        step = trainer.global_step
        if not trainer.datamodule.in_ticks:
            return
        if not self.every or step % self.every or step == self.done or not trainer.is_global_zero:
            return
        self.done, task = step, trainer.datamodule
        seen = Seen(watch(pl_module, self.chosen(task)), learned_decays(pl_module.model))
        show(trainer, seen, lambda: task.figures(seen), f"step-{step:07}")

    def chosen(self, task) -> list:
        return of_split(task, "val", spread(task, "val", self.samples))


def show(trainer: Trainer, seen: Seen, pictures: Callable[[], list], where: str) -> None:
    """Draws pictures into media/`where` and sends them to W&B. No run ends for want of a picture: it says what is
    wrong and goes on."""
    folder = Path(trainer.default_root_dir) / "media" / where
    try:
        with drawing():
            from tasks import figures
        folder.mkdir(parents=True, exist_ok=True)
        paths = [figures.write(picture, folder).path for picture in pictures()]
        rows = sample_rows(trainer.datamodule, seen.samples)
        for logger in trainer.loggers:
            if isinstance(logger, RunWandbLogger):
                section = "test" if where == "test" else "samples"
                logger.log_media(section, paths, rows, max(0, trainer.global_step - 1))
    except Exception as error:
        return say(f"no pictures: {error or type(error).__name__}")
    say(f"pictures: {folder}")


def sample_rows(task, samples: list[Sample]) -> list[dict[str, Any]]:
    """What was said of each sample: rows of a table."""
    rows = []
    for i, sample in enumerate(samples, start=1):
        said, right = task.words(sample)
        values = {name: round(sample.values[name], 4) for name in (task.headline, "certainty", "ticks")}
        rows.append({"sample": i, "prediction": said, "right answer": right} | values)
    return rows


class Predictions(BasePredictionWriter):
    """`predict` writes what the model answers to predictions.safetensors in the run's folder."""

    def __init__(self, folder: Path):
        super().__init__("epoch")
        self.folder = folder

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices) -> None:
        from safetensors.torch import save_file

        tensors = {name: torch.cat([batch[name] for batch in predictions]).contiguous() for name in predictions[0]}
        path = self.folder / (
            "predictions.safetensors" if trainer.world_size == 1 else f"predictions-{trainer.global_rank}.safetensors"
        )
        save_file(tensors, path)
        say(f"predictions: {path}")


# ----------------------------------------------------------------------------------------------------------------------
# Finding and reading runs


def find_checkpoint(runs: Path, which: str, task: str | None, run: str | None) -> Path:
    """The newest last.ckpt (or best.ckpt) of a task, or of one run of it.

    Raises:
        UserError: where there is none.
    """
    if task is None:
        raise UserError(f"ckpt_path={which} needs task=NAME to know whose; or give the path of a checkpoint")
    found = sorted((runs / task).glob(f"{run or '*'}/checkpoints/{which}.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(
            f"ckpt_path={which}: there is no {which}.ckpt under {runs / task / (run or '')}; train one first"
        )
    return found[-1]


def read_run_checkpoint(path: Path) -> dict:
    """A checkpoint with the configuration of its run.

    Raises:
        UserError: where it is missing, damaged or written by something else.
    """
    try:
        checkpoint = read(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"ckpt_path: {error}") from error
    if "config" not in checkpoint:
        raise UserError(f"ckpt_path: {path} was not written by train.py: it holds no configuration of a run")
    return checkpoint


def fail(message: str, code: int = 2) -> None:
    """Ends the process with one line."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
