"""Bases: exact, in other machines' last bits, cached, killed and resumed, shared among ranks, from checkpoints."""

import copy
import functools
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import relative
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.progress import Progress
from svf_models import Case, llama, moe, qwen
from test_svf_tuner import perturb
from transformers.pytorch_utils import Conv1D

from svf import SVFConfig, decompose
from svf.__main__ import parser
from svf.decompose import DecompositionOptions, Matrix, solve
from svf.experts import checkpoint_matrices


def matrix(name, weight):
    return Matrix(name, tuple(weight.shape), lambda: weight)


@pytest.mark.parametrize("solver", ["eigh", "svd"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32), (3, 12, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_basis_is_the_singular_vectors(solver, shape, dtype):
    torch.manual_seed(0)
    w = torch.randn(shape).to(dtype)
    basis = solve(w, solver)
    assert basis.vectors.dtype == torch.float64
    assert relative(basis.values, torch.linalg.svdvals(w.double())) < 1e-10
    q = basis.vectors
    assert relative(q.mT @ q, torch.eye(min(shape[-2:]), dtype=torch.float64).expand(*shape[:-2], -1, -1)) < 1e-12
    # the columns of W Q (or the rows of Qᵀ W) are orthogonal and as long as the singular values
    product = w.double() @ q if decompose.side_of(shape) == "in" else w.double().mT @ q
    assert relative(product.mT @ product, torch.diag_embed(basis.values**2)) < 1e-12


def test_singular_square_and_zero_matrices():
    """Where fp32 Gram matrices fail: tiny singular values beside large ones."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0] for _ in range(2))
    s = torch.logspace(0, -6, 64, dtype=torch.float64)
    basis = solve((u * s) @ v.T)
    assert float(((basis.values - s) / s).abs().max()) < 1e-3
    assert float((basis.vectors[:, :40] * v[:, :40]).sum(0).abs().min()) > 1 - 1e-8
    basis = solve(torch.zeros(6, 4))
    assert torch.equal(basis.values, torch.zeros(4, dtype=torch.float64))
    assert torch.isfinite(basis.vectors).all()


def test_digest_is_of_shape_dtype_and_bytes():
    w = torch.arange(12.0).view(3, 4)
    assert decompose.digest(w) == decompose.digest(w.clone().t().contiguous().t())
    others = [w.view(4, 3), w.bfloat16(), w + torch.eye(3, 4) * 1e-6]
    assert len({decompose.digest(x) for x in [w, *others]}) == 4
    a = decompose.basis_hash({"x": "1", "y": "2"})
    assert a == decompose.basis_hash({"y": "2", "x": "1"})
    assert a != decompose.basis_hash({"x": "2", "y": "1"})


def test_expert_of_another_solver_and_thread_count(tmp_path):
    """Made with eigenvectors on one thread, loaded where bases come from an SVD on two: the same logits."""
    case = Case(lambda: llama(hidden_size=96, intermediate_size=160))
    model = get_peft_model(case.model, SVFConfig(target_modules="all-linear", decomposition={"solver": "eigh"}))
    perturb(model)
    expected = case(model)
    model.save_pretrained(tmp_path)
    first = next(model.base_model.layers()).svf_basis.clone()
    base = model.unload()
    torch.set_num_threads(2)
    try:
        config = SVFConfig.from_pretrained(tmp_path)
        config.decomposition = {"solver": "svd"}
        again = PeftModel.from_pretrained(base, tmp_path, config=config)
    finally:
        torch.set_num_threads(1)
    assert not torch.equal(next(again.base_model.layers()).svf_basis, first)
    assert relative(case(again), expected) < 1e-5


def big(n=4, size=512):
    torch.manual_seed(0)
    return [matrix(f"m{i}", torch.randn(size, size + 16 * i)) for i in range(n)]


def test_cached_once(tmp_path, monkeypatch):
    options = DecompositionOptions(cache=str(tmp_path))
    matrices = big()
    known = decompose.fill(matrices, options)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(files) == 4
    monkeypatch.setattr(decompose, "solve", lambda *_: pytest.fail("paid twice"))
    renamed = [replace(m, name=f"other.{m.name}") for m in reversed(matrices)]
    for m, basis in zip(renamed, decompose.bases(renamed, options, known[::-1], [None, 5, None, 3]), strict=True):
        kept = {"other.m2": 5, "other.m0": 3}.get(m.name, 512)
        assert basis.vectors.shape == (512, kept)
        assert basis.values.shape == (kept,)
        w = m.load().double()
        w = w if decompose.side_of(m.shape) == "in" else w.T
        assert relative((w @ basis.vectors.double()).norm(dim=0), basis.values) < 1e-6
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_a_transposed_weight_has_a_basis_of_its_own(tmp_path, monkeypatch):
    """A square Conv1D is (n_in, n_out) as a module, (n_out, n_in) as a parameter: the same bytes, other directions."""
    monkeypatch.setattr(decompose, "CACHE_FROM", 8)
    torch.manual_seed(0)
    w = torch.randn(24, 24)
    model = torch.nn.Sequential(Conv1D(24, 24))
    with torch.no_grad():
        model[0].weight.copy_(w)
    for targets, as_matrix in (({"target_modules": ["0"]}, w.T), ({"target_parameters": ["0.weight"]}, w)):
        config = SVFConfig(decomposition={"cache": str(tmp_path)}, **targets)
        layer = next(get_peft_model(copy.deepcopy(model), config).base_model.layers())
        product = as_matrix.double() @ layer.basis("weight").double()
        assert relative(product.norm(dim=0), layer.values("weight")) < 1e-5
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{decompose.SOLVER}-{decompose.digest(w)}{end}.safetensors" for end in ("-T", "")]


class Live:
    """Counts the weights that are in memory, and the most that ever were."""

    def __init__(self):
        self.now = self.most = 0
        self.lock = threading.RLock()

    def add(self, weight):
        self._count(1)
        weakref.finalize(weight, self._count, -1)
        return weight

    def _count(self, n):
        with self.lock:
            self.now += n
            self.most = max(self.most, self.now)


@pytest.mark.parametrize(
    ("dtype", "hashed"), [(torch.bfloat16, 4), (torch.float32, 2), (torch.float64, 1)], ids=["bf16", "fp32", "fp64"]
)
def test_one_matrix_in_memory_at_a_time(tmp_path, monkeypatch, dtype, hashed):
    """Threads that only hash hold as many as are no more bytes than one in fp64."""
    live, size = Live(), 128

    def load(seed):
        weight = live.add(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).to(dtype))
        time.sleep(0.005)  # so that threads overlap
        return weight

    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(decompose, "CACHE_FROM", size)
    matrices = [Matrix(f"m{i}", (size, size), functools.partial(load, i)) for i in range(8)]
    options = DecompositionOptions(cache=str(tmp_path))
    known = decompose.digests(matrices)
    assert 1 <= live.most <= hashed
    live.most = 0
    decompose.fill(matrices[:3], options, known[:3])
    assert live.most == 1
    assert len(list(tmp_path.iterdir())) == 3
    live.most = 0
    kept = [3, None, 3, None]
    options = DecompositionOptions(cache=False)
    for basis, k in zip(decompose.bases(matrices[:4], options, known[:4], kept), kept, strict=True):
        assert live.most == 1 and live.now == 0
        assert basis.vectors.dtype == dtype
        assert basis.vectors.untyped_storage().nbytes() == size * (k or size) * dtype.itemsize


def test_the_command_reads_one_matrix_at_a_time(tmp_path, monkeypatch):
    """Neither the skeleton nor anything else has the model's weights."""
    monkeypatch.setattr(decompose, "CACHE_FROM", 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    Case(llama).model.save_pretrained(tmp_path / "base")
    live, read = Live(), decompose._tensor
    monkeypatch.setattr(decompose, "_tensor", lambda path, name: live.add(read(path, name)))
    args = parser().parse_args(["decompose", str(tmp_path / "base"), "--cache", str(tmp_path / "cache")])
    args.run(args)
    assert len(list((tmp_path / "cache").iterdir())) == 14
    assert (live.most, live.now) == (1, 0)


def test_ranks_share_the_work(tmp_path, monkeypatch):
    options = DecompositionOptions(cache=str(tmp_path))
    matrices = big()
    done = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        decompose.fill(matrices, options)
        done.append(len(list(tmp_path.iterdir())))
    assert done == [2, 3, 4]


KILLED = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_svf_decompose import big
from svf import decompose
if {slow}:
    solve = decompose.solve
    def slowly(*args):
        print("solving", flush=True)
        return solve(*args)
    decompose.solve = slowly
decompose.fill(big(6), decompose.DecompositionOptions(cache={cache!r}, progress=False))
"""


@pytest.mark.slow
def test_killed_at_any_point_goes_on(tmp_path):
    tests = os.path.dirname(__file__)
    code = KILLED.format(tests=tests, cache=str(tmp_path), slow=True)
    solved = 0
    for wait in (0.0, 0.05, 0.15):
        run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert run.stdout.readline() == "solving\n"
        time.sleep(wait)
        run.send_signal(signal.SIGKILL)
        run.wait()
        whole = list(tmp_path.glob("*.safetensors"))
        assert len(whole) >= solved
        solved = len(whole)
        for path in whole:
            decompose._read(path, None)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.count("solving") == 6 - solved
    assert len(list(tmp_path.glob("*.safetensors"))) == 6


RANKED = """
import sys, torch
sys.path.insert(0, {tests!r})
from peft import get_peft_model
from svf import SVFConfig, decompose
torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(4)))
solve, count = decompose.solve, []
decompose.solve = lambda *args: (count.append(1), solve(*args))[1]
model = get_peft_model(model, SVFConfig(target_modules="all-linear", decomposition={{"cache": {cache!r}}}))
assert torch.isfinite(sum(layer.svf_values.sum() for layer in model.base_model.layers()))
open({cache!r} + f"/rank{{torch.distributed.get_rank()}}", "w").write(str(len(count)))
"""


@pytest.mark.slow
def test_a_distributed_run_shares_the_work(tmp_path):
    script = tmp_path / "ranked.py"
    script.write_text(RANKED.format(tests=os.path.dirname(__file__), cache=str(tmp_path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631"]
    subprocess.run([*launch, str(script)], check=True, capture_output=True, timeout=300)
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_half_written_files_are_not_read(tmp_path):
    options = DecompositionOptions(cache=str(tmp_path))
    aside = tmp_path / f"{decompose.SOLVER}-x.1.tmp"
    aside.write_bytes(b"half")
    os.utime(aside, (0, 0))
    decompose.fill(big(1), options)
    assert not aside.exists()
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{file} is damaged .*; remove it"):
        list(decompose.bases(big(1), options, decompose.digests(big(1)), [None]))
    with pytest.raises(ValueError, match="no cache to fill"):
        decompose.fill(big(1), DecompositionOptions(cache=False))


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (llama, {"target_modules": "all-linear"}),
        (qwen, {"target_modules": "all-linear"}),
        (moe, {"target_modules": "all-linear", "target_parameters": EXPERTS}),
        (moe, {"target_parameters": EXPERTS}),
    ],
    ids=["llama", "qwen", "moe", "moe-experts"],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_checkpoint_has_the_hash_of_the_model_loaded_from_it(tmp_path, make, targets, dtype):
    """Also where it stores the experts of a layer one by one."""
    case = Case(make)
    case.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    matrices = checkpoint_matrices(tmp_path, SVFConfig(**targets), dtype)
    assert sum(len(m.shape) == 3 for m in matrices) == (4 if make is moe else 0)
    found = decompose.basis_hash({m.name: decompose.digest(m.load()) for m in matrices})
    model = get_peft_model(case.model.to(dtype or torch.float32), SVFConfig(**targets))
    assert model.peft_config["default"].basis_hash == found


def test_the_command_decomposes_the_experts_of_a_layer(tmp_path, monkeypatch, capsys):
    """The model then finds every basis in the cache."""
    monkeypatch.setattr(decompose, "CACHE_FROM", 8)
    case = Case(moe)
    case.model.save_pretrained(tmp_path / "base")
    words = ["decompose", str(tmp_path / "base"), "--cache", str(tmp_path / "cache"), "--target-parameters", *EXPERTS]
    args = parser().parse_args(words)
    args.run(args)
    assert len(list((tmp_path / "cache").iterdir())) == 4
    monkeypatch.setattr(decompose, "solve", lambda *_: pytest.fail("paid twice"))
    config = SVFConfig(target_parameters=EXPERTS, decomposition={"cache": str(tmp_path / "cache")})
    model = get_peft_model(case.model, config)
    assert model.peft_config["default"].basis_hash in capsys.readouterr().out
    args = parser().parse_args([*words[:-1], "experts.down_prj"])
    with pytest.raises(ValueError, match=r"'experts\.down_prj'; did you mean experts\.down_proj\?"):
        args.run(args)


def test_progress_shows_time_left(monkeypatch):
    """From the first matrix on, also where one takes longer than a minute; by cost, not by number."""
    clock, bars = [100.0], []

    def bar(*columns, **settings):
        console = Console(file=io.StringIO(), force_terminal=True, width=120)
        settings |= {"console": console, "auto_refresh": False, "get_time": lambda: clock[0]}
        bars.append(Progress(*columns, **settings))
        return bars[0]

    def shown():
        with bars[0].console.capture() as text:
            bars[0].console.print(bars[0].get_renderable())
        return " ".join(text.get().split())

    monkeypatch.setattr("rich.progress.Progress", bar)
    large, small = (Matrix("", (n, n), lambda: None) for n in (8192, 4096))
    assert large.cost == 8 * small.cost
    seen = []
    with decompose._progress([large, small, small, large], True) as advance:
        for matrix, seconds in ((large, 80), (small, 10), (small, 10), (large, 100)):
            clock[0] += seconds
            advance(matrix)
            seen.append(re.sub(r"\x1b\[[\d;]*m", "", shown()))
    for line, (done, spent, left) in zip(
        seen, [(1, "1:20", "1:40"), (2, "1:30", "1:30"), (3, "1:40", "1:20"), (4, "3:20", "0:00")], strict=True
    ):
        assert f"{done}/4 0:0{spent} left 0:0{left}" in line


def test_no_bar_for_what_is_quick(capsys):
    with decompose._progress(big(2, 64), True) as advance:
        advance(big(1, 64)[0])
    assert capsys.readouterr().out == ""
