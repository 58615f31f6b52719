"""Exported checkpoints: a model alone, as a small file."""

import json
import sys

import pytest
import torch
from safetensors import safe_open

import ctm.__main__
from ctm import CTM, CTMConfig, Thinker, checkpoint
from ctm.encoders import ResNet

CONFIG = {
    "task": "maze",
    "data": {"class_path": "tasks.maze.MazeTask", "init_args": {"size": 11}},
    "model": {"class_path": "ctm.lit.LitCTM"},
    "trainer": {"max_steps": 5},
}


@pytest.fixture
def best(tmp_path):
    """A checkpoint as training writes it, as far as it matters here."""
    torch.manual_seed(0)
    c = CTMConfig(d_model=16, d_input=8, ticks=3, heads=2, n_synch_out=4, n_synch_action=4, pairing="random")
    model = Thinker(ResNet(8), CTM(c, (6, 5)))
    model(torch.randn(4, 3, 9, 9))  # statistics of the BatchNorm layers
    path = tmp_path / "best.ckpt"
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    content = {"ctm": checkpoint.describe(model), "config": CONFIG, "state_dict": state, "global_step": 7}
    torch.save(content | {"optimizer_states": [torch.zeros(10**5)]}, path)
    return path


def test_an_exported_model_is_the_trained_one_rounded(best, tmp_path):
    small = tmp_path / "small.safetensors"
    checkpoint.export(best, small)
    before, after = checkpoint.load(best), checkpoint.load(small)
    assert not after.training and checkpoint.describe(after) == checkpoint.describe(before)
    theirs = after.state_dict()
    assert {"net.sync_out.left", "net.sync_out.decay", "encoder.stem.1.running_var"} <= set(theirs)
    for name, value in before.state_dict().items():
        rounded = value.is_floating_point() and value.ndim > 1
        assert theirs[name].dtype == value.dtype
        assert torch.equal(theirs[name], value.bfloat16().float() if rounded else value), name
    images = torch.rand(2, 3, 11, 11)
    torch.testing.assert_close(after(images).predictions, before(images).predictions, rtol=0.05, atol=0.02)

    content = checkpoint.read(small)
    assert content["config"] == {"task": "maze", "seed_everything": None} | {k: CONFIG[k] for k in ("data", "model")}
    assert content["global_step"] == 7
    weights = sum(value.numel() for value in before.state_dict().values())
    assert small.stat().st_size < 2.3 * weights + 20_000, "two bytes a weight, and the optimiser stays behind"
    with safe_open(small, "pt") as file:
        assert file.get_tensor("model.net.head.weight").dtype == torch.bfloat16


def test_what_is_not_exported_or_read(best, tmp_path):
    small = tmp_path / "small.safetensors"
    checkpoint.export(best, small)
    bytes_before = small.read_bytes()
    with pytest.raises(FileExistsError, match="is there already; nothing was written"):
        checkpoint.export(best, small)
    assert small.read_bytes() == bytes_before
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        checkpoint.export(best, tmp_path / "small.pt")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        checkpoint.export(tmp_path / "none.ckpt", tmp_path / "other.safetensors")
    part = tmp_path / "part.safetensors"
    part.write_bytes(bytes_before[: len(bytes_before) // 2])
    with pytest.raises(ValueError, match="is not a readable checkpoint, or only part of one"):
        checkpoint.load(part)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "strange.safetensors")
    with pytest.raises(ValueError, match="does not describe one"):
        checkpoint.load(tmp_path / "strange.safetensors")


def test_the_command_line(best, tmp_path, monkeypatch, capsys):
    def run(*words) -> int:
        monkeypatch.setattr(sys, "argv", ["ctm", *map(str, words)])
        try:
            ctm.__main__.main()
        except SystemExit as end:
            return end.code
        return 0

    small = tmp_path / "small.safetensors"
    assert run("export", best, small) == 0 and f"wrote {small} (" in capsys.readouterr().out
    assert run("export", best, small) == 2
    assert capsys.readouterr().err == f"error: {small} is there already; nothing was written\n"


@pytest.mark.slow
def test_train_py_takes_an_exported_model(train, tmp_path):
    """Tested by the settings in it; and a new run begins with its weights."""
    words = ("task=maze", "overlay=fast", "data.n_val=16", "data.n_test=64")

    def ok(*words) -> str:
        process = train(*words)
        assert process.returncode == 0, process.stderr
        return process.stdout

    ok(*words, "run=one", "data.route_length=20")
    small = tmp_path / "small.safetensors"
    checkpoint.export(tmp_path / "runs/maze/one/checkpoints/best.ckpt", small)
    printed = ok("test", "task=maze", f"ckpt_path={small}", "run=two")
    assert f"of 64 unseen test samples ({small})" in printed and "untrained" not in printed
    one, two = (json.loads((tmp_path / f"runs/maze/{run}/test.json").read_text()) for run in ("one", "two"))
    assert two["test/loss"] == pytest.approx(one["test/loss"], rel=0.02)

    ok(*words, f"ckpt_path={small}", "run=three", "model.optim.lr=1e-12", "trainer.max_steps=1")
    before = checkpoint.load(small).state_dict()
    after = checkpoint.load(tmp_path / "runs/maze/three/checkpoints/last.ckpt").state_dict()
    torch.testing.assert_close(after["net.head.weight"], before["net.head.weight"], rtol=0, atol=1e-9)
