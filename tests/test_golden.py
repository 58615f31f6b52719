"""The published implementation, number for number."""

import pytest
import torch
from conftest import GOLDEN, relative

from ctm import compat
from ctm.loss import classification_loss, ctc_loss, curriculum_mask, route_loss, two_tick_loss


def flat(predictions: torch.Tensor) -> torch.Tensor:
    """The published (B, positions, classes, T) -> ours (B, T, positions x classes)."""
    return predictions.permute(0, 3, 1, 2).flatten(2)


CASES = sorted(p.stem for p in GOLDEN.glob("*.safetensors")) or ["maze_first_last"]
CASES = [name for name in CASES if name not in ("losses", "train_trajectory") and not name.startswith("svf")]


@pytest.mark.parametrize("name", CASES)
def test_outputs(golden, name):
    case = golden(name)
    model = compat.load(case.kind, case.config, case.under("state.")).eval()
    with torch.no_grad():
        ours = compat.outputs(model, *case.inputs())
    theirs = case.under("eval.")
    assert len(theirs) >= 1
    for key, value in theirs.items():
        assert ours[key].shape == value.shape, key
        assert relative(ours[key], value) < 1e-5, key


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(golden, name):
    case = golden(name)
    model = compat.load(case.kind, case.config, case.under("state.")).train()
    loss = published_loss(case, compat.outputs(model, *case.inputs()))
    loss.backward()
    assert relative(loss.detach(), case["train.loss"].squeeze()) < 1e-4
    ours, theirs = compat.gradients(model), case.under("grad.")
    floor = 1e-3 * float(sum(g.norm() ** 2 for g in theirs.values()) ** 0.5)
    errors = {key: relative(ours[key], value, floor) for key, value in theirs.items()}
    assert max(errors.values()) < 1e-4, max(errors, key=errors.get)
    assert all(float(ours[key].abs().max()) == 0 for key in ours.keys() - theirs.keys())


def published_loss(case, out: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss that the case's notes name, by ours."""
    notes = case.notes
    if "synch_out squared" in notes:
        return out["synch_out"].square().mean()
    target = case["target"]
    if "cross entropy" in notes:
        return torch.nn.functional.cross_entropy(out["predictions"], target)
    predictions = out["predictions"].mT
    if "sort_loss" in notes:
        return ctc_loss(predictions, target)
    certainty = out["certainties"][:, 1]
    if "maze_loss" in notes:
        return route_loss(predictions, certainty, target, 5, most_certain="final tick" not in notes)
    if "qamnist_loss" in notes:
        n = case.config["iterations_for_answering"]
        predictions, certainty = predictions[:, -n:], certainty[:, -n:]
    return classification_loss(predictions, certainty, target)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_the_same_state_dict(golden, name):
    case = golden(name)
    state = case.under("state.")
    back = compat.export(compat.load(case.kind, case.config, state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) and back[key].dtype == state[key].dtype for key in state)


def test_five_optimiser_steps(golden):
    case = golden("train_trajectory")
    model = compat.load(case.kind, case.config, case.under("state.")).train()
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e-8, weight_decay=0.01)
    model.net.project_parameters()
    for i in range(5):
        optimizer.param_groups[0]["lr"] = 1e-3 * (i + 1) / 5
        thought = model(case[f"input.{i}"])
        loss = route_loss(thought.predictions, thought.certainty, case[f"target.{i}"])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.net.project_parameters()
        assert relative(loss.detach(), case[f"loss.{i}"]) < 1e-4
        assert relative(norm, case[f"grad_norm.{i}"]) < 1e-4
    state = compat.export(model)
    for name, value in case.under("after.").items():
        assert relative(state[name], value) < 1e-4, name


@pytest.mark.parametrize("most_certain", [True, False])
def test_losses(golden, most_certain):
    case = golden("losses")
    maze = flat(case["maze.predictions"]), case["maze.certainties"][:, 1]
    loss = route_loss(*maze, case["maze.targets"], 5, most_certain)
    assert relative(loss, case[f"maze.loss.most_certain_{most_certain}"]) < 1e-5
    parity = flat(case["parity.predictions"]), case["parity.certainties"][:, 1]
    loss = classification_loss(*parity, case["parity.targets"], most_certain)
    assert relative(loss, case[f"parity.loss.most_certain_{most_certain}"]) < 1e-5
    if most_certain:
        loss = classification_loss(case["image.predictions"].mT, case["image.certainties"][:, 1], case["image.targets"])
        assert relative(loss, case["image.loss"]) < 1e-5
        mask = curriculum_mask(maze[0], case["maze.targets"], 5)
        assert mask.sum(1).tolist() == case["maze.upto_where"].clamp(max=20).tolist()


