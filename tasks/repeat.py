"""Repeats a run over seeds: `python train.py repeat task=maze seeds=0,1,2` prints the mean and its 95 % interval.

Every seed is a run of its own, `runs/<task>/<name>-seed<k>`, started as its own process with the same words.
"""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t as student_t

from tasks import cli
from tasks.run import UserError, fail


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval (Student's t); NaN for a single value."""
    if len(values) < 2:
        return mean(values), math.nan
    return mean(values), student_t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))


def repeat(words: list[str]) -> None:
    """Trains and tests once for every seed. Ends with exit code 2 where the words cannot be read."""
    given = {word.lstrip("-").partition("=")[0]: word.partition("=")[2] for word in words}
    try:
        seeds = [int(seed) for seed in given.get("seeds", "0,1,2").split(",")]
    except ValueError:
        fail(f"seeds={given['seeds']}: give whole numbers, as in seeds=0,1,2")
    name = given.get("run") or time.strftime("%Y-%m-%d_%H-%M-%S")
    own = ("seeds", "run", "seed_everything")
    rest = [word for word in words if word.lstrip("-").partition("=")[0] not in own]
    try:
        configs = [word.partition("=")[2] for word in cli.spell(rest) if word.startswith("--config=")]
    except UserError as error:
        fail(str(error))
    task = next((task for task in map(cli.task_of, reversed(configs)) if task), None)
    if task is None:
        fail("repeat needs task=NAME, or a --config that names its task")
    train = Path(__file__).resolve().parent.parent / "train.py"
    results: dict[str, list[float]] = {}
    for seed in seeds:
        run = f"{name}-seed{seed}"
        command = [sys.executable, str(train), *rest, f"seed_everything={seed}", f"run={run}"]
        if code := subprocess.run(command).returncode:
            sys.exit(code)
        test = json.loads((cli.RUNS / task / run / "test.json").read_text())
        for metric in (key for key in test if key.startswith("test/")):
            results.setdefault(metric, []).append(test[metric])
    print(f"\n{task}, seeds {', '.join(map(str, seeds))}: mean ± 95 % interval")
    for metric, values in results.items():
        middle, half = interval(values)
        print(f"  {metric:20} {middle:.4f} ± {half:.4f}   ({', '.join(f'{value:.4f}' for value in values)})")
