"""`python -m ctm.bench`: what the fast recurrence saves, beside the plain loop in the same run.

A size is measured only after the two were found to agree: outputs with and without gradients, and every gradient, three
times each, for a GPU launches first, then records, then replays. A step is forward, loss, backward and AdamW, as the
published implementation is timed.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from ctm import CTM, CTMConfig, Thinker, ops
from ctm.loss import classification_loss
from ctm.modules import CrossAttention, SuperLinear
from ctm.record import Recording, record

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULTS = ("maze/paper", "maze/ablation", "parity/paper", "image/imagenet")
CLASSES = {"imagenet": (224, 1000), "cifar10": (32, 10), "cifar100": (32, 100)}
"""Pixels a side and classes of the data sets that are not on disk: random images stand for them."""
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
THOUGHTS = 3
"""That are compared, of a kind: on a GPU by launches, while it is recorded, replayed."""
RECORDED = ("attention", "pre_activations", "post_activations", "sync_action", "sync_out")
TOLERANCE = {"bf16": 0.1, "fp32": 2e-2}
"""Of one tensor's gradient, relative to its norm: what thousands of roundings leave, TF32's in fp32 on a GPU."""


def build(name: str, overrides: dict, batch: int) -> tuple[Thinker, Callable, tuple[Tensor, ...]]:
    """The model of a task file, its task's loss, and one batch of its data."""
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())

    def class_of(spec: dict) -> type:
        module, _, cls = spec["class_path"].rpartition(".")
        return getattr(importlib.import_module(module), cls)

    model, data = content["model"]["init_args"], content["data"]["init_args"]
    config = CTMConfig(**model["ctm"] | overrides)
    encoder = class_of(model["encoder"])(config.d_input, **model["encoder"].get("init_args", {}))
    torch.manual_seed(0)
    if data.get("name") in CLASSES:  # time does not depend on what the images show
        size, classes = CLASSES[data["name"]]
        images, labels = torch.randn(batch, 3, size, size), torch.randint(classes, (batch,))

        def loss(thought, batch):
            return classification_loss(thought.predictions, thought.certainty, batch[-1])

        return Thinker(encoder, CTM(config, (1, classes))), loss, (images, labels)
    task = class_of(content["data"])(**data)
    stream = task.dataset("train")
    samples = torch.utils.data.default_collate([stream[i] for i in range(batch)])
    return Thinker(encoder, CTM(config, task.out_dims)), task.loss, tuple(samples)


@contextmanager
def path(plain: bool):
    before = os.environ.get("CTM_OPS")
    os.environ["CTM_OPS"] = "naive" if plain else (before or "auto")
    try:
        yield
    finally:
        os.environ.pop("CTM_OPS")
        if before:
            os.environ["CTM_OPS"] = before


