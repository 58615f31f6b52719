"""The LightningModule around a CTM or a baseline. What is learned is the task's matter, how it thinks the model's."""

from collections.abc import Callable
from typing import Literal

import torch
from lightning import LightningModule
from torch import Tensor

from ctm import checkpoint
from ctm.baselines import LSTM, FeedForward, FFConfig, LSTMConfig
from ctm.encoders import Encoder
from ctm.loss import gather_tick
from ctm.model import CTM, CTMConfig, Thinker
from tasks.base import Task
from tasks.optim import Optim


class LitCTM(LightningModule):
    """Trains and tests a `Thinker`.

    Args:
        task: what is learned.
        encoder: makes the encoder for a token width; None means features without a projection (for `ff`).
        net: what thinks: the CTM, or one of the baselines.
        ctm: sizes of the CTM.
        lstm: sizes of the LSTM baseline.
        ff: sizes of the feed-forward baseline.
        optim: learning rate and its schedule.
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
    ):
        super().__init__()
        self.task, self.optim = task, optim
        self.most_certain = not (net == "lstm" and task.lstm_answers_last)
        if net == "ff":
            tokens = encoder(None)
            self.model = Thinker(
                tokens, FeedForward(ff, task.out_dims, tokens.n_tokens(*task.sample_size), tokens.width)
            )
        elif net == "lstm":
            self.model = Thinker(encoder(lstm.d_input), LSTM(lstm, task.out_dims))
        else:
            self.model = Thinker(encoder(ctm.d_input), CTM(ctm, task.out_dims))

    def forward(self, *inputs: Tensor):
        return self.model(*inputs)

    # ------------------------------------------------------------------------------------------------------ training
    def training_step(self, batch, batch_idx: int) -> Tensor:
        *inputs, _ = batch
        thought = self.model(*inputs)
        loss = self.task.loss(thought, batch, self.most_certain)
        self.log("train/loss", loss, prog_bar=True)
        if self._is_log_step():
            self._log_metrics("train", thought, batch)
        return loss

    def _is_log_step(self) -> bool:
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0

    def configure_optimizers(self) -> dict:
        return self.optim.configure(p for p in self.parameters() if p.requires_grad)

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

    def test_step(self, batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch, batch_idx: int) -> dict[str, Tensor]:
        """The answer of every sample: its logits (B, C), the tick it was given at (from 1) and the certainty."""
        *inputs, _ = batch
        thought = self.model(*inputs)
        certainty = thought.certainty
        tick = (
            certainty.argmax(1)
            if self.most_certain
            else torch.full_like(certainty[:, 0].long(), certainty.shape[1] - 1)
        )
        return {
            "predictions": gather_tick(thought.predictions, tick),
            "tick": tick + 1,
            "certainty": gather_tick(certainty, tick),
        }

    def _evaluate(self, split: str, batch) -> None:
        *inputs, _ = batch
        thought = self.model(*inputs)
        self.log(
            f"{split}/loss", self.task.loss(thought, batch, self.most_certain), batch_size=len(batch[0]), sync_dist=True
        )
        self._log_metrics(split, thought, batch)

    def _log_metrics(self, split: str, thought, batch) -> None:
        """Means over samples. Curves over ticks go to the callback that collects them, one value a tick."""
        for name, values in self.task.metrics(thought, batch, self.most_certain).items():
            if values.ndim == 1:
                shown = split == "train" and name in (self.task.headline, "ticks")
                self.log(
                    f"{split}/{name}", values.mean(), batch_size=len(values), sync_dist=split != "train", prog_bar=shown
                )
            elif split != "train":
                for tick, value in enumerate(values.mean(0), start=1):
                    self.log(f"{split}/{name}/{tick:03}", value, batch_size=len(values), sync_dist=True)

    # --------------------------------------------------------------------------------------------------- checkpoints
    def on_save_checkpoint(self, content: dict) -> None:
        content["ctm"] = checkpoint.describe(self.model)
