"""The fast recurrence against the plain loop: numbers, every gradient, memory, and when it must not be taken.

On a CPU this is `ctm.ops.torch_tick`; the Triton kernels run here in Triton's interpreter, and on a GPU under the
marker gpu.
"""

import copy
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from conftest import ROOT, relative
from exactness import KINDS, errors_against_fp64, leaves, make, think, tokens
from lightning import Trainer
from published import from_case
from torch import nn

from ctm import CTM, CTMConfig, compat, ops, record
from ctm.baselines import LSTM, FeedForward, FFConfig, LSTMConfig
from ctm.encoders import Parity, ResNet
from ctm.lit import LitCTM
from ctm.loss import classification_loss
from ctm.model import Thinker
from ctm.record import Recording
from svf import SVFConfig
from tasks.optim import Optim
from tasks.parity import ParityTask


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    torch.set_float32_matmul_precision("highest")
    return request.param


def compare(fast, plain, tolerance: float = 1e-5) -> None:
    (ours, grads), (theirs, expected) = fast, plain
    assert relative(ours.predictions.detach(), theirs.predictions.detach()) < tolerance
    assert relative(ours.certainty.detach(), theirs.certainty.detach()) < 10 * tolerance
    for one, other in zip(leaves(ours.state), leaves(theirs.state), strict=True):
        assert relative(one.detach(), other.detach()) < tolerance
    assert grads.keys() == expected.keys()
    floor = 1e-3 * float(sum(g.norm() ** 2 for g in expected.values()) ** 0.5)
    errors = {name: relative(grads[name], value, floor) for name, value in expected.items()}
    assert max(errors.values()) < tolerance, max(errors, key=errors.get)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind, monkeypatch):
    net = make(**KINDS[kind])
    for seed in range(3):  # buffers hold the last thought
        read = tokens(seed=seed)
        compare(think(monkeypatch, "auto", net, read), think(monkeypatch, "naive", net, read))


@pytest.mark.parametrize("kind", ["dense", "gated"])
def test_a_read_for_each_tick_and_a_state_to_go_on_from(kind, monkeypatch):
    net, first, second = make(**KINDS[kind]), tokens(), tokens(4, seed=2)
    vector = torch.randn(3, 8, requires_grad=True)
    reads = [first, first, vector, second, vector]
    with torch.no_grad():
        state = net(first, 2).state
    fast, plain = (think(monkeypatch, path, net, reads, state=state) for path in ("auto", "naive"))
    compare(fast, plain)
    assert "read1" in fast[1] and "read2" in fast[1]
    with torch.no_grad():
        state = net(second, 3).state
    compare(*(think(monkeypatch, path, net, reads, state=state) for path in ("auto", "naive")))


def test_ready_vectors_alone(device, monkeypatch):
    net = make(device, heads=0, n_synch_action=0)
    for _ in range(3):  # on a GPU by launches, while it is recorded, replayed
        vector = torch.randn(3, 8, device=device, requires_grad=True)
        compare(think(monkeypatch, "auto", net, vector), think(monkeypatch, "naive", net, vector), 2e-5)


@pytest.mark.parametrize("kind", ["dense", "gated"])
def test_a_state_carries_its_gradient(kind, monkeypatch):
    """Two thoughts in a row, differentiated through both: each has buffers of its own."""
    net, read = make(**KINDS[kind]), tokens()

    def grads(path: str) -> dict[str, torch.Tensor]:
        monkeypatch.setenv("CTM_OPS", path)
        loss = net(read, 3, net(read, 3).state).predictions.square().sum()
        return dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, list(net.parameters())), strict=True))

    fast, plain = grads("auto"), grads("naive")
    floor = 1e-3 * float(sum(g.norm() ** 2 for g in plain.values()) ** 0.5)
    assert max(relative(fast[name], plain[name], floor) for name in plain) < 1e-5


@pytest.mark.parametrize("recompute", [1, 2, 5])
def test_recomputation_changes_nothing(recompute, monkeypatch):
    net, read = make(), tokens()
    expected = think(monkeypatch, "auto", net, read)
    again = make(recompute=recompute)
    ops.clear()
    compare(think(monkeypatch, "auto", again, read), expected)
    used = [runner.spec.ticks for of_a_kind in ops.runners.values() for runner in of_a_kind]
    assert sorted(used) == sorted({recompute, 5 % recompute or recompute}), "the parts of a thought take turns with one"


@pytest.mark.parametrize("decay", [0.0, 1e-7, 1e-5])
def test_decays_near_zero(decay, monkeypatch):
    """Where they begin: what passes from part to part of a thought, and its gradient."""
    net, read = make(recompute=2), tokens()
    with torch.no_grad():
        net.sync_action.decay.fill_(decay)
        net.sync_out.decay.fill_(decay)
    fast, plain = (think(monkeypatch, path, net, read, ticks=30) for path in ("auto", "naive"))
    compare(fast, plain)
    assert relative(fast[1]["sync_action.decay"], plain[1]["sync_action.decay"]) < 1e-5


