"""Released files in and out: every layout that the published trainers wrote, and what is refused."""

import argparse
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

import ctm
from ctm import compat
from ctm.agent import Agent
from ctm.model import Thinker

MAZE = {
    "iterations": 3, "d_model": 32, "d_input": 16, "heads": 2, "n_synch_out": 6, "n_synch_action": 4,
    "synapse_depth": 2, "memory_length": 4, "deep_nlms": True, "memory_hidden_dims": 2, "do_layernorm_nlm": False,
    "dropout": 0.1, "backbone_type": "resnet18-1", "positional_embedding_type": "none",
    "neuron_select_type": "first-last", "out_dims": 50, "prediction_reshaper": [10, 5],
}  # fmt: skip
RL = {
    "iterations": 2, "d_model": 32, "d_input": 8, "n_synch_out": 4, "synapse_depth": 1, "memory_length": 4,
    "deep_nlms": True, "memory_hidden_dims": 2, "do_layernorm_nlm": False, "neuron_select_type": "first-last",
    "backbone_type": "classic-control-backbone",
}  # fmt: skip


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return compat.export(compat.build("ctm", MAZE))


def released(state: dict, **more) -> dict:
    """A file as the published maze trainer wrote it."""
    arguments = {key: value for key, value in MAZE.items() if key not in ("out_dims", "prediction_reshaper")}
    arguments |= {"maze_route_length": 10, "dataset": "mazes-medium", "lr": 1e-4, "log_dir": "logs"}
    return {
        "model_state_dict": state,
        "optimizer_state_dict": {"state": {}, "param_groups": []},
        "iteration": 7,
        "train_losses": [np.float64(0.5), np.float32(0.25)],
        "args": argparse.Namespace(**arguments),
        "numpy_rng_state": np.random.RandomState(0).get_state(),
        "random_rng_state": (3, (1, 2), None),
    } | more


def same(model: Thinker | Agent, state: dict[str, torch.Tensor]) -> bool:
    back = compat.export(model)
    return back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


def test_a_released_file_loads_and_says_what_it_did_not_use(state, tmp_path, caplog):
    torch.save(released(state), tmp_path / "old.pt")
    model = compat.load_checkpoint(tmp_path / "old.pt")
    assert same(model, state)
    assert model.net.out_dims == (10, 5) and not model.training
    assert "not used: iteration, numpy_rng_state, optimizer_state_dict" in caplog.text
    assert "args.lr" in caplog.text and "args.d_model" not in caplog.text


@pytest.mark.parametrize("change", ["ddp", "state_dict", "old names", "old backbone", "legacy file"])
def test_older_layouts(change, state, tmp_path):
    content = released(state)
    arguments = vars(content["args"])
    if change == "ddp":
        content["model_state_dict"] = {f"module.{key}": value for key, value in state.items()}
    elif change == "state_dict":
        content["state_dict"] = content.pop("model_state_dict")
    elif change == "old names":
        arguments["deep_memory"], arguments["do_normalisation"] = (
            arguments.pop("deep_nlms"),
            arguments.pop("do_layernorm_nlm"),
        )
        del arguments["neuron_select_type"]
    elif change == "old backbone":
        del arguments["backbone_type"]
        arguments |= {"resnet_type": "resnet18", "resnet_feature_scales": [1]}
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=change != "legacy file")
    assert same(compat.load_checkpoint(tmp_path / "old.pt"), state)


def test_a_hugging_face_folder(state, tmp_path):
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(MAZE))
    assert same(compat.load_checkpoint(tmp_path), state)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        compat.load_checkpoint(tmp_path)


def test_a_whole_agent(tmp_path):
    torch.manual_seed(0)
    agent = compat.build("rl", RL, n_in=4, n_actions=2)
    state = compat.export(agent)
    assert {"recurrent_model.start_trace", "actor.4.bias", "critic.0.weight"} <= state.keys()
    torch.save({"model_state_dict": state, "args": argparse.Namespace(**RL), "global_step": 3}, tmp_path / "a.pt")
    model = compat.load_checkpoint(tmp_path / "a.pt")
    assert same(model, state)
    observation = torch.randn(3, 4)
    first = model(observation)
    assert first.logits.shape == (3, 2) and first.value.shape == (3,)
    second = model(observation, model.thinker.net.reset(first.state, torch.tensor([True, False, False])))
    torch.testing.assert_close(second.logits[0], first.logits[0])
    assert not torch.allclose(second.logits[1:], first.logits[1:])


@pytest.mark.parametrize("kind", ["ctm", "lstm"])
def test_what_is_carried_is_what_is_continued(kind):
    """A thought of five ticks is one of two and three more; rows that start anew do not touch the others."""
    torch.manual_seed(0)
    config = MAZE | {"num_layers": 2, "dropout": 0.0}
    net = compat.build(kind, config).net.eval()
    tokens = torch.randn(3, 7, 16)
    whole = net(tokens, 5)
    half = net(tokens, 2)
    torch.testing.assert_close(net(tokens, 3, half.state).predictions, whole.predictions[:, 2:])
    anew = net(tokens, 3, net.reset(half.state, torch.tensor([False, True, False]))).predictions
    torch.testing.assert_close(anew[[0, 2]], whole.predictions[[0, 2], 2:])
    torch.testing.assert_close(anew[1], whole.predictions[1, :3])


