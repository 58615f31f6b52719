"""The benchmark measures nothing that is wrong."""

import sys

import pytest

from svf import bench


def test_parity_holds_and_notices(monkeypatch):
    assert bench.parity() == []
    monkeypatch.setattr(bench.spectral, "shift", lambda z, *args: 1.01 * z.float())
    wrong = bench.parity()
    assert any("gradients of one_sided off by 0.01" in line for line in wrong)


def test_no_number_is_printed_where_parity_fails(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench"])
    monkeypatch.setattr(bench, "parity", lambda: ["outputs of merged off by 0.1"])
    with pytest.raises(SystemExit) as end:
        bench.main()
    printed = capsys.readouterr()
    assert end.value.code == 1 and printed.out == ""
    assert printed.err == "parity failed, no numbers:\noutputs of merged off by 0.1\n"
