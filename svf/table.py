"""python -m svf.table: adapters and objectives beside each other, under one recipe, over domains and seeds.

    python -m svf.table jobs=16 data.allow_code_execution=true       # words of train.py go to every run

    jobs=2              runs side by side, each in a process of its own that makes one after another
    domains=math,code,logic
    methods=...         names as below, without spaces; all if not given
    seeds=5             for the two methods that the comparison is about; 3 for the others
    sweep=math          the domain whose selection part chooses every method's learning rate
    out=runs/table      where table.json and table.md are written

A run that is finished is not made again, so the same command goes on after a stop. Every number is of the test part:
mean and half of its 95 % interval over seeds (Student's t) with their number n; for the base over requests. Each
method's learning rate is one of four that are a factor of about three apart.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tasks.run import fail

DOMAINS = ("math", "code", "logic")


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    words: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: int = 3


LORA = ("model.adapter=peft.LoraConfig", "model.adapter.r=16", "model.adapter.lora_alpha=32")
IA3 = (
    "model.adapter=peft.IA3Config", "model.adapter.target_modules=[k_proj,v_proj,down_proj]",
    "model.adapter.feedforward_modules=[down_proj]",
)  # fmt: skip
METHODS = {
    "SVF, reward": Method((), (3e-3, 1e-2, 3e-2, 1e-1), 5),
    "LoRA r16, reward": Method(LORA, (3e-4, 1e-3, 3e-3, 1e-2), 5),
    "SVF, target": Method(("model.objective=target",), (3e-3, 1e-2, 3e-2, 1e-1)),
    "LoRA r16, target": Method((*LORA, "model.objective=target"), (3e-4, 1e-3, 3e-3, 1e-2)),
    "IA3, reward": Method(IA3, (3e-3, 1e-2, 3e-2, 1e-1)),
    "full, reward": Method(("model.adapter=null",), (3e-5, 1e-4, 3e-4, 1e-3)),
}


@dataclass(frozen=True)
class Run:
    name: str
    words: tuple[str, ...]

    @property
    def result(self) -> dict | None:
        """What its test found, of the attempt that came to an end."""
        found = sorted(Path("runs/expert").glob(f"{self.name}.*/test.json"))
        return json.loads(found[-1].read_text()) if found else None

    def make(self) -> None:
        """Trains and tests in this process."""
        from tasks import cli

        attempt = sum(1 for _ in Path("runs/expert").glob(f"{self.name}.*"))
        sys.argv = ["train.py", *cli.spell([*self.words, f"run={self.name}.{attempt}"])]
        cli.main()


def make(run: Run, log: Path) -> str | None:
    """In a worker. Returns what went wrong, or None."""
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            run.make()
        except (SystemExit, Exception) as error:
            if not isinstance(error, SystemExit):
                import traceback

                traceback.print_exc()
            return f"{run.name}: {error!r}, see {log}"
    return None


def make_all(runs: list[Run], jobs: int, folder: Path) -> None:
    """Makes those that are not finished, `jobs` at a time.

    Raises:
        RuntimeError: where runs failed, when the others are finished.
    """
    missing = [run for run in runs if run.result is None]
    folder.mkdir(parents=True, exist_ok=True)
    failed, began = [], time.monotonic()
    with multiprocessing.get_context("spawn").Pool(min(jobs, max(1, len(missing)))) as pool:
        pending = [pool.apply_async(make, (run, folder / f"{run.name}.log")) for run in missing]
        for done, result in enumerate(pending, start=1):
            if error := result.get():
                failed.append(error)
            print(f"{done} of {len(missing)} runs, {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        raise RuntimeError("; ".join(failed))


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).replace("--", "-")


def run_of(name: str, rate: float, domain: str, seed: int, others: tuple[str, ...], words: list[str]) -> Run:
    method = METHODS[name]
    return Run(
        f"table-{slug(name)}-{rate:g}-{domain}-{seed}",
        (
            "task=expert", "trainer.logger=false", f"data.domain={domain}", f"data.others=[{','.join(others)}]",
            *method.words, *words, f"model.optim.lr={rate}", f"seed_everything={seed}",
        ),
    )  # fmt: skip


def table(options: dict[str, str], words: list[str]) -> dict:
    """Makes all runs and returns the table's cells."""
    from scipy.stats import t as student_t  # noqa: F401 (fails before the work, not behind it)

    from tasks.repeat import interval

    jobs, out = int(options.get("jobs", 2)), Path(options.get("out", "runs/table"))
    domains = tuple(options.get("domains", ",".join(DOMAINS)).split(","))
    chosen = options.get("methods")
    methods = {k: m for k, m in METHODS.items() if chosen is None or k.replace(" ", "") in chosen.split(";")}
    if not methods:
        fail(f"methods={chosen}: there are {'; '.join(name.replace(' ', '') for name in METHODS)}")
    sweep, most = options.get("sweep", domains[0]), int(options.get("seeds", 5))

    def others(domain: str) -> tuple[str, ...]:
        return tuple(other for other in domains if other != domain)

    tried = {name: [run_of(name, r, sweep, 1000, (), words) for r in m.rates] for name, m in methods.items()}
    bases = {
        domain: Run(
            f"table-base-{domain}",
            ("test", "task=expert", "trainer.logger=false", f"data.domain={domain}", "model.adapter=null", *words),
        )
        for domain in domains
    }
    make_all([run for runs in tried.values() for run in runs] + list(bases.values()), jobs, out)
    selected = {name: [run.result["selection"] for run in runs] for name, runs in tried.items()}
    rates = {name: m.rates[max(range(len(m.rates)), key=selected[name].__getitem__)] for name, m in methods.items()}
    runs = {
        (name, domain): [
            run_of(name, rates[name], domain, seed, others(domain), words) for seed in range(min(most, m.seeds))
        ]
        for name, m in methods.items()
        for domain in domains
    }
    make_all([run for group in runs.values() for run in group], jobs, out)
    base = {domain: bases[domain].result for domain in domains}
    rows = [
        {
            "method": "base",
            "cells": {
                d: {"mean": r["test/accuracy"], "half": 1.96 * (p_q(r["test/accuracy"]) / r["n"]) ** 0.5, "n": r["n"]}
                for d, r in base.items()
            },
        }
    ]
    for name in methods:
        cells, forgotten, costs = {}, [], []
        for domain in domains:
            results = [run.result for run in runs[name, domain]]
            mean, half = interval([result["test/accuracy"] for result in results])
            cells[domain] = {"mean": mean, "half": half, "n": len(results)}
            for result in results:
                changes = [result[f"test/{other}"] - base[other]["test/accuracy"] for other in others(domain)]
                forgotten += [sum(changes) / len(changes)] if changes else []
            costs += results
        mean, half = interval(forgotten) if forgotten else (float("nan"), float("nan"))
        rows.append(
            {
                "method": name,
                "lr": rates[name],
                "selection by lr": dict(zip(map(str, methods[name].rates), selected[name], strict=True)),
                "cells": cells,
                "others": {"mean": mean, "half": half, "n": len(forgotten)},
                "trainable": costs[0]["trainable"],
                "seconds": interval([cost["seconds"] for cost in costs])[0],
                "peak_gib": max(cost.get("peak_gib", float("nan")) for cost in costs),
            }
        )
    content = {"domains": list(domains), "sweep": sweep, "words": words, "rows": rows}
    (out / "table.json").write_text(json.dumps(content, indent=2))
    (out / "table.md").write_text(text := markdown(content))
    print(text)
    return content