@pytest.mark.parametrize("kind, recompute", [("dense", 0), ("dense", 2), ("gated", 0), ("semi-dense", 0)])
def test_dropout_is_the_same_forward_and_backward(kind, recompute, monkeypatch):
    """The gradient is that of the function that was drawn: its directional derivative by differences says the same."""
    monkeypatch.setenv("CTM_OPS", "auto")
    net, read = make(dropout=0.3, recompute=recompute, **KINDS[kind]).train(), tokens().detach()
    direction = [torch.randn_like(p) for p in net.parameters()]

    def loss(step: float) -> torch.Tensor:
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), direction, strict=True):
                p.add_(step * d)
        torch.manual_seed(5)
        return moved(read).predictions.double().square().sum()

    torch.manual_seed(5)
    grads = torch.autograd.grad(net(read).predictions.square().sum(), list(net.parameters()))
    along = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))
    assert along == pytest.approx(float((loss(2e-3) - loss(-2e-3)) / 4e-3), rel=0.02)
    torch.manual_seed(6)
    assert float(net(read).predictions.square().sum()) != pytest.approx(float(loss(0.0)), rel=1e-6)


def test_dropout_drops_its_share(monkeypatch):
    """The mean over many draws is near the thought without dropout, as for the plain loop."""
    net, read = make(dropout=0.1).train(), tokens().detach()
    means = {}
    for path in ("auto", "naive"):
        monkeypatch.setenv("CTM_OPS", path)
        torch.manual_seed(0)
        with torch.no_grad():
            draws = torch.stack([net(read).predictions for _ in range(300)])
        means[path] = draws.mean(0), draws.std(0).mean()
    assert relative(means["auto"][0], means["naive"][0]) < 0.15
    assert float(means["auto"][1]) == pytest.approx(float(means["naive"][1]), rel=0.15)


def test_long_thoughts_without_gradient(monkeypatch):
    """Thought about in parts, so that memory stays the same; the numbers do too."""
    net, read = make(), tokens().detach()
    with torch.no_grad():
        monkeypatch.setenv("CTM_OPS", "naive")
        plain = net(read, 60)
        monkeypatch.setenv("CTM_OPS", "auto")
        fast = net(read, 60)
    assert relative(fast.predictions, plain.predictions) < 1e-5
    assert relative(fast.state.action.beta_R, plain.state.action.beta_R) < 1e-5
    assert max(runner.spec.ticks for group in ops.runners.values() for runner in group if not runner.spec.keep) <= 25


@pytest.mark.parametrize("kind, by_tick", [("dense", False), ("gated", True)])
def test_what_is_recorded(kind, by_tick, device, monkeypatch):
    net, seen = make(device, **KINDS[kind]), {}
    for seed in range(3):  # on a GPU by launches, while it is recorded by a graph, replayed
        read, second = tokens(device=device, seed=seed).detach(), tokens(device=device, seed=seed + 5).detach()
        vector = torch.randn(3, 8, device=device)
        reads = [read, read, vector, second, read, vector] * 5 if by_tick else [read] * 30
        for path in ("auto", "naive"):
            monkeypatch.setenv("CTM_OPS", path)
            with torch.no_grad(), record(net) as seen[path]:
                net(reads)
        for name in ("attention", "pre_activations", "post_activations", "sync_action", "sync_out"):
            fast, plain = (getattr(seen[path], name) for path in ("auto", "naive"))
            assert fast.shape == plain.shape and relative(fast, plain) < 1e-5, name
        assert seen["auto"].attention_ticks == seen["naive"].attention_ticks
        assert len(seen["auto"].attention) == (20 if by_tick else 30)
    assert not net.recordings


def test_inference_mode_leaves_nothing_behind(device, monkeypatch):
    monkeypatch.setenv("CTM_OPS", "auto")
    ops.clear()
    net, read, other = make(device), tokens(device=device), tokens(device=device, seed=9)
    with torch.inference_mode():
        inside = net(read.detach()).predictions.clone()
        net(other.detach())
    with torch.no_grad():
        assert relative(net(read).predictions, inside) < 1e-6
        net(other)
    net(read).predictions.sum().backward()
    with torch.inference_mode():
        assert relative(net(read.detach()).predictions, inside) < 1e-6


def test_numbers_of_one_thought_stay_when_another_follows(device, monkeypatch):
    monkeypatch.setenv("CTM_OPS", "auto")
    net, read, other = make(device), tokens(device=device), tokens(device=device, seed=9)
    first = net(read)
    kept = [leaf.detach().clone() for leaf in [*leaves(first.state), first.predictions]]
    second = net(other)
    for leaf, before in zip([*leaves(first.state), first.predictions], kept, strict=True):
        assert torch.equal(leaf, before)
    both = torch.autograd.grad(first.predictions.sum() + second.predictions.sum(), [read, other])
    alone = torch.autograd.grad(net(read).predictions.sum(), read)[0]
    assert relative(both[0], alone) < 1e-5


