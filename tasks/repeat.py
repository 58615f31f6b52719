"""Repeats a run over seeds and settings: mean and 95 % interval of every setting, no account needed.

    python train.py repeat task=maze seeds=0,1,2                          # over seeds
    python train.py repeat task=maze model.ctm.ticks=4,6,8 seeds=0,1,2    # a grid: a key with several values
    python train.py repeat sweep=configs/sweep.yaml                       # the grid of a W&B sweep

Every run is one of its own, `runs/<task>/<name>-seed<k>`, started as its own process with the same words.
"""

import csv
import json
import math
import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import yaml
from scipy.stats import t as student_t

from tasks import cli
from tasks.run import UserError, fail


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval (Student's t); NaN for a single value."""
    if len(values) < 2:
        return mean(values), math.nan
    return mean(values), student_t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))


def values_of(text: str) -> list[str]:
    """What stands between commas, those in brackets left alone."""
    return re.split(r",(?![^\[{]*[\]}])", text)


def sweep_words(path: str) -> list[str]:
    """The words of a W&B sweep file: those of its command, and `key=value,value` for each of its parameters.

    Raises:
        UserError: where it cannot be read, or is no grid.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
        parameters = content["parameters"].items()
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"sweep={path} cannot be read as a sweep with parameters ({error})") from error
    words = [word for word in content.get("command", []) if "=" in word and "$" not in word]
    for key, spec in parameters:
        values = spec.get("values", [spec["value"]] if "value" in spec else None)
        if not values:
            raise UserError(
                f"sweep={path}: {key} has no `values`, and only those make a grid; W&B's agent draws others"
            )
        words.append(f"{key}={','.join(json.dumps(v) if isinstance(v, list | dict) else str(v) for v in values)}")
    return words


def grid(words: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The words that hold for all runs, and the values of the keys that have several; a later word beats an earlier."""
    given = {word.lstrip("-").partition("=")[0]: word for word in words if "=" in word}
    axes = {key: values for key, word in given.items() if len(values := values_of(word.partition("=")[2])) > 1}
    return [word for word in words if word.lstrip("-").partition("=")[0] not in axes], axes


def repeat(words: list[str]) -> None:
    """Trains and tests every setting once for every seed. Ends with exit code 2 where the words cannot be read."""
    own = {"seeds": "", "run": "", "sweep": ""}
    own |= {k: v for k, _, v in (word.lstrip("-").partition("=") for word in words) if k in own}
    words = [word for word in words if word.lstrip("-").partition("=")[0] not in own]
    try:
        rest, axes = grid((sweep_words(own["sweep"]) if own["sweep"] else []) + words)
        swept = axes.pop("seed_everything", None)
        rest = [word for word in rest if not word.lstrip("-").startswith("seed_everything=")]
        try:
            seeds = [int(seed) for seed in (own["seeds"].split(",") if own["seeds"] else swept or [0, 1, 2])]
        except ValueError:
            raise UserError(f"seeds={own['seeds']}: give whole numbers, as in seeds=0,1,2") from None
        configs = [word.partition("=")[2] for word in cli.spell(rest) if word.startswith("--config=")]
        task = next((task for task in map(cli.task_of, reversed(configs)) if task), None)
        if task is None:
            raise UserError("repeat needs task=NAME, or a --config that names its task")
        name = own["run"] or time.strftime("%Y-%m-%d_%H-%M-%S")
        table = cli.RUNS / task / f"{name}.csv"
        if table.exists():
            raise UserError(f"{table} exists already: choose another name than run={name}")
    except UserError as error:
        fail(str(error))
    short = {key: key.rpartition(".")[2] for key in axes}
    if len(set(short.values())) < len(short):
        short = {key: key for key in axes}
    train = Path(__file__).resolve().parent.parent / "train.py"
    rows: list[dict] = []
    for setting in product(*axes.values()):
        here = dict(zip(axes, setting, strict=True))
        for seed in seeds:
            run = "-".join(
                [name, *(f"{short[key]}={value.replace('/', '_')}" for key, value in here.items()), f"seed{seed}"]
            )
            chosen = [f"{key}={value}" for key, value in here.items()]
            command = [sys.executable, str(train), *rest, *chosen, f"seed_everything={seed}", f"run={run}"]
            code = subprocess.run(command).returncode
            if code not in (0, 1):  # 1: the loss was not finite, which is a result
                sys.exit(code)
            test = json.loads((cli.RUNS / task / run / "test.json").read_text()) if code == 0 else {}
            rows.append(here | {"seed": seed} | {key: value for key, value in test.items() if key != "checkpoint"})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with table.open("x", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    report(task, axes, short, seeds, rows)
    print(f"every run: {table}")


def report(task: str, axes: dict, short: dict, seeds: list[int], rows: list[dict]) -> None:
    """Prints means and intervals: every metric of a single setting; the headline metric of several, the best first."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in axes), []).append(row)
    found = {}
    for setting, group in groups.items():
        ended = [row for row in group if "headline" in row]
        metrics = [key for key in (ended[0] if ended else ()) if key.startswith("test/")]
        found[setting] = {metric: [row[metric] for row in ended] for metric in metrics}
    headline = next((f"test/{row['headline']}" for row in rows if "headline" in row), None)
    print(f"\n{task}, seeds {', '.join(map(str, seeds))}: mean ± 95 % interval")
    if headline is None:
        return print("  no run ended with finite numbers")

    def line(label: str, values: list[float], wide: int) -> None:
        middle, half = interval(values)
        print(f"  {label:{wide}} {middle:.4f} ± {half:.4f}   ({', '.join(f'{value:.4f}' for value in values)})")

    if not axes:
        for metric, values in found[()].items():
            line(metric, values, 20)
        return
    labels = {s: " ".join(f"{short[k]}={v}" for k, v in zip(axes, s, strict=True)) for s in found}
    print(f"  {headline}")
    for setting in sorted(found, key=lambda s: -mean(found[s].get(headline) or [-math.inf])):
        values, wide = found[setting].get(headline), max(map(len, labels.values()))
        if values:
            line(labels[setting], values, wide)
        if len(values or []) < len(seeds):
            print(f"  {labels[setting]:{wide}} not finite in {len(seeds) - len(values or [])} of {len(seeds)} runs")
