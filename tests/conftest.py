"""What all tests share: one thread, no network, golden outputs, `train.py` as a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("GOLDEN", ROOT.parent / "shared" / "golden"))
golden_cases_run: set[str] = set()

torch.set_num_threads(1)


class Golden:
    """One golden file: what kind of model it is of, the published configuration, and its tensors."""

    def __init__(self, name: str):
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            meta = file.metadata()
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.kind, self.config = meta.get("model"), json.loads(meta.get("config", "null"))
        self.notes = meta.get("notes", "")

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def inputs(self) -> list[torch.Tensor]:
        return [self[key] for key in sorted(self.under("")) if key.startswith("input.")]

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


@pytest.fixture
def golden():
    def get(name: str) -> Golden:
        if not (GOLDEN / f"{name}.safetensors").is_file():
            pytest.skip(f"golden case {name} is not in {GOLDEN}")
        golden_cases_run.add(name)
        return Golden(name)

    return get


def relative(ours: torch.Tensor, theirs: torch.Tensor, at_least: float = 0.0) -> float:
    """||a - b|| / ||b||, with a floor under the denominator."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / max(float(theirs.norm()), at_least, 1e-30))


@pytest.fixture(autouse=True)
def basis_cache(tmp_path_factory, monkeypatch):
    """Spectral bases are kept for this run of the tests, not in the user's cache."""
    monkeypatch.setenv("SVF_CACHE", str(tmp_path_factory.getbasetemp() / "bases"))


@pytest.fixture
def train(tmp_path):
    """Runs train.py in an empty folder. Returns the finished process, or with `wait=False` the running one."""

    def run(*words: str, wait: bool = True, **env: str | None):
        command = [sys.executable, str(ROOT / "train.py"), *map(str, words)]
        environment = {k: v for k, v in (os.environ | {"OMP_NUM_THREADS": "1"} | env).items() if v is not None}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        if wait:
            return subprocess.run(command, cwd=tmp_path, env=environment, timeout=900, check=False, **pipes)
        return subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)

    return run


def pytest_sessionfinish(session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes
        session.config.workeroutput["golden"] = sorted(golden_cases_run)


class Workers:
    """What the processes of pytest-xdist tell the one that prints."""

    @staticmethod
    def pytest_testnodedown(node, error) -> None:
        golden_cases_run.update(getattr(node, "workeroutput", {}).get("golden", ()))


def pytest_configure(config) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(Workers())


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"golden cases run: {len(golden_cases_run)} {sorted(golden_cases_run)}")