def test_two_ticks_by_hand():
    loss = torch.tensor([[3.0, 1.0, 2.0], [5.0, 6.0, 4.0]], requires_grad=True)
    certainty = torch.tensor([[0.1, 0.2, 0.9], [0.8, 0.1, 0.1]])
    value = two_tick_loss(loss, certainty)
    assert value.item() == ((1 + 4) / 2 + (2 + 5) / 2) / 2
    value.backward()
    assert loss.grad.tolist() == [[0, 0.25, 0.25], [0.25, 0, 0.25]]
    assert two_tick_loss(loss, certainty, most_certain=False).item() == ((1 + 4) / 2 + (2 + 4) / 2) / 2


# ----------------------------------------------------------------------------------------------------------------------
# Fingerprints that need no file: weights by a formula, outputs of the published implementation as printed.

SIZES = {
    "iterations": 6, "d_model": 48, "d_input": 16, "heads": 4, "n_synch_out": 10, "n_synch_action": 8,
    "memory_length": 5, "memory_hidden_dims": 4, "dropout": 0.1, "do_layernorm_nlm": False, "deep_nlms": True,
    "positional_embedding_type": "none", "prediction_reshaper": [-1],
}  # fmt: skip
FINGERPRINTS = {
    "A": {
        "config": {"neuron_select_type": "random-pairing", "n_random_pairing_self": 3, "synapse_depth": 3,
                   "backbone_type": "resnet18-1", "out_dims": 10},
        "keys": 82, "parameters": 163_198,
        "first": [0.580729, 0.132217, -0.102450, -0.299688], "last": [-0.024277, 0.147348, -0.120555, 0.104025],
        "sums": [2.24228, 3.72018], "certainty": [0.020572, 0.006303, 0.004057, 0.004199, 0.002325, 0.002294],
    },
    "B": {
        "config": {"neuron_select_type": "first-last", "synapse_depth": 4, "do_layernorm_nlm": True,
                   "backbone_type": "resnet34-2", "positional_embedding_type": "learnable-fourier", "out_dims": 20,
                   "prediction_reshaper": [4, 5]},
        "keys": 169, "parameters": 1_400_359,
        "first": [-0.990527, -0.881946, -0.973365, -0.080817], "last": [-0.522724, -0.431790, -0.540855, 0.202905],
        "sums": [-11.36539, 37.59748], "certainty": [0.020658, 0.013382, 0.024502, 0.017430, 0.012866, 0.010192],
    },
    "C": {
        "config": {"neuron_select_type": "random", "synapse_depth": 1, "deep_nlms": False, "out_dims": 18,
                   "backbone_type": "parity_backbone", "positional_embedding_type": "custom-rotational-1d",
                   "prediction_reshaper": [9, 2]},
        "keys": 30, "parameters": 10_364,
        "first": [-0.213546, -0.325554, -0.322553, -0.200938], "last": [-0.508359, -0.411268, -0.548069, -0.428395],
        "sums": [-27.93781, 14.08899], "certainty": [0.001816, 0.001174, 0.001429, 0.001608, 0.002851, 0.002276],
    },
    "D": {
        "kind": "sort",
        "config": {"neuron_select_type": "random-pairing", "n_random_pairing_self": 2, "synapse_depth": 3,
                   "out_dims": 7, "heads": 0, "n_synch_action": 0},
        "keys": 37, "parameters": 10_537,
        "first": [0.541447, 0.149275, -0.069111, -0.313338], "last": [-0.081142, 0.049755, 0.040407, 0.071934],
        "sums": [2.97319, 2.80659], "certainty": [0.024929, 0.012284, 0.005967, 0.001915, 0.010983, 0.002716],
    },
    "E": {
        "kind": "qamnist",
        "config": {"neuron_select_type": "random", "synapse_depth": 1, "n_synch_out": 6, "n_synch_action": 6,
                   "out_dims": 10, "iterations_per_digit": 2, "iterations_per_question_part": 2,
                   "iterations_for_answering": 3},
        "keys": 46, "parameters": 13_992,
        "first": [-0.227214, -0.447833, -0.595365, -0.473702], "last": [-0.275944, -0.030512, -0.030878, 0.073377],
        "sums": [7.88081, 22.61120], "certainty": [0.003078, 0.002329],
    },
}  # fmt: skip


def waves(rate: float, *shape: int) -> torch.Tensor:
    return torch.sin(rate * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).float().reshape(shape)


def fingerprint_inputs(name: str) -> list[torch.Tensor]:
    if name == "C":
        return [torch.sign(waves(1.3, 2, 9) + 1e-3)]
    if name == "E":
        digits = waves(0.013, 2, 4, 1, 32, 32)[:, [0, 0, 1, 1]]
        return [digits, torch.tensor([[0, 0, -1, -1, 1, 1], [1, 1, -2, -2, 0, 0]])]
    return [{"A": waves(0.11, 2, 3, 12, 12), "B": waves(0.11, 2, 3, 15, 15), "D": waves(0.9, 2, 6)}[name]]


