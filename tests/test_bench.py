"""The benchmark measures nothing that is wrong."""

import json
import sys

import pytest
import torch

from ctm import bench, ops

TINY = {
    "d_model": 24, "d_input": 8, "ticks": 3, "heads": 2, "n_synch_out": 6, "n_synch_action": 4, "memory_length": 3,
    "nlm_hidden": 4, "synapse_depth": 2,
}  # fmt: skip


@pytest.fixture
def case(monkeypatch) -> bench.Case:
    monkeypatch.delenv("CTM_OPS", raising=False)
    return bench.Case("parity/paper", "fp32", "cpu", 2, TINY)


def test_paths_that_agree_pass(case):
    assert 0 < case.check() < 1e-3
    assert case.model.training


@pytest.mark.parametrize("factor", [float("nan"), 10.0])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("since", [1, 3])
def test_what_is_wrong_from_some_thought_on_is_refused(case, since, learns, factor, monkeypatch):
    """Of those with gradients, or of those without: a graph may be wrong where launches were right."""
    right, thoughts = ops.fast, []

    def wrong(*args):
        sync, state = right(*args)
        thoughts.append(torch.is_grad_enabled())
        return (sync * factor if thoughts.count(learns) >= since and thoughts[-1] == learns else sync), state

    monkeypatch.setattr(ops, "fast", wrong)
    with pytest.raises(ValueError, match="the fast path differs from the plain one"):
        case.check()


def test_a_recording_that_is_no_number_is_refused(case, monkeypatch):
    keep = bench.Recording.take
    monkeypatch.setattr(bench.Recording, "take", lambda seen, work, sync: keep(seen, work, sync * float("nan")))
    with pytest.raises(ValueError, match="what the fast path records differs from the plain one by nan in sync_out"):
        case.recording_cost(0)