def test_a_backward_pass_that_comes_too_late_says_so(monkeypatch):
    monkeypatch.setenv("CTM_OPS", "auto")
    net, read = make(), tokens()
    loss = net(read).predictions.sum()
    loss.backward(retain_graph=True)
    net(read).predictions.sum().backward()
    with pytest.raises(RuntimeError, match=r"think again first|modified by an inplace operation"):
        loss.backward()


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Curious(CTM):
    pass


@pytest.mark.parametrize("change", ["part", "hook", "subclass", "norm", "nothing left", "half", "recording"])
def test_what_it_does_not_know_goes_to_the_plain_loop_and_is_said_once(change, monkeypatch, caplog):
    monkeypatch.setenv("CTM_OPS", "auto")
    monkeypatch.setattr(ops, "said", set())
    net, read = make(), tokens().detach()
    before = net(read).predictions
    if change == "part":
        net.query = Doubled(*net.query.weight.shape[::-1])
    elif change == "hook":
        net.synapses.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif change == "subclass":
        net.__class__ = Curious
    elif change == "norm":
        net = make(nlm_layernorm=True)
    elif change == "nothing left":
        net = make(dropout=1.0).train()
    elif change == "recording":
        net.recordings.append(Recording())
    else:
        net, read = net.double(), read.double()
    with caplog.at_level(logging.WARNING):
        fast = net(read).predictions
        net(read)
    assert caplog.text.count("the plain loop is used") == 1
    monkeypatch.setenv("CTM_OPS", "naive")
    assert torch.equal(fast, net(read).predictions)
    if change in ("part", "hook"):
        assert not torch.allclose(fast, before)


@pytest.mark.parametrize("method", ["lora", "svf", "svf-factored", "svf-top3"])
@pytest.mark.parametrize("kind", ["dense", "gated"])
def test_an_adapter_is_applied_and_gets_the_same_gradient(method, kind, monkeypatch):
    compare_adapter(method, kind, monkeypatch, "cpu", 1e-5, 1e-4)


def compare_adapter(method, kind, monkeypatch, device, tolerance, of_gradients) -> None:
    net, read = make(device, **KINDS[kind]), tokens(device=device)
    targets = r".*(query|q_proj|out_proj|k_proj|first\.1|down\.\d\.1|up\.\d\.1|synapses\.1|head)"
    if method == "lora":
        config = peft.LoraConfig(r=2, target_modules=targets)
    else:
        options = {"form": "factored"} if method == "svf-factored" else {"top_k": 3} if method == "svf-top3" else {}
        config = SVFConfig(target_modules=targets, **options)
    base = net(read).predictions
    model = peft.get_peft_model(net, config)
    monkeypatch.setenv("CTM_OPS", "auto")
    if method != "svf-factored":
        assert torch.equal(model(read).predictions, base), "the identity at first, to the bit"
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "svf_z" in name:
                p.normal_(std=0.2)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) >= 6
    fast, found = ops.fast, {}
    for path in ("auto", "naive"):
        monkeypatch.setenv("CTM_OPS", path)
        monkeypatch.setattr(ops, "said", set())
        taken = []
        monkeypatch.setattr(ops, "fast", lambda *args, taken=taken: taken.append(1) or fast(*args))
        with torch.inference_mode():
            model(tokens(device=device, seed=9))  # what is kept then must not stand in training's way
        predictions = model(read).predictions
        found[path] = predictions.detach(), torch.autograd.grad(predictions.square().sum(), list(trained.values()))
        assert not ops.said and len(taken) == (2 if path == "auto" else 0)
    assert relative(found["auto"][0], found["naive"][0]) < tolerance
    for name, one, plain in zip(trained, found["auto"][1], found["naive"][1], strict=True):
        assert relative(one, plain, 1e-4) < of_gradients, name
    assert relative(found["auto"][0], base) > 1e-3
    monkeypatch.setenv("CTM_OPS", "auto")
    with model.disable_adapter():
        assert torch.equal(model(read).predictions, base)


def test_mixtures_on_the_fast_path(monkeypatch):
    """One mixture for all rows is a weight; rows with mixtures of their own take the plain loop, which says so."""
    net, read = make(), tokens(batch=2)
    model = peft.get_peft_model(net, SVFConfig(target_modules=["query", "first.1"], init_std=0.3), "one")
    model.add_adapter("two", SVFConfig(target_modules=["query", "first.1"], init_std=0.3))
    rows = torch.tensor([[0.3, 0.7], [1.0, 0.0]])
    monkeypatch.setattr(ops, "said", set())
    found = {}
    for path in ("auto", "naive"):
        monkeypatch.setenv("CTM_OPS", path)
        with torch.no_grad(), model.mix({"one": 0.3, "two": 0.7}):
            found[path] = model(read).predictions
    assert relative(found["auto"], found["naive"]) < 1e-5 and not ops.said
    monkeypatch.setenv("CTM_OPS", "auto")
    with torch.no_grad(), model.mix(rows):
        mixed = model(read).predictions
    assert ops.said == {"a mixture of adapters of its own for every row"}
    assert relative(mixed[:1], found["naive"][:1]) < 1e-5
    assert relative(mixed[1:], found["naive"][1:]) > 1e-3