def p_q(p: float) -> float:
    return p * (1 - p)


def markdown(content: dict) -> str:
    """The table for a page: accuracies in per cent."""

    def cell(value: dict, sign: str = "") -> str:
        return f"{100 * value['mean']:{sign}.1f} ± {100 * value['half']:.1f} ({value['n']})"

    domains = content["domains"]
    head = ["", *domains, "on the others", "trained", "lr", "seconds", "GiB"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in content["rows"]:
        cells = [row["method"], *(cell(row["cells"][domain]) for domain in domains)]
        if "lr" in row:
            cells += [cell(row["others"], "+"), f"{row['trainable']:,}", f"{row['lr']:g}", f"{row['seconds']:.0f}"]
            cells += [f"{row['peak_gib']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    own = ("jobs", "domains", "methods", "seeds", "sweep", "out")
    pairs = [word.partition("=") for word in sys.argv[1:]]
    if bad := next(("".join(pair) for pair in pairs if not pair[1]), None):
        fail(f"cannot read {bad!r}: arguments are key=value, of {', '.join(own)} or of train.py")
    options = {key: value for key, _, value in pairs if key in own}
    words = [f"{key}={value}" for key, _, value in pairs if key not in own]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        table(options, words)
    except RuntimeError as error:
        fail(str(error), 1)


if __name__ == "__main__":
    main()
