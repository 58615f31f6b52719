"""The benchmark measures nothing that is wrong."""

import json
import sys

import pytest
import torch

from svf import bench
from svf.mix import Mix


def test_parity_holds_and_notices(monkeypatch):
    assert bench.parity() == []
    monkeypatch.setattr(bench.spectral, "shift", lambda z, *args: 1.01 * z.float())
    wrong = bench.parity()
    assert any("gradients of one_sided off by 0.01" in line for line in wrong)


def test_parity_notices_rows_of_the_wrong_expert(monkeypatch):
    true = Mix.for_input
    monkeypatch.setattr(Mix, "for_input", lambda self, x, where: true(self, x, where).roll(1, 0))
    wrong = bench.parity()
    assert any(line.startswith("outputs of mixed rows off by") for line in wrong)
    assert any(line.startswith("gradients of mixed rows off by") for line in wrong)
    assert all("mixed rows" in line for line in wrong)


def test_what_was_not_measured_is_null(monkeypatch, tmp_path):
    values = {"ms": 1.5, "GiB": None, "rate": float("nan"), "share": float("inf"), "batch": "1x2"}
    monkeypatch.setattr(bench, "RESULTS", [values])
    bench.write(tmp_path / "numbers.json")
    assert json.loads((tmp_path / "numbers.json").read_text(), parse_constant=pytest.fail) == [
        {"ms": 1.5, "GiB": None, "rate": None, "share": None, "batch": "1x2"}
    ]


@pytest.fixture
def small(monkeypatch):
    """Models of no size, on the CPU."""
    for name, value in (("GPU", False), ("DEVICE", "cpu"), ("DTYPE", torch.float32), ("RESULTS", [])):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "SMALL", bench.SMALL | {"hidden_size": 32, "intermediate_size": 56, "vocab_size": 64})


def test_a_step_trains_the_experts_of_its_rows(small):
    """All of them, and no more than they have."""
    bench.step(1, 4, 8, ["one_sided", "one_sided experts"], times=1, rounds=1)
    one, several = bench.RESULTS
    assert several["trained"] == bench.EXPERTS * one["trained"] == bench.EXPERTS * 3 * 32
    model = bench.method("one_sided experts", bench.base(1))
    with model.mix(torch.eye(bench.EXPERTS)):
        model(input_ids=torch.arange(8).view(4, 2)).logits.square().sum().backward()
    zs = [p for name, p in model.named_parameters() if "svf_z" in name]
    assert len(zs) == 3 * bench.EXPERTS and all(z.grad.abs().sum() > 0 for z in zs)


def test_a_change_of_mixture_counts_what_the_next_forward_pays(small, monkeypatch):
    """A clock that only the making of mixtures moves."""
    model = bench.with_experts(bench.base(1))
    now, true = [0.0], bench.spectral.shift

    def shift(*args):
        now[0] += 1.0
        return true(*args)

    monkeypatch.setattr(bench.spectral, "shift", shift)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    assert bench.mixture_change(model, torch.rand(32, 3), times=2) == (0.0, 3.0)  # experts, of all layers at once


def test_no_number_is_printed_where_parity_fails(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench"])
    monkeypatch.setattr(bench, "parity", lambda: ["outputs of merged off by 0.1"])
    with pytest.raises(SystemExit) as end:
        bench.main()
    printed = capsys.readouterr()
    assert end.value.code == 1 and printed.out == ""
    assert printed.err == "parity failed, no numbers:\noutputs of merged off by 0.1\n"