def test_models_that_think_pickle_and_copy(monkeypatch):
    monkeypatch.setenv("CTM_OPS", "auto")
    net, read = make(), tokens().detach()
    before = net(read).predictions
    assert torch.equal(copy.deepcopy(net)(read).predictions, before)


@pytest.mark.parametrize("name", ["maze_first_last", "image_random_pairing"])
def test_the_published_loop_that_speed_is_measured_against(golden, name):
    case = golden(name)
    model = from_case(case.kind, case.config, case.under("state.")).eval()
    with torch.no_grad():
        predictions, certainty = model(case["input.0"])
    assert relative(predictions, case["eval.predictions"]) < 1e-5
    assert relative(certainty, case["eval.certainties"][:, 1]) < 1e-5


@pytest.mark.parametrize("name", ["image_random_pairing", "parity_random"])
def test_golden_models_take_the_fast_path(golden, name, monkeypatch):
    monkeypatch.setattr(ops, "said", set())
    case = golden(name)
    model = compat.load(case.kind, case.config, case.under("state.")).eval()
    ops.clear()
    with torch.no_grad():
        assert relative(model(*case.inputs()).predictions.mT, case["eval.predictions"]) < 1e-5
    assert ops.runners and not ops.said


def test_weights_changed_behind_autograds_back_are_seen(device, monkeypatch):
    """As an average of weights is written: through `.data`, which leaves no trace on the parameter."""
    encoder = ResNet(8, stages=1)
    model = Thinker(encoder, make()).to(device).eval()
    for turn in range(4):  # on a GPU by launches, while it is recorded, replayed
        images = torch.randn(2, 3, 15, 15, device=device)
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
        with torch.no_grad():
            monkeypatch.setenv("CTM_OPS", "auto")
            fast = model(images).predictions
            monkeypatch.setenv("CTM_OPS", "naive")
            assert relative(fast, model(images).predictions) < 1e-4, turn


class Rerun(ops.replay.Replay):
    """Behaves as a graph does where there is none: what it returned is overwritten, and nothing else."""

    def __init__(self, function, inputs, learns):
        self.function, self.inputs, self.learns = function, [x.clone() for x in inputs], learns
        self.uses, self.outputs = 0, None

    def __call__(self, *inputs):
        self.uses += 1
        torch._foreach_copy_(self.inputs, inputs)
        with torch.inference_mode(False), torch.set_grad_enabled(self.learns):
            found = self.function(*self.inputs)
        if self.outputs is None:
            self.outputs = found
        for old, new in zip(tensors_of(self.outputs), tensors_of(found), strict=True):
            if old.data_ptr() != new.data_ptr():  # no parameter
                old.data.copy_(new)  # which leaves no trace on it
        return self.outputs


def tensors_of(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict | ops.Weights):
        value = list((value if isinstance(value, dict) else value.tensors).values())
    return [tensor for part in value for tensor in tensors_of(part)] if isinstance(value, list | tuple) else []


@pytest.mark.parametrize("kind", ["dense", "gated"])
def test_a_thought_is_made_ready_by_a_graph_and_is_its_own(kind, device, monkeypatch):
    """Other inputs, other weights and other lengths of thought between its uses; what was thought before stays."""
    if device == "cpu":
        monkeypatch.setattr(ops.replay, "Replay", Rerun)
        monkeypatch.setattr(ops.replay, "DEVICES", ("cpu",))
    ops.clear()
    model = Thinker(ResNet(8, stages=1), make(**KINDS[kind])).to(device).eval()
    before = []
    for turn in range(6):
        images, ticks = torch.randn(2, 3, 15, 15, device=device), (3, 30)[turn % 2]
        model.net.head.weight.data.mul_(1.1), model.net.query.weight.data.mul_(0.9)
        with torch.no_grad():
            monkeypatch.setenv("CTM_OPS", "auto")
            fast = model(images, ticks=ticks)
            more = model(images, ticks=2, state=fast.state)
            monkeypatch.setenv("CTM_OPS", "naive")
            slow = model(images, ticks=ticks)
            assert relative(more.predictions, model(images, ticks=2, state=slow.state).predictions) < 1e-4, turn
        assert relative(fast.predictions, slow.predictions) < 1e-4, turn
        before.append((fast, slow))
    assert all(relative(fast.sync, slow.sync) < 1e-4 for fast, slow in before)
    assert all(relative(fast.state.trace_BDM, slow.state.trace_BDM) < 1e-4 for fast, slow in before)
    graphs = list(ops.replay.kept[model.net].values())
    assert len(graphs) == 2 and all(isinstance(graph, ops.replay.Replay) for graph in graphs)


class Stale(ops.replay.Replay):
    """What a graph gives for the input that it was recorded with, whatever its module has become: what it gave."""

    def __init__(self, function, inputs, learns):
        self.function, self.x, self.y = function, inputs[0].clone(), function(*inputs)

    def __call__(self, x):
        return self.y if torch.equal(x, self.x) else self.function(x)


