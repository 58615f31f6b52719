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


def test_bytes_by_hand(case):
    batch, tokens, d, e, ticks = 2, 64, 24, 8, 3
    sync_action, sync_out = 4 * 5 // 2, 6 * 7 // 2
    linear = {"first": (8 + 24, 24), "down": (24, 16), "up": (16, 24)}
    weights = sync_action * e + 2 * e * e + 2 * batch * tokens * e  # query, its and the output projection, keys, values
    weights += sum(i * o for i, o in linear.values()) + d * (3 * 8 + 4 * 2)
    results = 3 * batch * e + batch * e + batch * sum(o for _, o in linear.values()) + batch * d * 10
    once = 2 * e * e + sync_out * 128 + 2 * e + e * e  # keys, values, head; positions and tokens of the encoder
    results_once = 2 * batch * tokens * e + batch * ticks * 128 + tokens * e + batch * tokens * e
    assert case.bytes() == 4 * (3 * (ticks * weights + once) + 2 * (ticks * results + results_once))


def test_shares_of_both_paths_are_printed_and_written(monkeypatch, capsys, tmp_path):
    words = ["--config", "parity/paper", "--device", "cpu", "--batch", "1", "--ticks", "1", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", ["bench", *words, "--json", str(tmp_path / "rows.json")])
    monkeypatch.setattr(bench, "floor", lambda *_: (1e9, 1e10))
    with pytest.raises(SystemExit) as end:
        bench.main()
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for kind in ("fast", "plain"):
        assert row[f"{kind}_bandwidth_share"] == pytest.approx(row["bytes"] / 1e9 / row[f"{kind}_step"])
        assert row[f"{kind}_compute_share"] == pytest.approx(row["flops"] / 1e10 / row[f"{kind}_step"])
        assert f"{row[f'{kind}_bandwidth_share']:.1%}" in printed and f"{row[f'{kind}_compute_share']:.1%}" in printed


@pytest.mark.parametrize(
    "words, said",
    [
        (["--config", "maze/papr"], "no configuration 'maze/papr'"),
        (["--json", "nowhere/rows.json"], "no folder nowhere"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_measured(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as end:
        bench.main()
    printed = capsys.readouterr()
    assert end.value.code == 2 and said in printed.err and not printed.out
