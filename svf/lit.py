"""The LightningModule around a language model: trains an adapter (or all of it) by reward or by right answers.

By reward, as Transformer² does (arXiv 2501.06252, section 3.2), with the textbook estimator: answers are drawn, a
checker judges them, and

    loss = - sum_t A log p(y_t) + kl * sum_t (r_t - log r_t - 1),   r_t = p_base(y_t) / p(y_t)

is averaged over answers, A being the reward minus its baseline. The end token is one of the tokens. Every answer is
judged once and trained on once, with the ids that were drawn. The published variant is a configuration of it.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.loggers import WandbLogger
from peft import PeftConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from svf import SVFConfig, rollout
from svf.attach import Adapting, attach
from svf.layers import SVFLayer
from svf.rollout import Rows
from svf.tokenizer import byte_tokenizer
from tasks.optim import Optim
from tasks.run import say
from tasks.text import Batch, Sample, TextTask

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Policy:
    """How rewards become gradients."""

    answers: int = 8
    """Drawn to every prompt."""
    temperature: float = 1.0
    """They are drawn with; 0 takes the likeliest, as published, which is no longer an estimate of a gradient."""
    baseline: Literal["leave_one_out", "running", "none"] = "leave_one_out"
    """Subtracted from a reward: the mean over the other answers to the prompt, the running mean over the domain, or
    nothing, as published."""
    momentum: float = 0.9
    """Of the running mean."""
    normalize: bool = False
    """Whether a step's advantages are divided by their standard deviation."""
    wrong: float = 0.0
    """Reward of a wrong answer, that of a right one being 1; published with -1."""
    kl: float = 0.0
    """Weight of the divergence from the base; published between 0 and 0.3."""

    def __post_init__(self):
        if self.answers < 1 or self.temperature < 0 or self.kl < 0 or not 0 <= self.momentum < 1:
            raise ValueError("model.policy needs answers >= 1, temperature >= 0, kl >= 0 and 0 <= momentum < 1")
        if self.baseline == "leave_one_out" and self.answers < 2:
            raise ValueError("model.policy.baseline=leave_one_out needs model.policy.answers of 2 or more")


@dataclass(frozen=True)
class Scratch:
    """Sizes of a Llama with random weights, which reads and writes bytes."""

    d_model: int = 128
    d_mlp: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    context: int = 256
    """Longest text, in tokens."""
    vocabulary: int = 258
    """258 tokens are in use: bytes, padding, end."""


