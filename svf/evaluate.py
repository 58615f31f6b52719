"""All strategies on all tasks, over seeds: `python -m svf eval`.

For every seed and task, examples of its selection part choose what there is to choose (the mixture of few-shot, the
best single expert, the best LoRA), and every strategy answers the same items of its test part. Where a published set
has a test part only, the examples are taken out of it, for all strategies. A cell (strategy, task, seed) depends on
nothing but the settings and is written as soon as it is known, so that a run that was stopped goes on and ends with
the same file.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from svf.adapt import Adaptive, FewShot, Fixed, Report
from svf.experts import DISPATCH, Expert, ExpertLibrary, expert_folder, load_base, transfer
from tasks import text, text_sets
from tasks.repeat import interval

STRATEGIES = {
    "base": "no expert",
    "prompt": "the base names the kind of request, its expert answers",
    "classifier": f"the expert {DISPATCH!r} does",
    "few_shot": "the mixture of experts that answers the selection examples best",
    "few_shot_layers": "the same with weights by layer",
    "best_single": "the expert that does",
    "shuffled": "that expert with its layers shuffled: the control",
    "lora": "the LoRA that answers the selection examples best",
}


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on."""

    base: str
    experts: Mapping[str, str]
    loras: Mapping[str, str]
    tasks: Sequence[str]
    strategies: Sequence[str]
    seeds: Sequence[int]
    n: int = 200
    shots: int = 10
    population: int = 32
    generations: int = 20
    max_new_tokens: int = 24
    method: str = "cem"
    transfer: bool = False
    root: str = "data"