def fill(shapes: dict[str, torch.Tensor], d: int) -> dict[str, torch.Tensor]:
    """Weights by the formula: a hash of the place in the sorted list of names and in the tensor."""
    state = {}
    for i, name in enumerate(sorted(shapes)):
        natural = shapes[name]
        shape, n = natural.shape, natural.numel()
        k = torch.arange(n)
        if "neuron_indices" in name:
            state[name] = (7 * k + 3 * name.endswith("right") + 5 * name.startswith("action")) % d
            continue
        if not natural.is_floating_point() or name == "index_backbone.embedding":
            state[name] = natural
            continue
        u = ((k * 2654435761 + i * 768143) % 2**32).double() / 2**31 - 1
        if name.endswith(("running_var", ".T")) or (len(shape) == 1 and name.endswith("weight")):
            value = 1 + 0.1 * u
        elif "decay_params" in name:
            value = 0.3 + 0.2 * u
        elif name.startswith("start"):
            value = u
        elif name.endswith(".w1"):
            value = u * (3 / shape[0]) ** 0.5
        elif len(shape) >= 2 and name.endswith("weight"):
            value = u * (3 / (n / shape[0])) ** 0.5
        else:
            value = 0.1 * u
        state[name] = value.float().reshape(shape)
    return state


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_fingerprint_of_the_published_model(name):
    case = FINGERPRINTS[name]
    kind, config = case.get("kind", "ctm"), SIZES | case["config"]
    names = compat.export(compat.build(kind, config))
    assert len(names) == case["keys"]
    state = fill(names, 48)
    if config["neuron_select_type"] == "first-last":
        state |= {key: value for key, value in names.items() if "neuron_indices" in key}
    model = compat.load(kind, config, state).eval()
    assert sum(p.numel() for p in model.parameters()) == case["parameters"]
    with torch.no_grad():
        out = compat.outputs(model, *fingerprint_inputs(name))
    predictions = out["predictions"]
    assert relative(predictions[0, :4, 0], torch.tensor(case["first"])) < 1e-5
    assert relative(predictions[0, :4, -1], torch.tensor(case["last"])) < 1e-5
    assert predictions.sum().item() == pytest.approx(case["sums"][0], rel=1e-5)
    assert predictions.square().sum().item() == pytest.approx(case["sums"][1], rel=1e-5)
    certainty = out["certainties"][0, 1]
    if name == "E":
        certainty = certainty[[0, -1]]
    torch.testing.assert_close(certainty, torch.tensor(case["certainty"]), rtol=0, atol=1e-6)


def test_fingerprint_of_the_published_reinforcement_learner():
    config = SIZES | {"iterations": 2, "n_synch_out": 6, "neuron_select_type": "first-last", "synapse_depth": 1,
                      "backbone_type": "classic-control-backbone"}  # fmt: skip
    names = compat.export(compat.build("rl", config))
    assert len(names) == 28
    state = fill(names, 48) | {key: value for key, value in names.items() if "neuron_indices" in key}
    model = compat.load("rl", config, state).eval()
    starts = (state[key].expand(2, -1, -1) for key in ("start_trace", "start_activated_trace"))
    with torch.no_grad():
        out = compat.outputs(model, waves(0.9, 2, 4), *starts)
        thought = model(waves(0.9, 2, 4))
    expected = torch.tensor([1.118716, 0.117186, 0.331273, 0.906548, -0.291038])
    assert relative(out["synch_out"][0, :5], expected) < 1e-5
    assert out["synch_out"].sum().item() == pytest.approx(14.81147, rel=1e-5)
    assert out["state_trace"].sum().item() == pytest.approx(-4.99664, rel=1e-5)
    assert out["activated_trace"].sum().item() == pytest.approx(-25.28890, rel=1e-5)
    assert torch.equal(thought.sync, out["synch_out"])  # those are the learned starts


# ----------------------------------------------------------------------------------------------------------------------
# Sizes: every parameter count that the paper's tables or the published code give

