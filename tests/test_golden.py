"""The published implementation, number for number."""

import pytest
import torch
from conftest import relative

from ctm import compat, record
from ctm.loss import classification_loss, curriculum_mask, route_loss, two_tick_loss


def flat(predictions: torch.Tensor) -> torch.Tensor:
    """The published (B, positions, classes, T) -> ours (B, T, positions x classes)."""
    return predictions.permute(0, 3, 1, 2).flatten(2)


def test_maze_model_outputs(golden):
    case = golden("maze_first_last")
    model = compat.load(case.kind, case.config, case.under("state.")).eval()
    with torch.no_grad(), record(model) as seen:
        thought = model(case["input.0"])
    certainties = torch.stack([1 - thought.certainty, thought.certainty], 1)
    assert relative(thought.predictions.mT, case["eval.predictions"]) < 1e-5
    assert relative(certainties, case["eval.certainties"]) < 1e-5
    assert relative(seen.sync_out, case["eval.synch_out"]) < 1e-5
    assert relative(seen.sync_action, case["eval.synch_action"]) < 1e-5
    assert relative(seen.pre_activations, case["eval.pre_activations"]) < 1e-5
    assert relative(seen.post_activations, case["eval.post_activations"]) < 1e-5
    assert relative(seen.attention, case["eval.attention"].squeeze(3)) < 1e-5
    assert torch.equal(thought.sync, seen.sync_out[-1])


def test_maze_model_loss_and_gradients(golden):
    case = golden("maze_first_last")
    model = compat.load(case.kind, case.config, case.under("state.")).train()
    thought = model(case["input.0"])
    loss = route_loss(thought.predictions, thought.certainty, case["target"])
    loss.backward()
    assert relative(loss.detach(), case["train.loss"]) < 1e-4
    grads = compat.rename(case.under("grad."))
    floor = 1e-3 * float(sum(g.norm() ** 2 for g in grads.values()) ** 0.5)
    errors = {name: relative(p.grad, grads.pop(name), floor) for name, p in model.named_parameters()}
    assert not grads
    assert max(errors.values()) < 1e-4, max(errors, key=errors.get)


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
    state = model.state_dict()
    for name, value in compat.rename(case.under("after.")).items():
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
# A fingerprint that needs no file: weights by a formula, outputs of the published implementation as printed.

FINGERPRINT = {
    "config": {
        "iterations": 6, "d_model": 48, "d_input": 16, "heads": 4, "n_synch_out": 10, "n_synch_action": 8,
        "synapse_depth": 3, "memory_length": 5, "deep_nlms": True, "memory_hidden_dims": 4, "do_layernorm_nlm": False,
        "backbone_type": "resnet18-1", "positional_embedding_type": "none", "out_dims": 10, "prediction_reshaper": [-1],
        "dropout": 0.1, "neuron_select_type": "random-pairing", "n_random_pairing_self": 3,
    },
    "first_tick": [0.580729, 0.132217, -0.102450, -0.299688],
    "last_tick": [-0.024277, 0.147348, -0.120555, 0.104025],
    "sum": 2.24228,
    "sum_of_squares": 3.72018,
    "certainty": [0.020572, 0.006303, 0.004057, 0.004199, 0.002325, 0.002294],
}  # fmt: skip


def published_shapes(d=48, e=16, m=5, h=4, n_o=10, n_a=8, c=10) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published model of FINGERPRINT (U-Net widths 48, 32, 16)."""

    def norm(name, n):
        return {f"{name}.weight": (n,), f"{name}.bias": (n,)}

    def linear(name, n_out, n_in):
        return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}

    def batchnorm(name, n):
        return norm(name, n) | {
            f"{name}.running_mean": (n,),
            f"{name}.running_var": (n,),
            f"{name}.num_batches_tracked": (),
        }

    shapes = {"start_activated_state": (d,), "start_trace": (d, m)}
    for side, n in (("action", n_a), ("out", n_o)):
        shapes |= {
            f"decay_params_{side}": (n,),
            f"{side}_neuron_indices_left": (n,),
            f"{side}_neuron_indices_right": (n,),
        }
    shapes |= {"initial_rgb.weight": (3, 3, 1, 1), "initial_rgb.bias": (3,), "backbone.conv1.weight": (64, 3, 3, 3)}
    shapes |= batchnorm("backbone.bn1", 64)
    for block in range(2):
        for conv in (1, 2):
            shapes |= {f"backbone.layer1.{block}.conv{conv}.weight": (64, 64, 3, 3)}
            shapes |= batchnorm(f"backbone.layer1.{block}.bn{conv}", 64)
    shapes |= linear("kv_proj.0", e, 64) | norm("kv_proj.1", e) | linear("q_proj", e, n_a)
    shapes |= {"attention.in_proj_weight": (3 * e, e), "attention.in_proj_bias": (3 * e,)} | linear(
        "attention.out_proj", e, e
    )
    shapes |= linear("synapses.first_projection.0", d, d + e) | norm("synapses.first_projection.1", d)
    for i, (wide, narrow) in enumerate([(48, 32), (32, 16)]):
        shapes |= linear(f"synapses.down_projections.{i}.1", narrow, wide) | norm(
            f"synapses.down_projections.{i}.2", narrow
        )
        shapes |= linear(f"synapses.up_projections.{i}.1", wide, narrow) | norm(f"synapses.up_projections.{i}.2", wide)
        shapes |= norm(f"synapses.skip_lns.{i}", wide)
    for layer, n_in, n_out in ((0, m, 2 * h), (2, h, 2)):
        name = f"trace_processor.0.{layer}"
        shapes |= {f"{name}.w1": (n_in, n_out, d), f"{name}.b1": (1, d, n_out), f"{name}.T": (1,)}
    return shapes | linear("output_projector.0", c, n_o)


def fill(shapes: dict[str, tuple[int, ...]], d: int) -> dict[str, torch.Tensor]:
    """Weights by the formula: a hash of the place in the sorted list of names and in the tensor."""
    state = {}
    for i, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        n = int(torch.Size(shape).numel())
        k = torch.arange(n)
        if "neuron_indices" in name:
            state[name] = (7 * k + 3 * name.endswith("right") + 5 * name.startswith("action")) % d
            continue
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros((), dtype=torch.int64)
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


def test_fingerprint_of_the_published_model():
    shapes = published_shapes()
    assert len(shapes) == 82
    model = compat.load("ctm", FINGERPRINT["config"], fill(shapes, 48)).eval()
    assert sum(p.numel() for p in model.parameters()) == 163_198
    images = torch.sin(0.11 * torch.arange(2 * 3 * 12 * 12, dtype=torch.float64)).float().reshape(2, 3, 12, 12)
    with torch.no_grad():
        thought = model(images)
    predictions = thought.predictions
    assert relative(predictions[0, 0, :4], torch.tensor(FINGERPRINT["first_tick"])) < 1e-5
    assert relative(predictions[0, -1, :4], torch.tensor(FINGERPRINT["last_tick"])) < 1e-5
    assert predictions.sum().item() == pytest.approx(FINGERPRINT["sum"], rel=1e-5)
    assert predictions.square().sum().item() == pytest.approx(FINGERPRINT["sum_of_squares"], rel=1e-5)
    torch.testing.assert_close(thought.certainty[0], torch.tensor(FINGERPRINT["certainty"]), rtol=0, atol=1e-6)