def transpose(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data.T


NOISE = "k_proj.bias"
"""It has no gradient but rounding errors: attention does not change when all keys move."""


def step_by_step(model, batches, loss_of, device, dtype=torch.float32, backward=torch.Tensor.backward):
    """Losses of a training, whether each step was a graph, and the weights after it."""
    optimizer, losses, graphs = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), [], []
    for batch in batches:
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss, seen = ops.learn(model, loss_of, batch)
        graphs.append(type(loss.grad_fn).__name__.startswith("Learned"))
        assert not seen[0].requires_grad and len(seen[0]) == len(batch[0])
        backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses, graphs, [p.detach().clone() for name, p in model.named_parameters() if not name.endswith(NOISE)]


def two_ticks(thought, batch):
    return classification_loss(thought.predictions, thought.certainty, batch[-1])


@pytest.fixture
def recording(device, monkeypatch):
    monkeypatch.setenv("CTM_OPS", "auto")
    if device == "cpu":
        monkeypatch.setattr(ops.replay, "Replay", Rerun)
        monkeypatch.setattr(ops.replay, "DEVICES", ("cpu",))
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    ops.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("how", ["", "dropout", "recompute", "frozen", "lstm", "ff"])
def test_a_training_step_as_one_graph(how, dtype, device, recording, monkeypatch):
    """The same losses, weights and BatchNorm statistics after eight steps of two batch sizes as by launches; other
    thoughts between the steps are disturbed by nothing, nor disturb."""
    sizes = (4, 4, 3, 3, 4, 3, 4, 3)
    batches = [(torch.randn(n, 3, 15, 15, device=device), torch.randint(3, (n, 5), device=device)) for n in sizes]
    results = []
    for path in ("auto", "naive"):
        monkeypatch.setenv("CTM_OPS", path)
        torch.manual_seed(0)
        encoder = ResNet(8, stages=1)
        if how == "lstm":
            net = LSTM(LSTMConfig(d_model=16, d_input=8, ticks=3, heads=2), (5, 3))
        elif how == "ff":
            net = FeedForward(FFConfig(d_model=16), (5, 3), encoder.n_tokens(15, 15), encoder.width)
        else:
            net = make(dropout=0.1 if how == "dropout" else 0, recompute=2 if how == "recompute" else 0)
        model = Thinker(encoder, net).to(device).train()
        if how == "frozen":
            model.net.head.requires_grad_(False)

        def between(loss, model=model):
            with torch.no_grad():
                model.eval()(batches[0][0][:3])
            model.train()
            loss.backward()

        losses, graphs, weights = step_by_step(model, batches, two_ticks, device, dtype, between)
        assert graphs == ([False, True, False, True, True, True, True, True] if path == "auto" else [False] * 8)
        results.append((losses, weights, model.encoder.stem[1].running_var))
    (ours, weights, variance), (theirs, others, other) = results
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    if how == "dropout":  # dice fall otherwise
        assert all(0.5 < a / b < 2 for a, b in zip(ours, theirs, strict=True)) and len(set(ours)) == len(ours)
    else:
        assert ours == pytest.approx(theirs, rel=tolerance)
        assert max(relative(a, b) for a, b in zip(weights, others, strict=True)) < 10 * tolerance
        assert relative(variance, other) < tolerance


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_by_recorded_steps(accumulate, device, recording, monkeypatch):
    """The trainer of every task: the same weights after six steps, whether or not batches are accumulated."""
    found = {}
    for path in ("recorded", "launched"):
        if path == "launched":
            monkeypatch.setattr(ops.replay, "DEVICES", ())
        torch.manual_seed(0)
        task = ParityTask(length=8, lookahead=3, n_val=4, n_test=4, batch_size=4)
        config = CTMConfig(d_model=24, d_input=8, ticks=4, heads=2, n_synch_out=4, n_synch_action=4, memory_length=3)
        model = LitCTM(task, Parity, ctm=config, optim=Optim(muon=True, lr=1e-2, steps=6, clip_quantile=0.5))
        Trainer(
            accelerator="gpu" if device == "cuda" else "cpu", devices=1, max_epochs=-1, max_steps=6, logger=False,
            accumulate_grad_batches=accumulate, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False,
        ).fit(model, task)  # fmt: skip
        found[path] = {name: p.detach().cpu() for name, p in model.named_parameters()}
        assert any(value for value in ops.replay.kept.get(model.model, {}).values()) == (path == "recorded")
    for name, weight in found["launched"].items():
        if not name.endswith(NOISE):
            assert relative(found["recorded"][name], weight) < 1e-2, name


def test_gradients_of_recorded_steps_add_up_and_are_scaled(device, recording):
    model = Thinker(ResNet(8, stages=1), make()).to(device).train()
    batch = torch.randn(2, 3, 15, 15, device=device), torch.randint(3, (2, 5), device=device)
    found = []
    for scale in (1.0, 1.0, 0.5):
        loss, _ = ops.learn(model, two_ticks, batch)
        model.zero_grad()
        (scale * loss).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    (2 * ops.learn(model, two_ticks, batch)[0]).backward()
    added = [p.grad for p in model.parameters() if p.grad is not None]
    for first, second, half, more in zip(*found, added, strict=True):
        assert relative(second, first) < 1e-3
        assert relative(half, second / 2) < 1e-3
        assert relative(more, 2.5 * second) < 1e-3