DEEP = {"deep_nlms": True, "do_layernorm_nlm": False, "dropout": 0.0}
MAZE = DEEP | {
    "iterations": 75, "d_model": 2048, "d_input": 512, "heads": 16, "n_synch_out": 64, "n_synch_action": 32,
    "synapse_depth": 8, "memory_length": 25, "memory_hidden_dims": 32, "backbone_type": "resnet34-2", "out_dims": 500,
    "prediction_reshaper": [100, 5], "neuron_select_type": "first-last",
}  # fmt: skip
PARITY = DEEP | {
    "d_model": 1024, "d_input": 512, "heads": 8, "n_synch_out": 32, "n_synch_action": 32, "synapse_depth": 1,
    "memory_hidden_dims": 16, "backbone_type": "parity_backbone", "positional_embedding_type": "custom-rotational-1d",
    "out_dims": 128, "prediction_reshaper": [64, 2], "neuron_select_type": "random", "iterations": 1,
}  # fmt: skip
QAMNIST = DEEP | {
    "iterations": 1, "d_model": 1024, "d_input": 64, "heads": 4, "n_synch_out": 32, "n_synch_action": 32,
    "synapse_depth": 1, "memory_hidden_dims": 16, "out_dims": 10, "iterations_per_digit": 1,
    "neuron_select_type": "random", "iterations_per_question_part": 1, "iterations_for_answering": 10,
}  # fmt: skip
CIFAR = DEEP | {
    "iterations": 50, "d_model": 256, "d_input": 64, "heads": 16, "synapse_depth": 5, "n_synch_out": 256,
    "n_synch_action": 512, "memory_length": 15, "memory_hidden_dims": 64, "backbone_type": "resnet18-1", "out_dims": 10,
    "neuron_select_type": "random-pairing",
}  # fmt: skip
IMAGENET = CIFAR | {
    "d_model": 4096, "d_input": 1024, "n_synch_out": 8196, "n_synch_action": 2048, "synapse_depth": 8,
    "memory_length": 25, "backbone_type": "resnet152-4", "out_dims": 1000, "n_random_pairing_self": 32,
}  # fmt: skip
ABLATION = MAZE | {
    "iterations": 50, "d_model": 1024, "d_input": 256, "heads": 4, "n_synch_out": 1024, "n_synch_action": 1024,
    "backbone_type": "resnet18-1", "out_dims": 250, "prediction_reshaper": [50, 5],
    "neuron_select_type": "random-pairing",
}  # fmt: skip
SORT = DEEP | {
    "iterations": 50, "d_model": 512, "d_input": 128, "heads": 0, "n_synch_out": 32, "n_synch_action": 0,
    "synapse_depth": 4, "memory_length": 25, "memory_hidden_dims": 4, "out_dims": 31,
    "neuron_select_type": "random-pairing",
}  # fmt: skip
CONTROL = DEEP | {
    "iterations": 1, "n_synch_out": 16, "synapse_depth": 1, "memory_hidden_dims": 4, "neuron_select_type": "first-last",
    "backbone_type": "classic-control-backbone",
}  # fmt: skip
CARTPOLE, ACROBOT = CONTROL | {"d_model": 128, "d_input": 128}, CONTROL | {"d_model": 256, "d_input": 64}
ROOMS = CONTROL | {
    "d_model": 512, "d_input": 128, "n_synch_out": 32, "memory_hidden_dims": 16, "backbone_type": "navigation-backbone",
}  # fmt: skip
COUNTS = [
    *(("ctm", PARITY | {"memory_length": m}, {}, n) for m, n in (
        (1, 4_908_706), (5, 5_043_874), (10, 5_212_834), (25, 5_719_714), (50, 6_564_514))),
    ("ctm", MAZE, {}, 31_998_330),
    ("ctm", ABLATION, {}, 8_967_160),
    ("qamnist", QAMNIST | {"memory_length": 3}, {}, 2_501_388),
    ("qamnist", QAMNIST | {"memory_length": 30}, {}, 3_413_772),
    ("ctm", CIFAR, {}, 1_032_648),
    ("lstm", CIFAR | {"num_layers": 2}, {}, 1_046_870),
    ("ff", {"d_model": 256, "backbone_type": "resnet18-1", "out_dims": 10}, {}, 169_046),
    ("sort", SORT, {}, 897_197),
    ("ctm", IMAGENET, {}, 185_989_886),
    *(("rl", CARTPOLE | {"memory_length": m}, {"n_actions": 2}, n) for m, n in (
        (10, 175_437), (20, 188_237), (50, 226_637))),
    *(("rl", ACROBOT | {"memory_length": m}, {"n_actions": 3, "n_in": 6}, n) for m, n in (
        (5, 350_094), (10, 362_894), (25, 401_294))),
    *(("rl", ROOMS | {"memory_length": m}, {"n_actions": 7}, n) for m, n in ((10, 7_802_690), (20, 7_976_770))),
]  # fmt: skip


@pytest.mark.parametrize("kind, config, sizes, count", COUNTS)
def test_parameter_counts(kind, config, sizes, count):
    with torch.device("meta"):
        model = compat.build(kind, config, **sizes)
    assert sum(p.numel() for p in model.parameters()) == count