def test_the_published_lstms_of_qamnist_and_reinforcement_learning():
    """Their names and shapes as in the published code: one cell, learned starts without an axis of layers."""
    qamnist = {
        "iterations": 1, "d_model": 875, "d_input": 64, "heads": 4, "out_dims": 10, "dropout": 0.0,
        "iterations_per_digit": 2, "iterations_per_question_part": 1, "iterations_for_answering": 2,
    }  # fmt: skip
    model = compat.build("lstm", qamnist).eval()
    state = compat.export(model)
    assert state["lstm_cell.weight_ih"].shape == (3500, 64) and state["lstm_cell.weight_hh"].shape == (3500, 875)
    assert state["start_hidden_state"].shape == (875,) and "kv_proj.0.weight" in state
    digits = torch.randn(1, 2, 1, 32, 32).repeat_interleave(2, 1)
    out = compat.outputs(compat.load("lstm", qamnist, state).eval(), digits, torch.tensor([[0, -1, 1]]))
    assert out["predictions"].shape == (1, 10, 4 + 3 + 2)  # a single sample, too
    assert torch.equal(out["predictions"], compat.outputs(model, digits, torch.tensor([[0, -1, 1]]))["predictions"])

    control = {"iterations": 3, "d_model": 118, "d_input": 128, "backbone_type": "classic-control-backbone"}
    state = compat.export(compat.build("lstm", control, n_in=4, n_actions=2))
    assert state["recurrent_model.lstm_cell.weight_ih"].shape == (4 * 118, 128)
    agent = compat.load("lstm", control, state)
    h, c = torch.randn(2, 118), torch.randn(2, 118)
    out = compat.outputs(agent, torch.randn(2, 4), h, c)
    assert out["hidden_state"].shape == (2, 118)
    cell = torch.nn.LSTMCell(128, 118)
    cell.load_state_dict({k.rpartition(".")[2]: v for k, v in state.items() if "lstm_cell" in k})
    observation = torch.randn(2, 4)
    features = agent.thinker.encoder(observation)
    hidden, memory = h, c
    for _ in range(3):
        hidden, memory = cell(features, (hidden, memory))
    out = compat.outputs(agent, observation, h, c)
    torch.testing.assert_close(out["hidden_state"], hidden)
    torch.testing.assert_close(out["cell_state"], memory)


class Bomb:
    def __reduce__(self):
        return print, ("it ran",)


def test_a_pickle_that_would_run_code_is_refused(state, tmp_path, capsys):
    torch.save(released(state, extra=Bomb()), tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"refused: its pickle wants to run (builtins.)?print"):
        compat.load_checkpoint(tmp_path / "bad.pt")
    assert "it ran" not in capsys.readouterr().out


def test_files_that_are_no_released_model(state, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        compat.load_checkpoint(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        compat.load_checkpoint(tmp_path / "text.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        compat.load_checkpoint(tmp_path / "list.pt")
    torch.save({"model_state_dict": state}, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="it needs model_state_dict"):
        compat.load_checkpoint(tmp_path / "bare.pt")
    torch.save({"model_state_dict": state, "args": argparse.Namespace(heads=2)}, tmp_path / "few.pt")
    with pytest.raises(ValueError, match="lack d_input, d_model, iterations"):
        compat.load_checkpoint(tmp_path / "few.pt")


def test_wrong_names_and_shapes_are_all_listed(state):
    del state["q_proj.bias"], state["start_trace"]
    state["other.weight"] = torch.zeros(1)
    state["kv_proj.1.bias"] = torch.zeros(17)
    with pytest.raises(ValueError) as error:
        compat.load("ctm", MAZE, state)
    for words in ("missing q_proj.bias", "missing start_trace", "extra other.weight", "kv_proj.1.bias is (17,)"):
        assert words in str(error.value)


def test_nan_weights_are_reported(state):
    state["q_proj.bias"][3] = float("nan")
    with pytest.warns(UserWarning, match=r"NaN or infinity in q_proj\.bias"):
        compat.load("ctm", MAZE, state)


@pytest.mark.parametrize(
    "kind, change, words",
    [
        ("cmt", {}, "there is no published model of kind 'cmt'"),
        ("ctm", {"backbone_type": "resnet19-1"}, "there is no backbone 'resnet19-1'"),
        ("ff", {"backbone_type": "parity_backbone"}, "there is no backbone 'parity_backbone'"),
    ],
)
def test_what_was_never_published_is_refused(kind, change, words):
    with pytest.raises(ValueError, match=words):
        compat.build(kind, MAZE | change)


def test_digits_must_be_shown_as_long_as_the_configuration_says():
    ticks = {"iterations_per_digit": 2, "iterations_per_question_part": 1, "iterations_for_answering": 1}
    model = compat.build("qamnist", MAZE | ticks)
    with pytest.raises(ValueError, match="repeated for 2 ticks"):
        compat.outputs(model, torch.randn(1, 4, 1, 8, 8), torch.zeros(1, 3, dtype=torch.long))


def test_converted_checkpoints_are_tested_by_train_py(state, tmp_path, train):
    torch.save(released(state), tmp_path / "old.pt")
    command = [sys.executable, "-m", "ctm.compat", "convert", "old.pt", "new.ckpt"]
    here = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run(command, **here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert same(ctm.load(tmp_path / "new.ckpt"), state)
    again = subprocess.run(command, **here, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "there already" in again.stderr
    tested = train("test", "task=maze", "ckpt_path=new.ckpt", "trainer.limit_test_batches=1", "trainer.logger=false")
    assert tested.returncode == 0, tested.stderr
    assert "mazes 19x19" in tested.stdout and "route_length=10" in tested.stdout