def test_gradients_of_an_older_step_are_refused(device, recording):
    model = Thinker(ResNet(8, stages=1), make()).to(device).train()
    batch = torch.randn(2, 3, 15, 15, device=device), torch.randint(3, (2, 5), device=device)
    losses = [ops.learn(model, two_ticks, batch)[0] for _ in range(3)]
    losses[0].backward(), losses[2].backward()
    with pytest.raises(RuntimeError, match="another step was taken"):
        losses[1].backward()


def test_another_loss_is_another_graph(device, recording):
    model = Thinker(ResNet(8, stages=1), make()).to(device).train()
    batch = torch.randn(2, 3, 15, 15, device=device), torch.randint(3, (2, 5), device=device)
    for _ in range(3):
        found = []
        for factor in (1, 3):
            loss, _ = ops.learn(model, lambda *given, factor=factor: factor * two_ticks(*given), batch, factor)
            loss.backward()
            found.append(loss.item())
    assert found[1] == pytest.approx(3 * found[0], rel=1e-3)


def test_pairs_that_are_loaded_are_another_graph(device, recording, monkeypatch):
    """And those that are only written anew, as DDP does with all buffers at every step, the same one."""
    model = Thinker(ResNet(8, stages=1), make()).to(device).train()
    batch = torch.randn(2, 3, 15, 15, device=device), torch.randint(3, (2, 5), device=device)
    left, graphs, gradients = model.net.sync_action.left, [], []
    for pairs in [left.clone()] * 4 + [(left + 1) % model.net.config.d_model] * 3:
        left.copy_(pairs)
        for path in ("auto", "naive"):
            monkeypatch.setenv("CTM_OPS", path)
            model.zero_grad()
            loss, _ = ops.learn(model, two_ticks, batch)
            loss.backward()
            gradients.append(model.net.query.weight.grad.clone())
            graphs += [type(loss.grad_fn).__name__.startswith("Learned")] if path == "auto" else []
    assert graphs == [False, True, True, True, False, True, True]
    assert all(relative(*two) < 1e-3 for two in zip(gradients[::2], gradients[1::2], strict=True))
    assert relative(gradients[-1], gradients[0]) > 0.1


