"""The LightningModule around a CTM or a baseline. What is learned is the task's matter, how it thinks the model's."""

import math
from collections.abc import Callable
from itertools import islice
from time import perf_counter
from typing import Literal

import torch
from lightning import LightningModule
from torch import Tensor

from ctm import checkpoint, ops
from ctm.baselines import LSTM, FeedForward, FFConfig, LSTMConfig
from ctm.early_exit import think_until
from ctm.encoders import Encoder
from ctm.loss import gather_tick
from ctm.model import CTM, CTMConfig, Thinker, Thought
from svf.attach import Adapting, PeftConfig, attach
from tasks.base import Task
from tasks.metrics import CUMULATIVE, ByDifficulty, Calibration, answer_tick
from tasks.optim import Optim, QuantileClip


class LitCTM(Adapting, LightningModule):
    """Trains and tests a `Thinker`: from fresh weights, from a base's, or an adapter on a base.

    Args:
        task: what is learned.
        encoder: makes the encoder for a token width; None means features without a projection (for `ff`).
        net: what thinks: the CTM, or one of the baselines.
        ctm: sizes of the CTM.
        lstm: sizes of the LSTM baseline.
        ff: sizes of the feed-forward baseline.
        optim: learning rate and its schedule.
        early_exit: certainty at which a sample stops thinking, from 0 to 1: the test then also reports what that costs
            in accuracy and saves in ticks and time.
        base: checkpoint whose weights are the first ones. On the command line it brings the sizes of its net, its
            encoder and its data along.
        adapter: of any PEFT method: it alone trains then, and the base stays as it is.
        old: what the base was trained for: the test says how well that is still done, too.
    """

    def __init__(
        self,
        task: Task,
        encoder: Callable[[int | None], Encoder],
        net: Literal["ctm", "lstm", "ff"] = "ctm",
        ctm: CTMConfig = CTMConfig(),  # noqa: B008 (frozen)
        lstm: LSTMConfig = LSTMConfig(),  # noqa: B008
        ff: FFConfig = FFConfig(),  # noqa: B008
        optim: Optim = Optim(),  # noqa: B008
        early_exit: float | None = None,
        base: str | None = None,
        adapter: PeftConfig | None = None,
        old: Task | None = None,
    ):
        super().__init__()
        self.task, self.optim, self.early_exit = task, optim, early_exit
        self.base, self.old = base, old
        self.most_certain = not (net == "lstm" and task.lstm_answers_last)
        if reason := task.refused.get(net):
            raise ValueError(f"model.net={net}: {reason}")
        width = {"ctm": ctm, "lstm": lstm, "ff": ff}[net].d_input
        if task.vector_width not in (None, width):
            raise ValueError(
                f"model.{net}.d_input={width} must be {task.vector_width}, the width of what the task shows"
            )
        if net != "ff":
            size = ctm if net == "ctm" else lstm
            if bool(size.heads) is (task.vector_width is not None):
                raise ValueError(
                    f"model.{net}.heads={size.heads}: "
                    + ("nothing can be attended to in this task; take 0" if size.heads else "this task needs attention")
                )
            if size.ticks < task.least_ticks:
                raise ValueError(f"model.{net}.ticks={size.ticks} must be at least {task.least_ticks} in this task")
        if net == "ff":
            tokens = encoder(width)
            self.model = Thinker(
                tokens, FeedForward(ff, task.out_dims, tokens.n_tokens(*task.sample_size), tokens.width)
            )
        elif net == "lstm":
            self.model = Thinker(encoder(width, **task.lstm_encoder), LSTM(lstm, task.out_dims))
        else:
            self.model = Thinker(encoder(width), CTM(ctm, task.out_dims))
        if early_exit is not None:
            if not 0 <= early_exit <= 1:
                raise ValueError(f"early_exit={early_exit} must be a certainty from 0 to 1")
            if reason := "a feed-forward net has one tick" if net == "ff" else task.no_early_exit:
                raise ValueError(f"early_exit={early_exit}: {reason}")
        for name, other in (("adapter", adapter), ("old", old)):
            if other is not None and base is None:
                raise ValueError(f"model.{name} needs a trained model: name its checkpoint with model.base=PATH")
        if old is not None and old.out_dims != task.out_dims:
            raise ValueError(
                f"model.old asks for {old.out_dims} answers (positions, classes), the task for {task.out_dims}"
            )
        if base is not None:
            self._load_base(self.model)
        if adapter is not None:
            self.model = attach(self.model, adapter, base)
            self.train()
        self.optim.configure(self)  # refuses what does not fit the parameters, before any work
        self.clip = None if optim.clip_quantile is None else QuantileClip(optim.clip_quantile, optim.clip_history)

    def _load_base(self, model: Thinker) -> Thinker:
        checkpoint.load_weights(model, checkpoint.load(self.base).state_dict(), self.base)
        return model

    @torch.inference_mode(False)  # which a test is in, and which a model remembers
    def _before_training(self) -> Thinker:
        return self._load_base(checkpoint.build(checkpoint.describe(self.model))).to(self.device).eval()

    def forward(self, *inputs: Tensor, model: Thinker | None = None) -> Thought:
        """The thought (of another model, if one is given), of its ticks those at which an answer is due."""
        return self._due((model or self.model)(*inputs))

    def _due(self, thought: Thought) -> Thought:
        ticks = self.model.encoder.answer_ticks
        if ticks is None:
            return thought
        return thought._replace(predictions=thought.predictions[:, -ticks:], certainty=thought.certainty[:, -ticks:])

    # ------------------------------------------------------------------------------------------------------ training
    def training_step(self, batch, batch_idx: int) -> Tensor:
        loss, thought = self._learn(batch)
        self.log("train/loss", loss, prog_bar=True)
        if self._is_log_step():
            self._log_metrics("train", thought, batch)
        return loss

    def _learn(self, batch) -> tuple[Tensor, Thought]:
        """Loss and thought of a training batch, as one CUDA graph where all of it only launches kernels."""
        if not (self.task.replayable and self.model.encoder.replayable):
            *inputs, _ = batch
            thought = self(*inputs)
            return self.task.loss(thought, batch, self.most_certain), thought

        def loss_of(thought: Thought, batch) -> Tensor:
            return self.task.loss(self._due(thought), batch, self.most_certain)

        loss, seen = ops.learn(self.model, loss_of, batch, self.task, *ops.replay.settings(self.task))
        return loss, self._due(Thought(*seen, sync=None, state=None))

    def _is_log_step(self) -> bool:
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0

    def configure_optimizers(self) -> dict:
        return self.optim.configure(self)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        if self.clip:
            self.clip(self.parameters())
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_before_optimizer_step(self, optimizer) -> None:
        if self._is_log_step():
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            self.log("optim/grad_norm", torch.nn.utils.get_total_norm(grads))
            self.log("optim/lr", optimizer.param_groups[0]["lr"])

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        if isinstance(self.model.net, CTM):
            self.model.net.project_parameters()

    # ---------------------------------------------------------------------------------------------------- evaluation
    def validation_step(self, batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def on_test_start(self) -> None:
        self.by_difficulty, self.calibration = ByDifficulty(), Calibration(self.task.out_dims[1])
        self.seconds = {}
        if self.base is not None:  # in a tuple, so that it is no part of this module
            self.before = (self._before_training(),)

    def test_step(self, batch, batch_idx: int) -> None:
        thought, values = self._evaluate("test", batch)
        if (targets := self.task.targets(batch)) is not None:
            self.calibration.update(thought, targets)
        more = self.task.test_metrics(self.model, batch, self.most_certain) | self._exit_early(batch)
        if self.base is not None:
            more |= {f"before_{self.task.headline}": self._headline(self.task, batch, self.before[0])}
        self._log_values("test", more)
        if (difficulty := self.task.difficulty(batch)) is not None:
            self.by_difficulty.update(difficulty, values | more)

    def _exit_early(self, batch) -> dict[str, Tensor]:
        """Thinks again, once to the end and once only until certain, against the clock."""
        if self.early_exit is None:
            return {}
        *inputs, _ = batch

        def timed(name: str, think: Callable):
            began = self._clock()
            thought = think()
            self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - began
            return thought

        timed("full_seconds", lambda: self(*inputs))
        answer = timed(
            "early_exit_seconds",
            lambda: think_until(self.model, *inputs, threshold=self.early_exit, most_certain=self.most_certain),
        )
        values = self.task.metrics(Thought(answer.predictions[:, None], answer.certainty[:, None]), batch)
        headline = self.task.headline
        return {f"early_exit_{headline}": values[headline], "early_exit_ticks": answer.ticks.float()}

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return perf_counter()

    def _headline(self, task: Task, batch, model: Thinker | None = None) -> Tensor:
        *inputs, _ = batch
        return task.metrics(self(*inputs, model=model), batch, self.most_certain)[task.headline]

    def _test_old(self) -> None:
        """What the base was trained for, before and after."""
        loader, limit = self.old.test_dataloader(), self.trainer.limit_test_batches
        before, after = [], []
        for batch in islice(loader, limit if isinstance(limit, int) else math.ceil(limit * len(loader))):
            batch = self.transfer_batch_to_device(batch, self.device, 0)
            with self.trainer.precision_plugin.test_step_context():
                before.append(self._headline(self.old, batch, self.before[0]))
                after.append(self._headline(self.old, batch))
        name = self.old.headline
        self._log_values("test", {f"old_before_{name}": torch.cat(before), f"old_{name}": torch.cat(after)})

    def on_test_epoch_end(self) -> None:
        if self.old is not None:
            self._test_old()
        self._log_values("test", {name: value[None] for name, value in self.calibration.compute().items()})
        self.difficulty_rows = self.by_difficulty.rows()

    def predict_step(self, batch, batch_idx: int) -> dict[str, Tensor]:
        """The answer of every sample: its logits (B, C), the tick it was given at (from 1) and the certainty."""
        *inputs, _ = batch
        thought = self(*inputs)
        tick = answer_tick(thought.certainty, self.most_certain)
        return {
            "predictions": gather_tick(thought.predictions, tick),
            "tick": tick + 1,
            "certainty": gather_tick(thought.certainty, tick),
        }

    def _evaluate(self, split: str, batch) -> tuple[Thought, dict[str, Tensor]]:
        *inputs, _ = batch
        thought = self(*inputs)
        self.log(
            f"{split}/loss", self.task.loss(thought, batch, self.most_certain), batch_size=len(batch[0]), sync_dist=True
        )
        return thought, self._log_metrics(split, thought, batch)

    def _log_metrics(self, split: str, thought: Thought, batch) -> dict[str, Tensor]:
        values = self.task.metrics(thought, batch, self.most_certain)
        self._log_values(split, values)
        return values

    def _log_values(self, split: str, values: dict[str, Tensor]) -> None:
        """Means over samples. Curves over ticks go to the callback that collects them, one value a tick."""
        for name, value in values.items():
            if value.ndim == 1:
                shown = split == "train" and name in (self.task.headline, "ticks")
                self.log(
                    f"{split}/{name}", value.mean(), batch_size=len(value), sync_dist=split != "train", prog_bar=shown
                )
            elif split == "test" or (split == "val" and not name.endswith(CUMULATIVE)):
                for tick, mean in enumerate(value.mean(0), start=1):
                    self.log(f"{split}/{name}/{tick:03}", mean, batch_size=len(value), sync_dist=True)

    # --------------------------------------------------------------------------------------------------- checkpoints
    def on_save_checkpoint(self, content: dict) -> None:
        super().on_save_checkpoint(content)
        content["ctm"] = checkpoint.describe(self.model)
        if self.clip:
            content["clip"] = self.clip.state_dict()

    def on_load_checkpoint(self, content: dict) -> None:
        super().on_load_checkpoint(content)
        if self.clip and "clip" in content:
            self.clip.load_state_dict(content["clip"])