class Evaluation:
    """The cells of one evaluation, in one file.

    Args:
        settings: what to evaluate.
        out: JSON file; cells that it has already are not computed again.
        tokenizer: the base's.
        device: where to.
        allow_code_execution: whether what the model writes may be run, in a sandbox.

    Raises:
        ValueError: for unknown tasks or strategies, a task whose answers are run where that is not allowed, or a file
            that holds the cells of other settings or other weights, or no evaluation.
        RuntimeError: where answers have to be run and the system cannot isolate them.
    """

    def __init__(self, settings: Settings, out: Path, tokenizer: Any, device: str, allow_code_execution: bool = False):
        known = {"strategies": STRATEGIES, "tasks": (*text.GENERATORS, *text_sets.SETS)}
        for name, there in known.items():
            if wrong := [one for one in getattr(settings, name) if one not in there]:
                raise ValueError(f"{wrong[0]!r} is none of the {name}: {', '.join(there)}")
        needs = {"classifier": DISPATCH in settings.experts, "lora": bool(settings.loras)}
        for name, there in needs.items():
            if name in settings.strategies and not there:
                what = f"an expert named {DISPATCH}" if name == "classifier" else "--lora"
                raise ValueError(f"strategy {name} needs {what}; give it, or leave the strategy out")
        self.settings, self.out, self.tokenizer, self.device = settings, out, tokenizer, device
        self.checker = text.check
        runs = [task for task in settings.tasks if any(sample.runs_code for sample in self.samples(task, 0)[0])]
        if runs and not allow_code_execution:
            raise ValueError(
                f"{' and '.join(runs)} run what the model writes: add --allow-code-execution, or choose other --tasks"
            )
        if runs:
            from svf.sandbox import Sandbox

            self.checker = partial(text.check, sandbox=Sandbox())
        sources = [settings.base, *settings.experts.values(), *settings.loras.values()]
        self.compared = asdict(settings) | {"content": [content(source) for source in sources]}
        self.cells: dict[str, dict] = {}
        if out.exists():
            try:
                stored = json.loads(out.read_text())
            except ValueError:
                stored = None
            if not isinstance(stored, dict) or not isinstance(stored.get("cells"), dict):
                raise ValueError(f"{out} is no file of an evaluation; give another one with --out")
            if stored.get("settings") != json.loads(json.dumps(self.compared)):
                raise ValueError(f"{out} holds an evaluation with other settings; give another file with --out")
            self.cells = stored["cells"]

    @cached_property
    def library(self) -> ExpertLibrary:
        library = ExpertLibrary(load_base(Path(self.settings.base)).to(self.device))
        for name, folder in self.settings.experts.items():
            expert = Expert.load(expert_folder(folder))
            library.add(name, transfer(expert, library.base) if self.settings.transfer else expert)
        return library

    @cached_property
    def loras(self) -> ExpertLibrary:
        """The same base with LoRAs, no expert."""
        model = load_base(Path(self.settings.base)).to(self.device)
        for name, folder in self.settings.loras.items():
            if isinstance(model, PeftModel):
                model.load_adapter(folder, name)
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=name)
        return ExpertLibrary(model)

    def run(self, say: Callable[[str], None] = print) -> None:
        """Computes the cells that are missing."""
        s = self.settings
        for seed in s.seeds:
            for task in s.tasks:
                for strategy in s.strategies:
                    name = f"{strategy}/{task}/{seed}"
                    if name in self.cells:
                        continue
                    cell = self.cell(strategy, task, seed)
                    self.cells[name] = cell
                    self.write()
                    chosen = f"  {cell['chosen']}" if "chosen" in cell else ""
                    say(f"{name:40} {cell['right']:5} of {cell['n']}{chosen}")

    def samples(self, task: str, seed: int) -> tuple[list[text.Sample], list[text.Sample]]:
        """Examples to choose by and items to report on.

        Raises:
            ValueError: where there are not so many.
        """
        s = self.settings
        if task in text.GENERATORS:
            return text.samples(task, "selection", s.shots, seed), text.samples(task, "test", s.n, seed)
        order = random.Random(f"{task} {seed}")
        test = text_sets.load(task, "test", None, s.root, self.tokenizer)
        order.shuffle(test)
        if text_sets.SETS[task].train:
            choose = text_sets.load(task, "selection", None, s.root, self.tokenizer)
            order.shuffle(choose)
        else:
            choose, test = test[: s.shots], test[s.shots :]
        if len(choose) < s.shots or len(test) < s.n:
            raise ValueError(f"{task} has {len(choose)} examples and {len(test)} test items, not {s.shots} and {s.n}")
        return choose[: s.shots], test[: s.n]

    def cell(self, strategy: str, task: str, seed: int) -> dict[str, Any]:
        s = self.settings
        shots, test = self.samples(task, seed)
        if both := {sample.prompt for sample in shots} & {sample.prompt for sample in test}:
            raise ValueError(f"{task} has {len(both)} prompts both to choose by and to report on")
        search = FewShot(
            shots,
            per_layer=strategy == "few_shot_layers",
            method=s.method,
            population=s.population,
            generations=s.generations,
            seed=seed,
            max_new_tokens=s.max_new_tokens,
            checker=self.checker,
            progress=False,
        )
        if strategy == "lora":
            best = self.best_lora(search)
            self.loras.model.set_adapter(best)
            return self.tell(Adaptive(self.loras.model, self.tokenizer, self.loras, "base"), test, chosen=best)
        library = self.library
        if strategy in ("few_shot", "few_shot_layers"):
            adaptive = Adaptive(library.model, self.tokenizer, library, search)
            found = search.fit(adaptive)
            weights = [
                [round(weight, 4) for weight in column] for column in found.best.view(-1, len(library.names)).T.tolist()
            ]
            chosen = {name: column for name, column in zip(library.names, weights, strict=True) if any(column)}
            return self.tell(adaptive, test, chosen=chosen)
        if strategy in ("best_single", "shuffled"):
            best = self.best_single(search)
            if strategy == "best_single":
                return self.tell(Adaptive(library.model, self.tokenizer, library, best), test, chosen=best)
            control = "-".join((*library.names, "shuffled"))  # a name that no expert has
            library.add(control, transfer(library.expert(best), library.base, shuffle=seed))
            try:
                by = Fixed(control, "shuffled")
                return self.tell(Adaptive(library.model, self.tokenizer, library, by), test, chosen=best)
            finally:
                library.remove(control)
        return self.tell(Adaptive(library.model, self.tokenizer, library, strategy), test)

    def tell(self, adaptive: Adaptive, test: Sequence[text.Sample], **more: Any) -> dict[str, Any]:
        report: Report = adaptive.check(test, self.settings.max_new_tokens, self.checker)
        labels = [answer.route.label for answer in report.answers]
        kinds = {label: labels.count(label) for label in sorted(set(labels))}
        return {"right": sum(report.right), "n": len(test), **more, "routes": kinds}

    def best_single(self, search: FewShot) -> str:
        library = self.library
        adaptive = Adaptive(library.model, self.tokenizer, library, "base")
        scores = search.scores(adaptive, library.batch([library.weights(name) for name in library.kinds]))
        return max(zip(scores, library.kinds, strict=True), key=lambda pair: pair[0])[1]

    def best_lora(self, search: FewShot) -> str:
        adaptive = Adaptive(self.loras.model, self.tokenizer, self.loras, "base")
        scores = {}
        for name in self.settings.loras:
            self.loras.model.set_adapter(name)
            scores[name] = search.scores(adaptive, torch.zeros(1, 0))[0]
        return max(scores, key=scores.__getitem__)

    def write(self) -> None:
        """The whole file, aside first and then renamed."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        aside = self.out.with_name(f".{self.out.name}.{os.getpid()}")
        whole = {"settings": self.compared, "summary": self.summary(), "cells": self.cells}
        aside.write_text(json.dumps(whole, indent=1) + "\n")
        aside.replace(self.out)

    def summary(self) -> dict[str, Any]:
        """Per cent right, by strategy and task, over the seeds that are done for all: mean, half the 95 % interval,
        and the same of the difference to the base on the same items."""
        s = self.settings
        unseen = [task for task in s.tasks if task in text.UNSEEN]
        columns = {task: [task] for task in s.tasks} | ({"unseen": unseen} if len(unseen) > 1 else {})
        table: dict[str, Any] = {}
        for strategy in s.strategies:
            for column, of in columns.items():
                shares = self.shares(strategy, of)
                base = self.shares("base", of)
                both = [seed for seed in shares if seed in base]
                entry = dict(zip(("mean", "half"), _interval(list(shares.values())), strict=True))
                entry["n"] = s.n * len(of) * len(shares)
                if strategy != "base" and both:
                    difference = _interval([shares[seed] - base[seed] for seed in both])
                    entry["over_base"] = dict(zip(("mean", "half"), difference, strict=True))
                if shares:
                    table.setdefault(strategy, {})[column] = entry
        routed = {}
        for strategy in ("prompt", "classifier"):
            for task in s.tasks:
                cells = [c for name, c in self.cells.items() if name.startswith(f"{strategy}/{task}/")]
                if cells and task in text.DOMAINS:
                    named = [100 * c["routes"].get(task, 0) / c["n"] for c in cells]
                    routed.setdefault(strategy, {})[task] = dict(zip(("mean", "half"), _interval(named), strict=True))
        return {"accuracy": table, "routed_rightly": routed}

    def shares(self, strategy: str, tasks: Sequence[str]) -> dict[int, float]:
        """Per cent right by seed, the mean over tasks, of seeds that have them all."""
        found = {}
        for seed in self.settings.seeds:
            cells = [self.cells.get(f"{strategy}/{task}/{seed}") for task in tasks]
            if all(cells):
                found[seed] = sum(100 * cell["right"] / cell["n"] for cell in cells) / len(cells)
        return found

    def table(self) -> str:
        """The summary to read, as Markdown."""
        summary = self.summary()
        accuracy = summary["accuracy"]
        columns = list(dict.fromkeys(column for entries in accuracy.values() for column in entries))
        lines = [f"| strategy | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for strategy, entries in accuracy.items():
            cells = []
            for column in columns:
                entry = entries.get(column)
                over = entry and entry.get("over_base")
                cells.append("" if not entry else _shown(entry) + (f" ({_shown(over, '+')})" if over else ""))
            lines.append(f"| {strategy} | {' | '.join(cells)} |")
        s = self.settings
        lines.append(
            f"\nPer cent right of {s.n} test items a task and seed, the same for all strategies, seeds "
            f"{', '.join(map(str, s.seeds))}; {s.shots} selection examples choose. Mean ± 95 % interval (difference to "
            "the base on the same items)."
        )
        for strategy, tasks in summary["routed_rightly"].items():
            shown = ", ".join(f"{task} {_shown(entry)}" for task, entry in tasks.items())
            lines.append(f"\n{strategy} names the right kind for, per cent: {shown}")
        return "\n".join(lines)


def content(source: str) -> str:
    """Short SHA-256 of the weights and configuration in a folder; a name on the Hub stands for itself."""
    if not Path(source).is_dir():
        return source
    whole = hashlib.sha256()
    for path in sorted(Path(source).iterdir()):
        if path.suffix in (".safetensors", ".bin") or path.name in ("config.json", "adapter_config.json"):
            with path.open("rb") as file:
                whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]


def _interval(values: list[float]) -> tuple[float, float | None]:
    if not values:
        return float("nan"), None
    middle, half = interval(values)
    return round(middle, 4), None if half != half else round(half, 4)


def _shown(entry: Mapping[str, Any], sign: str = "") -> str:
    return f"{entry['mean']:{sign}.1f}" + (f" ± {entry['half']:.1f}" if entry["half"] is not None else "")