class Step(nn.Module):
    """A training step as a module, which is what DDP wraps."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *batch):
        return ops.learn(self.model, two_ticks, batch)[0]


def test_recorded_steps_under_ddp(device, recording):
    """DDP writes all buffers before every step, and gathers the gradients of a recorded one as of any other."""
    distributed = torch.distributed
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=distributed.HashStore(), rank=0, world_size=1
    )
    try:
        model = Thinker(ResNet(8, stages=1), make()).to(device).train()
        step = nn.parallel.DistributedDataParallel(Step(model))
        batch = torch.randn(2, 3, 15, 15, device=device), torch.randint(3, (2, 5), device=device)
        graphs, gradients = [], []
        for _ in range(4):
            for buffer in model.buffers():
                buffer.copy_(buffer.clone())  # as where there is more than one process
            model.zero_grad()
            loss = step(*batch)
            loss.backward()
            graphs.append(type(loss.grad_fn).__name__.startswith("Learned"))
            gradients.append([p.grad.clone() for name, p in model.named_parameters() if not name.endswith(NOISE)])
        assert graphs == [False, True, True, True]
        for later in gradients[1:]:
            assert all(relative(a, b) < 1e-3 for a, b in zip(later, gradients[0], strict=True))
    finally:
        distributed.destroy_process_group()


CHANGES = {
    "an activation": lambda model: setattr(model.encoder.stem, "2", nn.GELU().eval()),
    "an eps": lambda model: setattr(model.encoder.stem[1], "eps", 0.5),
    "no pooling": lambda model: setattr(model.encoder.stem, "3", nn.Identity().eval()),
    "a tuple": lambda model: setattr(model.encoder.stem[0], "dilation", (2, 1)),
    "strides": lambda model: transpose(model.net.attention.out_proj),
    "the norm of the synapses": lambda model: setattr(model.net.synapses.first[2], "eps", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_is_not_replayed_for_what_it_was_not_recorded_of(change, monkeypatch):
    monkeypatch.setattr(ops.replay, "Replay", Stale)
    monkeypatch.setattr(ops.replay, "DEVICES", ("cpu",))
    ops.clear()
    model, images = Thinker(ResNet(8, stages=1), make()).eval(), torch.randn(2, 3, 15, 15)
    found = {}
    with torch.no_grad():
        for path in ("auto", "auto", "auto", "changed", "naive"):
            monkeypatch.setenv("CTM_OPS", "naive" if path == "naive" else "auto")
            if path == "changed":
                assert all(isinstance(*ops.replay.kept[part].values(), Stale) for part in (model.encoder, model.net))
                CHANGES[change](model)
            found[path] = model(images).predictions
    assert relative(found["changed"], found["naive"]) < 1e-5
    assert relative(found["changed"], found["auto"]) > 1e-4, "the change is one"


def test_what_cannot_be_compared_is_not_replayed(monkeypatch):
    monkeypatch.setattr(ops.replay, "Replay", Stale)
    monkeypatch.setattr(ops.replay, "DEVICES", ("cpu",))
    encoder, images = ResNet(8, stages=1).eval(), torch.randn(2, 3, 15, 15)
    encoder.sizes = ([1], [2])
    with torch.no_grad():
        for _ in range(3):
            ops.encode(encoder, images)
    assert not ops.replay.kept[encoder]


@pytest.mark.parametrize("replays", [False, True])
def test_threads_that_use_one_model_do_not_disturb_each_other(replays, monkeypatch):
    monkeypatch.setenv("CTM_OPS", "auto")
    if replays:
        monkeypatch.setattr(ops.replay, "Replay", Rerun)
        monkeypatch.setattr(ops.replay, "DEVICES", ("cpu",))
    ops.clear()
    model = Thinker(ResNet(8, stages=1), make()).eval()
    images = torch.randn(2, 20, 2, 3, 15, 15)
    images[1] += 1

    @torch.no_grad()
    def thoughts(mine: torch.Tensor) -> list[torch.Tensor]:
        return [model(x).predictions for x in mine]

    alone = [thoughts(mine) for mine in images]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(thoughts, images))
    finally:
        sys.setswitchinterval(interval)
    for ours, theirs in zip(together, alone, strict=True):
        assert all(relative(*pair) < 1e-6 for pair in zip(ours, theirs, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_gpu_than_the_current_one(monkeypatch):
    torch.set_float32_matmul_precision("highest")
    ops.clear()
    model = Thinker(ResNet(8, stages=1), make()).to("cuda:1").eval()
    for _ in range(3):  # by launches, while it is recorded, replayed
        images = torch.randn(2, 3, 15, 15, device="cuda:1")
        found = {}
        for path in ("auto", "naive"):
            monkeypatch.setenv("CTM_OPS", path)
            with torch.no_grad():
                seen = model(images).predictions
            predictions = model(images).predictions
            found[path] = seen, predictions, *torch.autograd.grad(predictions.square().sum(), model.net.query.weight)
        assert all(relative(*pair) < 1e-4 for pair in zip(found["auto"], found["naive"], strict=True))


@pytest.mark.gpu
def test_an_encoder_is_replayed_only_where_nothing_else_can_change(monkeypatch):
    monkeypatch.setenv("CTM_OPS", "auto")
    ops.clear()
    encoder, images = ResNet(8, stages=1).cuda().eval(), torch.randn(2, 3, 15, 15, device="cuda")
    graphs = ops.replay.kept
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        direct = encoder(images)
        for _ in range(3):
            assert relative(ops.encode(encoder, images), direct) < 1e-6
        assert [type(graph).__name__ for graph in graphs[encoder].values()] == ["Replay"]
        other = torch.randn_like(images)
        assert relative(ops.encode(encoder, other), encoder(other)) < 1e-6
    ops.encode(encoder, images).sum().backward()
    assert encoder.rgb.weight.grad is not None
    encoder.train()
    with torch.no_grad():
        before = encoder.stem[1].running_mean.clone()
        ops.encode(encoder, images)
    assert not before.equal(encoder.stem[1].running_mean) and len(graphs[encoder]) == 1
    seen = []
    encoder.eval().stem.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        ops.encode(encoder, images)
    assert seen == [1]


# ----------------------------------------------------------------------------------------------------------------------
# The kernels


def assert_as_exact(fast: torch.Tensor, plain: torch.Tensor, names: list[str]) -> None:
    """At most 1.3 times the plain loop's error: predictions, state and the gradient as a whole on the average of the
    seeds, every single gradient as far as so few seeds can tell, which is four standard errors. 3e-7 is fp32's own."""
    mean, excess = fast.mean(0), fast - 1.3 * plain
    doubt = 4 * excess.std(0) / len(fast) ** 0.5
    doubt[:3] = 0
    worse = ~(excess.mean(0) <= doubt + 3e-7)  # NaN is worse
    assert not worse.any(), {names[i]: (float(mean[i]), float(plain.mean(0)[i])) for i in worse.nonzero().flatten()}


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory is NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


