"""The model's own promises: shapes, pairings, bounds, carried state, and what it does not do."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import relative

from ctm import CTM, CTMConfig, record
from ctm.baselines import LSTM, FeedForward, FFConfig, LSTMConfig, OneStep
from ctm.encoders import ResNet
from ctm.loss import route_loss
from ctm.modules import (
    CrossAttention,
    DecayingSync,
    NeuronLevelModels,
    certainty,
    choose_pairs,
    unet_widths,
)
from tasks.optim import Optim

SMALL = {"d_model": 24, "d_input": 8, "ticks": 4, "heads": 2, "n_synch_out": 6, "n_synch_action": 4, "memory_length": 3}
KINDS = [
    {"pairing": "dense", "synapse_depth": 3},
    {"pairing": "semi-dense", "synapse_depth": 1, "nlm_hidden": 0},
    {"pairing": "random", "n_self_pairs": 2, "nlm_layernorm": True},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["pairing"])
def test_every_parameter_learns_and_shapes_hold(kind):
    torch.manual_seed(0)
    model = CTM(CTMConfig(**SMALL | kind), (5, 3))
    thought = model(torch.randn(2, 7, 8))
    assert thought.predictions.shape == (2, 4, 15)
    assert thought.certainty.shape == (2, 4)
    assert ((thought.certainty >= 0) & (thought.certainty <= 1)).all()
    (thought.predictions.square().sum() + thought.certainty.sum()).backward()
    for name, parameter in model.named_parameters():
        if name == "attention.k_proj.bias":
            continue  # softmax does not see a shift of all scores: its gradient is round-off
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradients_against_finite_differences():
    torch.manual_seed(0)
    config = CTMConfig(
        d_model=8, d_input=4, ticks=3, heads=2, n_synch_out=3, n_synch_action=2, synapse_depth=2, memory_length=2
    )
    model = CTM(config, (1, 3)).double()
    for sync in (model.sync_action, model.sync_out):
        torch.nn.init.uniform_(sync.decay, 0.1, 1.0)
    tokens = torch.randn(2, 3, 4, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]

    def sync_of_last_tick(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (tokens,)).sync

    values = tuple(p.detach().clone().requires_grad_() for p in model.parameters())
    assert torch.autograd.gradcheck(sync_of_last_tick, values, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["pairing"])
def test_thinking_on_is_thinking_longer(kind):
    torch.manual_seed(0)
    model = CTM(CTMConfig(**SMALL | kind), (1, 5)).eval()
    tokens = torch.randn(3, 6, 8)
    whole = model(tokens, ticks=5)
    first = model(tokens, ticks=2)
    second = model(tokens, ticks=3, state=first.state)
    torch.testing.assert_close(torch.cat([first.predictions, second.predictions], 1), whole.predictions)
    one_per_tick = model([tokens] * 5)
    torch.testing.assert_close(one_per_tick.predictions, whole.predictions)
    state = model.start(3)
    for _ in range(5):
        state = model.tick(tokens, state)
    torch.testing.assert_close(state.sync_BR, whole.sync)


def test_vectors_are_read_without_attention():
    model = CTM(CTMConfig(**SMALL | {"heads": 0, "n_synch_action": 0, "pairing": "random"}), (1, 5))
    assert not any(isinstance(part, CrossAttention) for part in model.modules())
    vector = torch.randn(2, 8)
    assert model(vector, ticks=3).predictions.shape == (2, 3, 5)
    both = CTM(CTMConfig(**SMALL), (1, 5))
    tokens = torch.randn(2, 6, 8)
    assert both([tokens, vector, torch.zeros(2, 8)]).predictions.shape == (2, 3, 5)


def test_ticks_that_cannot_be():
    model = CTM(CTMConfig(**SMALL), (1, 5))
    with pytest.raises(ValueError, match="2 reads are 2 ticks, not 3"):
        model([torch.randn(1, 6, 8)] * 2, ticks=3)
    with pytest.raises(ValueError, match="at least one tick"):
        model(torch.randn(1, 6, 8), ticks=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 3}, "multiple of heads"),
        ({"heads": 0}, "go together"),
        ({"n_synch_out": 30}, "d_model >= n_synch_out"),
        ({"n_self_pairs": 2}, "random pairing"),
        ({"pairing": "random", "n_self_pairs": 4}, "more pairs"),
        ({"memory_length": 0}, "at least 1"),
    ],
)
def test_configurations_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        CTMConfig(**SMALL | wrong)


# ------------------------------------------------------------------------------------------------------------- pairs


def test_pairs():
    left, right = choose_pairs(10, 3, "dense", 0, first=True)
    assert list(zip(left.tolist(), right.tolist(), strict=True)) == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
    left, right = choose_pairs(10, 2, "dense", 0, first=False)
    assert list(zip(left.tolist(), right.tolist(), strict=True)) == [(8, 8), (8, 9), (9, 9)]
    torch.manual_seed(1)
    left, right = choose_pairs(100, 20, "random", 5, first=True)
    assert len(left) == 20 and torch.equal(left[:5], right[:5]) and not torch.equal(left, right)
    left, right = choose_pairs(100, 4, "semi-dense", 0, first=True)
    assert len(left) == 10
    assert left[:4].unique().numel() == 1 and right[:4].unique().numel() > 1  # row 0: one left, all right


def test_synchronization_by_hand():
    sync = DecayingSync(torch.tensor([0, 1]), torch.tensor([0, 2]))
    torch.nn.init.constant_(sync.decay, 0.5)
    z = torch.randn(4, 1, 3)
    state = sync.start(1)
    for step in z:
        value, state = sync(state, step)
    weights = torch.exp(-0.5 * torch.arange(3, -1, -1.0))
    products = torch.stack([z[:, 0, 0] * z[:, 0, 0], z[:, 0, 1] * z[:, 0, 2]], 1)
    expected = (weights[:, None] * products).sum(0) / weights.sum().sqrt()
    torch.testing.assert_close(value[0], expected)


def test_decay_is_clamped_but_keeps_its_gradient():
    sync = DecayingSync(torch.tensor([0, 1]), torch.tensor([0, 1]))
    sync.decay.data = torch.tensor([-1.0, 20.0])
    _, state = sync(sync.start(1), torch.ones(1, 2))
    value, _ = sync(state, torch.ones(1, 2))
    assert value[0, 0].item() == pytest.approx(2 / 2**0.5)  # as if the decay were 0
    value.sum().backward()
    assert sync.decay.grad[0] != 0
    assert sync.decay.tolist() == [-1.0, 20.0], "forward changes no parameter"
    sync.project()
    assert sync.decay.tolist() == [0.0, 15.0]


# ------------------------------------------------------------------------------------------------------------- parts


def test_attention_is_pytorchs():
    torch.manual_seed(0)
    ours, theirs = CrossAttention(12, 3, 0.0), torch.nn.MultiheadAttention(12, 3, batch_first=True)
    weights = theirs.in_proj_weight.chunk(3) + theirs.in_proj_bias.chunk(3)
    for proj, weight, bias in zip((ours.q_proj, ours.k_proj, ours.v_proj), weights[:3], weights[3:], strict=True):
        proj.weight.data, proj.bias.data = weight.detach().clone(), bias.detach().clone()
    ours.out_proj.load_state_dict(theirs.out_proj.state_dict())
    query, tokens = torch.randn(2, 12), torch.randn(2, 5, 12)
    with torch.no_grad():
        expected, _ = theirs(query[:, None], tokens, tokens)
        assert relative(ours(query, ours.keys_values(tokens)), expected[:, 0]) < 1e-6


def test_neuron_level_models_are_private():
    nlm = NeuronLevelModels(6, 4, hidden=3, dropout=0.0, layernorm=False)
    history = torch.randn(2, 6, 4)
    before = nlm(history)
    changed = history.clone()
    changed[:, 2] += 1
    difference = (nlm(changed) - before).abs().sum(0)
    assert difference[2] > 0 and difference[[0, 1, 3, 4, 5]].sum() == 0


def test_unet_widths_are_numpys():
    for d in range(32, 4065, 32):
        for depth in range(2, 17):
            assert unet_widths(d, depth) == np.linspace(d, 16, depth).astype(int).tolist()


def test_certainty_of_known_distributions():
    assert certainty(torch.zeros(2, 4), 4).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert certainty(torch.tensor([100.0, 0, 0]), 3).item() == pytest.approx(1)
    half = certainty(torch.tensor([100.0, 0, 0.0, 0.0]), 2)  # one position certain, the other not
    assert half.item() == pytest.approx(0.5, abs=1e-6)


def test_resnet_tokens():
    for depth, stages, size, tokens, width in [
        (34, 2, 39, 100, 128),
        (18, 1, 32, 256, 64),
        (34, 2, 99, 625, 128),
        (50, 3, 20, 9, 1024),
    ]:
        encoder = ResNet(None, depth, stages).eval()
        assert encoder.n_tokens(size, size) == tokens
        with torch.no_grad():
            assert encoder(torch.rand(1, 3, size, size)).shape == (1, tokens, width)


# ------------------------------------------------------------------------------------------------------ as a citizen


def test_models_pickle_copy_and_follow_the_seed():
    def make():
        torch.manual_seed(3)
        np.random.seed(int(torch.randint(100, ())))
        return CTM(CTMConfig(**SMALL | {"pairing": "random"}), (1, 5))

    torch.manual_seed(5)
    first = make()
    np.random.rand(7)
    second = make()
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    tokens = torch.randn(2, 6, 8)
    for twin in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert torch.equal(twin(tokens).predictions, first(tokens).predictions)


def test_a_step_of_the_lstm_is_that_of_pytorch():
    torch.manual_seed(0)
    step = OneStep(3, 5, 2, dropout=0.5)
    usual = torch.nn.LSTM(3, 5, 2)
    usual.load_state_dict(step.state_dict())
    state = theirs = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    for x_BE in torch.randn(3, 4, 3):
        top, state = step.eval()(x_BE, state)
        expected, theirs = usual(x_BE[None], theirs)
        assert relative(top, expected[0]) < 1e-6
        assert all(relative(ours, other) < 1e-6 for ours, other in zip(state, theirs, strict=True))
    zeros = torch.zeros(2, 1000, 5), torch.zeros(2, 1000, 5)
    with torch.no_grad():  # dropout between the layers, and nowhere else
        (first, second), _ = step.train()(torch.ones(1000, 3), zeros)[1]
    assert len(first.unique(dim=0)) == 1 and len(second.unique(dim=0)) > 16


def test_baselines_keep_the_contract():
    tokens = torch.randn(2, 6, 8)
    thought = LSTM(LSTMConfig(d_model=10, d_input=8, ticks=3, heads=2, layers=2), (5, 3))(tokens)
    assert thought.predictions.shape == (2, 3, 15) and thought.certainty.shape == (2, 3)
    for pool in (True, False):
        thought = FeedForward(FFConfig(d_model=10, pool=pool), (5, 3), 6, 8)(tokens)
        assert thought.predictions.shape == (2, 1, 15)
        loss = route_loss(thought.predictions, thought.certainty, torch.zeros(2, 5, dtype=torch.long))
        assert loss.isfinite()


def test_recording_costs_nothing_once_over():
    model = CTM(CTMConfig(**SMALL), (1, 5)).eval()
    tokens = torch.randn(2, 6, 8)
    with record(model) as seen:
        thought = model(tokens)
    assert seen.attention.shape == (4, 2, 2, 6)
    torch.testing.assert_close(seen.attention.sum(-1), torch.ones(4, 2, 2))
    assert seen.pre_activations.shape == seen.post_activations.shape == (4, 2, 24)
    assert torch.equal(seen.sync_out[-1], thought.sync)
    assert torch.equal(seen.post_activations[-1], thought.state.z_BD)
    assert not any(module._forward_hooks for module in model.modules())


def test_model_code_knows_no_trainer():
    code = "import sys, ctm.compat, ctm.loss, ctm.baselines; print([m in sys.modules for m in ('lightning', 'tasks')])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[False, False]"


def test_the_schedule_starts_at_once_without_warm_up():
    """The published one stays at a hundred-millionth of its learning rate then."""
    optim = Optim(lr=1e-3, warmup=0, steps=10)
    assert optim.factor(0) == 1.0
    assert optim.factor(10) == pytest.approx(1e-7 / 1e-3)
    assert Optim(lr=1e-3, warmup=4, steps=10).factor(2) == 0.5