class Case:
    """One size and precision."""

    def __init__(self, name: str, precision: str, device: str, batch: int, overrides: dict):
        self.model, self.loss, data = build(name, overrides, batch)
        self.model.to(device).train()
        self.batch = tuple(x.to(device) for x in data)
        self.device, self.dtype = device, PRECISIONS[precision]
        self.tolerance = TOLERANCE[precision]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device == "cuda")

    def forward(self):
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(*self.batch[:-1])

    def gradients(self, plain: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Predictions and gradients without dropout, BatchNorm on stored statistics."""
        self.model.eval()
        self.model.zero_grad()
        with path(plain):
            thought = self.forward()
            # A smooth loss: the task's picks ticks, and would pick others for round-off.
            thought.predictions.square().mean().backward()
        grads = {name: p.grad.double() for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        self.model.train()
        return thought.predictions.detach(), grads

    def check(self) -> float:
        """The worst relative difference between plain and fast, of predictions and of every gradient.

        Without dropout, whose draws differ.

        Raises:
            ValueError: where it is above the tolerance, or no number.
        """
        theirs, plain = self.gradients(plain=True)
        floor = 1e-3 * float(sum(g.norm() ** 2 for g in plain.values()) ** 0.5)
        with path(plain=True), self.evaluating():
            thought = self.think()
        worst = 0.0
        for _ in range(THOUGHTS):
            ours, fast = self.gradients(plain=False)
            if fast.keys() != plain.keys():
                raise ValueError(f"only one of the two paths has gradients of {', '.join(fast.keys() ^ plain.keys())}")
            found = {name: (fast[name] - g).norm() / max(float(g.norm()), floor) for name, g in plain.items()}
            found["predictions"] = (ours - theirs).norm() / theirs.norm()
            worst = max(worst, self.tolerable("the fast path differs from the plain one", found))
        with path(plain=False), self.evaluating():
            for _ in range(THOUGHTS):
                found = {"predictions without gradients": (self.think() - thought).norm() / thought.norm()}
                worst = max(worst, self.tolerable("the fast path differs from the plain one", found))
        return worst

    def tolerable(self, what: str, differences: dict[str, Tensor]) -> float:
        """The worst of them; a ValueError where one is above the tolerance, or no number."""
        for name, difference in differences.items():
            if not difference <= self.tolerance:  # NaN is not
                raise ValueError(f"{what} by {float(difference):.1e} in {name}")
        return float(max(differences.values()))

    def step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(self.model(*self.batch[:-1]), self.batch)
        loss.backward()
        self.optimizer.step()

    @contextmanager
    def evaluating(self):
        """To switch every part of a model is no part of thinking."""
        self.model.eval()
        yield
        self.model.train()

    @torch.inference_mode()
    def think(self) -> Tensor:
        return self.forward().predictions

    def think_watched(self) -> Recording:
        with record(self.model) as seen:
            self.think()
        return seen

    def recording_cost(self, at_least: float) -> float:
        """How much longer a forward takes while everything is recorded: a share, from medians of runs by turns.

        Raises:
            ValueError: where the fast path records something else than the plain loop.
        """
        seen = {}
        for plain in (False, True):
            with path(plain), self.evaluating():
                for _ in range(1 if plain else THOUGHTS):
                    seen[plain] = self.think_watched()
        for name, theirs in ((name, getattr(seen[True], name)) for name in RECORDED):
            ours = getattr(seen[False], name)
            if (ours is None) != (theirs is None):
                raise ValueError(f"only one of the two paths records {name}")
            if theirs is not None:
                found = {name: (ours - theirs).norm() / theirs.norm()}
                self.tolerable("what the fast path records differs from the plain one", found)
        del seen, ours, theirs
        times: dict[Callable, list[float]] = {self.think: [], self.think_watched: []}
        start = time.perf_counter()
        with self.evaluating():
            while len(times[self.think]) < 6 or time.perf_counter() - start < at_least:
                for what, taken in times.items():
                    self.wait()
                    begin = time.perf_counter()
                    what()
                    self.wait()
                    taken.append(time.perf_counter() - begin)
        plain, watched = (sorted(taken[1:])[len(taken) // 2] for taken in times.values())
        return watched / plain - 1

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, what: Callable, at_least: float) -> float:
        """The median of single runs for so many seconds, at least five; warmed up."""
        for _ in range(4 if self.device == "cuda" else 1):
            what()
        self.wait()
        times, start = [], time.perf_counter()
        while len(times) < 5 or time.perf_counter() - start < at_least:
            begin = time.perf_counter()
            what()
            self.wait()
            times.append(time.perf_counter() - begin)
        return sorted(times)[len(times) // 2]

    def memory(self) -> float | None:
        """Peak GiB of a step."""
        if self.device != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        self.step()
        self.wait()
        return torch.cuda.max_memory_allocated() / 2**30

    def kernels(self) -> tuple[int, float] | None:
        """Kernels of a step, and the seconds that they keep the GPU busy."""
        if self.device != "cuda":
            return None
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            self.step()
            self.wait()
        launched = [event for event in profile.events() if event.device_type.name == "CUDA"]
        self.profile = profile
        return len(launched), sum(event.device_time for event in launched) / 1e6

    def flops(self) -> float:
        """Of a step, by counting the plain loop's."""
        from torch.utils.flop_counter import FlopCounterMode

        with path(plain=True), FlopCounterMode(display=False) as counter:
            self.step()
        return counter.get_total_flops()

    def bytes(self) -> float:
        """That the products of a step read and write where nothing stays in a cache, by counting the plain loop's.

        A product is a linear layer, a convolution, a layer of the neuron-level models, or a query's attention. At every
        call, so at every tick, its weights (or keys and values) are read once, and twice by the backward pass; its
        result is written once and read once by the backward pass; all in the type of products. Norms, the trace,
        synchronization and AdamW are left out.
        """
        operands = results = 0

        def count(module: nn.Module, inputs: tuple, result: Tensor) -> None:
            nonlocal operands, results
            used = inputs[1] if isinstance(module, CrossAttention) else [module.weight]
            operands += sum(tensor.numel() for tensor in used)
            results += result.numel()

        kinds = nn.Linear, nn.Conv2d, SuperLinear, CrossAttention
        hooks = [part.register_forward_hook(count) for part in self.model.modules() if isinstance(part, kinds)]
        with path(plain=True):
            self.forward()
        for hook in hooks:
            hook.remove()
        return (3 * operands + 2 * results) * self.dtype.itemsize


def measure(
    name: str, precision: str, device: str, batch: int, overrides: dict, at_least: float, profile: bool, recording: bool
) -> dict:
    """One row: parity first, then plain and fast side by side."""
    row = {"config": name, "precision": precision, "device": device, "batch": batch, **overrides}
    case = Case(name, precision, device, batch, overrides)
    row["difference"] = case.check()
    if recording:
        row["recording"] = case.recording_cost(at_least)
    for plain in (False, True):
        with path(plain):
            kind = "plain" if plain else "fast"
            row[f"{kind}_step"] = case.seconds(case.step, at_least)
            with case.evaluating():
                row[f"{kind}_forward"] = case.seconds(case.think, at_least)
            row[f"{kind}_memory"] = case.memory()
            if counted := case.kernels():
                row[f"{kind}_kernels"], row[f"{kind}_busy"] = counted
                if profile and not plain:
                    print(case.profile.key_averages().table(sort_by="device_time_total", row_limit=40))
        ops.clear()
        if device == "cuda":
            torch.cuda.empty_cache()
    row["flops"], row["bytes"] = case.flops(), case.bytes()
    return row


def floor(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Measured bytes and operations a second of this device: a large copy, a large product."""
    n = 2**13 if device == "cuda" else 2**10
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.empty_like(a)

    def fastest(what: Callable) -> float:
        best = float("inf")
        for _ in range(10):
            if device == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            what()
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - begin)
        return best

    return 2 * a.nbytes / fastest(lambda: b.copy_(a)), 2 * n**3 / fastest(lambda: torch.mm(a, a, out=b))


def show(row: dict) -> str:
    def ms(seconds: float) -> str:
        return f"{1000 * seconds:.1f} ms"

    words = [f"{row['config']} {row['precision']} batch {row['batch']}"]
    for what in ("step", "forward"):
        fast, plain = row[f"fast_{what}"], row[f"plain_{what}"]
        words.append(f"{what} {ms(fast)} (plain {ms(plain)}, {plain / fast:.1f}x)")
    if row["fast_memory"] is not None:
        words.append(f"memory {row['fast_memory']:.2f} GiB (plain {row['plain_memory']:.2f})")
        words.append(f"{row['fast_kernels']:,} kernels (plain {row['plain_kernels']:,}), busy {ms(row['fast_busy'])}")
    if "recording" in row:
        words.append(f"recording {row['recording']:+.1%} of the forward")
    for what in ("compute", "bandwidth"):
        fast, plain = row[f"fast_{what}_share"], row[f"plain_{what}_share"]
        words.append(f"{fast:.1%} of the {what} (plain {plain:.1%})")
    words.append(f"parity {row['difference']:.0e}")
    return " · ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ctm.bench", description=__doc__)
    parser.add_argument("--config", nargs="+", default=DEFAULTS, help="task files under configs/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--precision", nargs="+", default=None, choices=tuple(PRECISIONS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--ticks", type=int, nargs="+", default=[None], help="instead of the configuration's")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each number is measured")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a fast step")
    parser.add_argument("--record", action="store_true", help="measure what recording costs a fast forward, too")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    words = parser.parse_args()
    for name in words.config:
        if not (CONFIGS / f"{name}.yaml").is_file():
            parser.error(f"there is no configuration {name!r} in {CONFIGS}")
    if words.json and not words.json.parent.is_dir():
        parser.error(f"--json: there is no folder {words.json.parent}")
    if words.device == "cuda":
        torch.set_float32_matmul_precision("high")
    rows, failed = [], False
    for precision in words.precision or (("bf16", "fp32") if words.device == "cuda" else ("fp32",)):
        bandwidth, compute = floor(words.device, PRECISIONS[precision])
        print(f"{words.device} {precision}: {bandwidth / 1e9:,.0f} GB/s, {compute / 1e12:,.1f} TFLOP/s measured")
        for name in words.config:
            for ticks in words.ticks:
                overrides = {} if ticks is None else {"ticks": ticks}
                try:
                    row = measure(
                        name,
                        precision,
                        words.device,
                        words.batch,
                        overrides,
                        words.seconds,
                        words.profile,
                        words.record,
                    )
                except ValueError as error:
                    failed = True
                    print(f"{name} {precision}: not measured, {error}")
                    continue
                for kind in ("fast", "plain"):
                    row[f"{kind}_compute_share"] = row["flops"] / compute / row[f"{kind}_step"]
                    row[f"{kind}_bandwidth_share"] = row["bytes"] / bandwidth / row[f"{kind}_step"]
                rows.append(row)
                print(show(row), flush=True)
                if words.json:  # at once, for a later size may not fit
                    words.json.write_text(json.dumps(rows, indent=1))
    sys.exit(failed)


if __name__ == "__main__":
    main()