INTERPRETED = """
import sys
sys.path[:0] = {paths!r}
import numpy as np, pytest, torch, triton.language as tl
from exactness import errors_against_fp64
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

dot = InterpreterBuilder.create_dot
def of_values(self, a, b, *rest):  # the interpreter multiplies the bits of bf16 instead
    def wide(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    return dot(self, wide(a), wide(b), *rest)
InterpreterBuilder.create_dot = of_values

torch.utils.deterministic.fill_uninitialized_memory = True
torch.use_deterministic_algorithms(True, warn_only=True)  # with this, fresh memory is NaN
for case in {cases!r}:
    fast, plain, names = errors_against_fp64("triton", "cpu", {dtype}, 1, pytest.MonkeyPatch(), *case)
    allowed = 2 * plain + 1e-6
    allowed[:, 3:] = 10 * plain[:, 3:].clamp(min=plain[0, 2]) + 3e-5  # one draw of chance
    wrong = ~(fast <= allowed)
    assert not wrong.any(), (case, [(names[i], fast[0, i], plain[0, i]) for i in wrong[0].nonzero().flatten()])
print("the same")
"""
IN_THE_INTERPRETER = {
    "fp32": [
        (3, 100, 7, 1, "dense", "tokens"), (1, 24, 3, 2, "dense", "dropout"), (2, 24, 3, 3, "semi-dense", "by tick"),
        (1, 24, 1, 2, "random", "recompute"), (1, 24, 3, 1, "odd", "tokens"),
    ],
    "bf16": [
        (3, 100, 7, 1, "gated", "tokens"), (1, 24, 3, 2, "gated", "dropout, recompute"),
        (2, 24, 3, 2, "semi-dense", "dropout"), (1, 24, 3, 2, "random", "by tick"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("dtype", IN_THE_INTERPRETER)
def test_kernels_in_the_interpreter(dtype):
    """Not here: CUDA graphs, races between warps, tensor cores' own rounding, and long thoughts, which take minutes."""
    pytest.importorskip("triton")
    code = INTERPRETED.format(
        paths=[str(ROOT), str(ROOT / "tests")],
        cases=IN_THE_INTERPRETER[dtype],
        dtype="torch.float32" if dtype == "fp32" else "torch.bfloat16",
    )
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "the same" in done.stdout, done.stderr[-2000:]


RAGGED = [
    (1, 64, 1, 1, "dense", "tokens"), (3, 100, 7, 2, "dense", "tokens"), (63, 100, 25, 75, "dense", "tokens"),
    (63, 2048, 25, 2, "dense", "tokens"), (3, 64, 7, 75, "gated", "tokens"), (63, 64, 25, 2, "semi-dense", "tokens"),
    (1, 100, 25, 75, "random", "tokens"), (3, 2048, 7, 2, "gated", "tokens"), (3, 64, 7, 2, "odd", "tokens"),
    (63, 100, 7, 2, "dense", "dropout"), (3, 64, 25, 75, "gated", "dropout, recompute"),
    (63, 2048, 1, 2, "random", "dropout"), (1, 100, 7, 2, "semi-dense", "dropout"),
    (3, 100, 25, 75, "dense", "by tick"), (63, 64, 7, 2, "gated", "by tick, dropout"),
    (1, 64, 1, 2, "semi-dense", "by tick"), (3, 2048, 25, 2, "random", "by tick, recompute"),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch, d, memory, ticks, kind, how", RAGGED)
def test_kernels_are_as_exact_as_the_plain_loop(batch, d, memory, ticks, kind, how, dtype, poisoned, monkeypatch):
    torch.set_float32_matmul_precision("highest")
    size = batch, d, memory, ticks, kind, how
    assert_as_exact(*errors_against_fp64("auto", "cuda", dtype, 12 if ticks < 75 else 6, monkeypatch, *size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "batch, d, memory, ticks, kind, how",
    [
        (3, 64, 7, 2, "dense", "tokens"), (1, 100, 1, 3, "gated", "by tick"), (2, 64, 3, 4, "random", "recompute"),
        (3, 64, 3, 2, "semi-dense", "by tick, recompute"),
    ],
)  # fmt: skip
def test_a_cpu_is_as_exact_as_the_plain_loop(batch, d, memory, ticks, kind, how, dtype, poisoned, monkeypatch):
    size = batch, d, memory, ticks, kind, how
    assert_as_exact(*errors_against_fp64("auto", "cpu", dtype, 8, monkeypatch, *size))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind, monkeypatch):
    torch.set_float32_matmul_precision("highest")
    net = make("cuda", **KINDS[kind])
    for seed in range(3):  # by launches, while it is recorded, replayed
        read = tokens(device="cuda", seed=seed + 5)
        with torch.no_grad():
            state = net(tokens(device="cuda", seed=seed), 2).state
        fast, plain = (think(monkeypatch, path, net, read, state=state) for path in ("auto", "naive"))
        compare(fast, plain, 2e-5)
    with torch.no_grad():
        fast = net(read, 60).predictions
        monkeypatch.setenv("CTM_OPS", "naive")
        assert relative(fast, net(read, 60).predictions) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora", "svf"])
@pytest.mark.parametrize("kind", ["dense", "gated"])
def test_an_adapter_on_a_gpu(method, kind, monkeypatch):
    torch.set_float32_matmul_precision("highest")
    compare_adapter(method, kind, monkeypatch, "cuda", 2e-5, 5e-4)


@pytest.mark.gpu
def test_memory_does_not_grow_with_the_length_of_a_thought():
    net, read = make("cuda", d_model=512).eval(), tokens(device="cuda", batch=64).detach()
    peaks = []
    with torch.no_grad():
        for ticks in (50, 50, 300):
            net(read, ticks)
            torch.cuda.reset_peak_memory_stats()
            outputs = net(read, ticks)
            peaks.append(torch.cuda.max_memory_allocated() - outputs.predictions.nbytes * 3)
    assert peaks[2] < 1.05 * peaks[1]