class _Known(torch.autograd.Function):
    """A loss whose gradient has been computed, so that the trainer's own `backward` can be what puts it in place."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return None, None, *(grad * gradient for gradient in ctx.gradients)


class LitLM(Adapting, LightningModule):
    """Trains and tests a causal language model.

    Several domains with an SVF adapter make one expert each, in the same batches.

    Args:
        task: requests and their checker.
        base: folder or name of a checkpoint; a relative folder may also be one of this repository.
        scratch: sizes of a new model instead of a checkpoint.
        adapter: a PEFT configuration: SVF, LoRA, DoRA, IA3, ...; None trains the model itself.
        objective: `reward` of the model's own answers, or log-likelihood of right ones, `target`.
        policy: how rewards become gradients.
        max_new_tokens: an answer is cut off behind so many tokens.
        micro_batch: answers to go forward and backward at once; all if None.
        dtype: of the base's weights; an adapter's own precision is PEFT's matter (fp32 for SVF).
        attention: the implementation that Transformers is told to use; its own choice if None.
        gradient_checkpointing: computes activations again in backward instead of keeping them.
        optim: learning rate and its schedule.
    """

    def __init__(
        self,
        task: TextTask,
        base: str | None = None,
        scratch: Scratch | None = None,
        adapter: PeftConfig | None = None,
        objective: Literal["reward", "target"] = "reward",
        policy: Policy = Policy(),
        max_new_tokens: int = 16,
        micro_batch: int | None = None,
        dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
        attention: str | None = None,
        gradient_checkpointing: bool = False,
        optim: Optim = Optim(),  # noqa: B008
    ):
        super().__init__()
        if (base is None) == (scratch is None):
            raise ValueError("give model.base, a checkpoint to start from, or model.scratch, sizes of a new model")
        if max_new_tokens < 1 or (micro_batch is not None and micro_batch < 1):
            raise ValueError(f"model.max_new_tokens={max_new_tokens} and model.micro_batch={micro_batch}: at least 1")
        self.task, self.objective, self.policy, self.optim = task, objective, policy, optim
        self.max_new_tokens, self.micro_batch = max_new_tokens, micro_batch
        self.model, self.tokenizer = self._fresh(scratch, dtype) if scratch else self._load(base, dtype, attention)
        task.tokenizer = self.tokenizer
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})  # the other kind has no autograd.grad
        self.experts = task.domains if isinstance(adapter, SVFConfig) and len(task.domains) > 1 else []
        if adapter is not None:
            if len(task.domains) > 1 and not self.experts:
                raise ValueError(
                    f"data.domain={', '.join(task.domains)}: only SVF trains several experts at once; give one domain"
                )
            if self.experts and task.others:
                raise ValueError("data.others: which expert should answer them? Give one data.domain")
            self.model = self._adapt(adapter, base)
        optim.configure(self)  # refuses what does not fit the parameters, before any work
        self.model.train()  # Lightning keeps what it finds, and checkpoints are loaded for evaluation
        self.ends = rollout.end_tokens(self.model, self.tokenizer)
        self.pad = self.ends[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        self._refuse_short_answers()
        keeps_base = adapter is None and objective == "reward" and policy.kl > 0
        self.reference = copy.deepcopy(self.model).requires_grad_(False).eval() if keeps_base else None
        self.running: dict[str, float] = {}
        self.cost: dict[str, float] = {"trainable": sum(p.numel() for p in self.parameters() if p.requires_grad)}
        self.clock = {"generated": [0, 0.0], "trained": [0, 0.0]}  # tokens, seconds

    # ---------------------------------------------------------------------------------------------------- the model
    @staticmethod
    def _load(base: str, dtype: str, attention: str | None) -> tuple[nn.Module, Any]:
        folder = base if Path(base).is_dir() or not (ROOT / base).is_dir() else str(ROOT / base)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention), tokenizer
        except (OSError, ValueError) as error:
            problem = str(error).splitlines()[0]
        raise ValueError(f"model.base={base} cannot be loaded: {problem}")  # outside, so that it has no other cause

    @staticmethod
    def _fresh(scratch: Scratch, dtype: str) -> tuple[nn.Module, Any]:
        tokenizer = byte_tokenizer()
        config = LlamaConfig(
            vocab_size=scratch.vocabulary, hidden_size=scratch.d_model, intermediate_size=scratch.d_mlp,
            num_hidden_layers=scratch.layers, num_attention_heads=scratch.heads, num_key_value_heads=scratch.kv_heads,
            max_position_embeddings=scratch.context, tie_word_embeddings=True, bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # large ones are drawn where they will be
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype, torch.float32))
        return model, tokenizer

    def _adapt(self, adapter: PeftConfig, base: str | None) -> nn.Module:
        adapter = copy.deepcopy(adapter)
        adapter.task_type = adapter.task_type or "CAUSAL_LM"
        names = self.experts or ["default"]
        model = attach(self.model, adapter, base, names[0])
        for name in names[1:]:
            model.add_adapter(name, copy.deepcopy(adapter))
        if self.experts:
            model.base_model.set_adapter(names)
        return model

    def _refuse_short_answers(self) -> None:
        """Where no right answer fits, nothing can be learned."""
        for name in self.task.domains:
            targets = self.tokenizer([sample.target for sample in self.task.examples[name]], add_special_tokens=False)
            shortest = 1 + min(map(len, targets.input_ids))  # with its end
            if shortest > self.max_new_tokens:
                raise ValueError(
                    f"model.max_new_tokens={self.max_new_tokens} cuts every answer to {name}, which takes "
                    f"{shortest} tokens or more"
                )

    def mix(self, samples: Sequence[Sample]) -> Tensor | None:
        """Every request's own expert, as weights (requests, experts), where there are several."""
        if not self.experts:
            return None
        chosen = torch.tensor([self.experts.index(sample.domain) for sample in samples], device=self.device)
        return nn.functional.one_hot(chosen, len(self.experts)).float()

    def answer(self, samples: Sequence[Sample], mix: Tensor | None, times: int = 1, temperature: float = 0.0) -> Rows:
        """The model's answers, `times` to every request."""
        prompts = [rollout.encode(self.tokenizer, sample.prompt) for sample in samples]
        return rollout.sample(self.model, prompts, self.ends, self.pad, self.max_new_tokens, temperature, times, mix)

    def texts(self, rows: Rows) -> list[str]:
        ids = [row[keep].tolist() for row, keep in zip(rows.answers.cpu(), rows.answered.cpu(), strict=True)]
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def clipped(self, rows: Rows) -> Tensor:
        """Which answers were cut off before their end, (B,)."""
        ended = torch.isin(rows.answers, torch.tensor(self.ends, device=rows.ids.device)) & rows.answered
        return ~ended.any(1)

    # ------------------------------------------------------------------------------------------------------ training
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logs = (self.global_step + 1) % self.trainer.log_every_n_steps == 0
        step = self._by_reward if self.objective == "reward" else self._by_target
        loss, values = step(batch.samples, logs)
        for name, value in values.items():
            self.log(f"train/{name}", value, prog_bar=name == "reward", batch_size=len(batch.samples))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch.samples))
        return loss

    def _by_reward(self, samples: list[Sample], logs: bool) -> tuple[Tensor, dict[str, float]]:
        policy, k = self.policy, self.policy.answers
        with self._timed("generated") as count:
            rows = self.answer(samples, self.mix(samples), k, policy.temperature)
            count(rows.answered.sum())
        requests = [sample for sample in samples for _ in range(k)]
        right = torch.tensor(self.task.check(requests, self.texts(rows)), dtype=torch.float32, device=self.device)
        reward = torch.where(right > 0, 1.0, policy.wrong)
        advantage = self._advantage(reward.view(-1, k), [sample.domain for sample in samples]).flatten()
        weight = advantage / self._peers(requests)
        share = 1 / self._peers(requests)
        sums = dict.fromkeys(("entropy", "kl"), torch.zeros((), device=self.device))

        def loss(index: Tensor, part: Rows, mix: Tensor | None) -> Tensor:
            log_p, entropy = rollout.log_probabilities(self.model, part, policy.temperature, mix, entropy=logs)
            total = -(weight[index] * log_p.sum(1)).sum()
            if policy.kl > 0 or logs:
                kl = self._divergence(part, log_p)
                if kl is not None:
                    total = total + policy.kl * (share[index] * kl.sum(1)).sum() if policy.kl > 0 else total
                    sums["kl"] = sums["kl"] + kl.detach().sum()
            if entropy is not None:
                sums["entropy"] = sums["entropy"] + entropy.sum()
            return total

        with self._timed("trained") as count:
            value = self._in_parts(rows, self.mix(requests), loss)
            count(rows.mask.sum())
        values = {"reward": reward.mean(), "right": right.mean()}
        if logs:
            tokens = rows.answered.sum()
            values |= {name: total / tokens for name, total in sums.items() if name != "kl" or self._has_base}
            values |= {"length": tokens / len(rows.ids), "clipped": self.clipped(rows).float().mean()}
            for name in self.experts:
                of_it = torch.tensor([sample.domain == name for sample in requests], device=self.device)
                values[f"right/{name}"] = right[of_it].mean()
        return value, values

    def _by_target(self, samples: list[Sample], logs: bool) -> tuple[Tensor, dict[str, float]]:
        prompts = [rollout.encode(self.tokenizer, sample.prompt) for sample in samples]
        answers = [
            [*self.tokenizer(sample.target, add_special_tokens=False).input_ids, self.ends[0]] for sample in samples
        ]
        rows = rollout.rows(prompts, answers, self.pad, self.device)
        if self.experts:  # every expert's mean is over its own tokens
            tokens = {
                name: sum(len(a) for a, s in zip(answers, samples, strict=True) if s.domain == name)
                for name in self.experts
            }
            weight = torch.tensor([1 / tokens[sample.domain] for sample in samples], device=self.device)
        else:
            weight = torch.full((len(samples),), 1 / sum(map(len, answers)), device=self.device)

        def loss(index: Tensor, part: Rows, mix: Tensor | None) -> Tensor:
            log_p, _ = rollout.log_probabilities(self.model, part, mix=mix)
            return -(weight[index] * log_p.sum(1)).sum()

        with self._timed("trained") as count:
            value = self._in_parts(rows, self.mix(samples), loss)
            count(rows.mask.sum())
        return value, {}

    def _peers(self, samples: Sequence[Sample]) -> Tensor:
        """For every row, how many rows its expert (or the one model) is trained with in this step."""
        if not self.experts:
            return torch.full((len(samples),), float(len(samples)), device=self.device)
        names = [sample.domain for sample in samples]
        return torch.tensor([float(names.count(name)) for name in names], device=self.device)

    def _advantage(self, reward_BK: Tensor, domains: list[str]) -> Tensor:
        """Rewards (prompts, answers) minus their baseline."""
        policy = self.policy
        if policy.baseline == "leave_one_out":
            k = reward_BK.shape[1]
            advantage = (reward_BK - reward_BK.mean(1, keepdim=True)) * (k / (k - 1))
        elif policy.baseline == "running":
            advantage = torch.empty_like(reward_BK)
            for name in dict.fromkeys(domains):
                of_it = torch.tensor([domain == name for domain in domains], device=reward_BK.device)
                mean = float(reward_BK[of_it].mean())
                before = self.running.setdefault(name, mean)
                advantage[of_it] = reward_BK[of_it] - before
                self.running[name] = policy.momentum * before + (1 - policy.momentum) * mean
        else:
            advantage = reward_BK
        return advantage / advantage.std().clamp(min=1e-6) if policy.normalize else advantage

    @property
    def _has_base(self) -> bool:
        return self.adapter is not None or self.reference is not None

    def _divergence(self, rows: Rows, log_p: Tensor) -> Tensor | None:
        """Estimate of the divergence from the base for every token (B, N): r - log r - 1 with r = p_base / p, which is
        never negative and right on average. None where there is no base to compare with."""
        if not self._has_base:
            return None
        with torch.no_grad():
            if self.reference is not None:
                base, _ = rollout.log_probabilities(self.reference, rows, self.policy.temperature)
            else:
                with self.model.disable_adapter():
                    base, _ = rollout.log_probabilities(self.model, rows, self.policy.temperature)
        log_r = base - log_p
        return (log_r.exp() - log_r - 1) * rows.answered

    def _in_parts(self, rows: Rows, mix: Tensor | None, loss) -> Tensor:
        """The sum of `loss(index, rows, mix)` over micro-batches of rows of similar lengths, with its gradient."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        total, gradients = torch.zeros((), device=self.device), None
        order = rows.prompt_lengths.argsort(stable=True)
        for index in order.split(self.micro_batch or len(order)):
            part = loss(index, rows.take(index), None if mix is None else mix[index])
            total = total + part.detach()
            found = torch.autograd.grad(part, parameters, materialize_grads=True)
            gradients = found if gradients is None else [a.add_(b) for a, b in zip(gradients, found, strict=True)]
        return _Known.apply(total, list(gradients), *parameters)

    @contextmanager
    def _timed(self, what: str) -> Iterator[Callable[[Tensor], None]]:
        """Adds to the clock what a part of the step took, and the tokens that it says."""
        tokens = []
        began = self._now()
        yield tokens.append
        self.clock[what][0] += int(tokens[0])
        self.clock[what][1] += self._now() - began

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def configure_optimizers(self) -> dict:
        return self.optim.configure(self)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Every expert's gradient has a norm of its own, as if it were trained alone."""
        if not self.experts or gradient_clip_val is None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for name in self.experts:
            own = [p for path, p in self.named_parameters() if p.requires_grad and path.split(".")[-1] == name]
            torch.nn.utils.clip_grad_norm_(own, gradient_clip_val)

    def on_train_start(self) -> None:
        self.began = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_train_end(self) -> None:
        self.cost["seconds"] = time.perf_counter() - self.began
        if self.device.type == "cuda":
            self.cost["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        for what, (tokens, seconds) in self.clock.items():
            if seconds:
                self.cost[f"{what}_per_second"] = tokens / seconds
                say(f"tokens {what}: {tokens:,}, {tokens / seconds:,.0f} per second")

    # ---------------------------------------------------------------------------------------------------- evaluation
    def on_validation_start(self) -> None:
        self.shown: list[list] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        answers = self._evaluate("val", batch)
        for name in self.task.domains:
            room = -(-16 // len(self.task.domains)) - sum(shown[0] == name for shown in self.shown)
            self.shown += [list(answer.values()) for answer in answers if answer["domain"] == name][: max(0, room)]

    def on_validation_end(self) -> None:
        accuracy = self.trainer.callback_metrics.get("val/accuracy")
        if accuracy is not None and self.trainer.state.fn == "fit":
            self.cost["selection"] = max(self.cost.get("selection", 0.0), float(accuracy))
        logger = next((logger for logger in self.loggers if isinstance(logger, WandbLogger)), None)
        if logger is None or self.trainer.sanity_checking or not self.trainer.is_global_zero:
            return
        import wandb

        shown = {"samples": wandb.Table(["domain", "prompt", "answer", "right"], self.shown)}
        for expert, layer, shift in self.shifts():
            shown[f"z/{expert}/{layer}"] = wandb.Histogram(shift.cpu().numpy())
            shown[f"z_rms/{expert}/{layer}"] = float(shift.square().mean().sqrt())
        logger.experiment.log(shown)

    @torch.no_grad()
    def shifts(self) -> Iterator[tuple[str, str, Tensor]]:
        """(expert, layer, e - 1 of its singular values) of an SVF adapter."""
        for module in self.model.modules():
            if isinstance(module, SVFLayer):
                for expert in module.experts:
                    for name in module.names():
                        yield expert, module.key, module.shift_of(expert, name)

    def on_test_start(self) -> None:
        self.answers: list[dict] = []

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        answers = self._evaluate("test", batch)
        if self.adapter is not None:
            with self.model.disable_adapter():
                base = self._answers(batch.samples, None)[1]
            answers = [answer | {"base_right": right} for answer, right in zip(answers, base, strict=True)]
        self.answers += answers

    def on_test_epoch_end(self) -> None:
        """The gain over the base, request by request, and answers.jsonl, who answered what."""
        learned = [answer for answer in self.answers if answer["domain"] in self.task.domains]
        if learned and "base_right" in learned[0]:
            self.log("test/before_accuracy", sum(a["base_right"] for a in learned) / len(learned))
            gain, half = paired_gain([a["right"] for a in learned], [a["base_right"] for a in learned])
            self.log("test/gain", gain)
            self.log("test/gain_95", half)
        folder = Path(self.trainer.default_root_dir)
        if self.trainer.is_global_zero and folder.is_dir():
            with (folder / "answers.jsonl").open("w") as file:
                file.writelines(json.dumps(answer) + "\n" for answer in self.answers)

    def _answers(self, samples: list[Sample], mix: Tensor | None) -> tuple[list[str], list[bool], Rows]:
        rows = self.answer(samples, mix)
        texts = self.texts(rows)
        return texts, self.task.check(samples, texts), rows

    def _evaluate(self, split: str, batch: Batch) -> list[dict]:
        samples = batch.samples
        texts, right, rows = self._answers(samples, self.mix(samples))
        answers = [
            {"domain": s.domain, "prompt": s.prompt, "answer": text, "right": ok}
            for s, text, ok in zip(samples, texts, right, strict=True)
        ]
        learned = [a["right"] for a in answers if a["domain"] in self.task.domains]
        values = {"accuracy": learned} if learned else {}
        if len(self.task.domains) + len(self.task.others) > 1:
            for name in dict.fromkeys(sample.domain for sample in samples):
                values[name] = [a["right"] for a in answers if a["domain"] == name]
        values |= {"length": rows.answered.sum(1).tolist(), "clipped": self.clipped(rows).tolist()}
        for name, value in values.items():
            mean = sum(map(float, value)) / len(value)
            self.log(f"{split}/{name}", mean, batch_size=len(value), sync_dist=True)
        return answers

    # --------------------------------------------------------------------------------------------------- checkpoints
    def save_adapter(self, folder: Path) -> bool:
        """Writes the adapter as a PEFT folder; a model trained whole goes to `model` beside it, with its tokenizer."""
        if super().save_adapter(folder):
            return True
        self.model.save_pretrained(folder.with_name("model"))
        self.tokenizer.save_pretrained(folder.with_name("model"))
        say(f"model: {folder.with_name('model')}")
        return False

    def on_save_checkpoint(self, content: dict) -> None:
        super().on_save_checkpoint(content)
        content["running"] = self.running

    def on_load_checkpoint(self, content: dict) -> None:
        super().on_load_checkpoint(content)
        self.running = dict(content.get("running", {}))


def paired_gain(right: Sequence[bool], base: Sequence[bool]) -> tuple[float, float]:
    """Mean difference of answers to the same requests, and half of its 95 % interval (normal approximation)."""
    n = len(right)
    gains = [float(a) - float(b) for a, b in zip(right, base, strict=True)]
    mean = sum(gains) / n
    variance = sum((gain - mean) ** 2 for gain in gains) / max(1, n - 1)
    return mean, 1.96 * math.sqrt(variance / n)
