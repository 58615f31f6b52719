"""Parity, the metrics of every classification, early exit, and the published optimiser options."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_run import assert_same_run, checkpoint, ok
from torch import nn
from torch.utils.data import default_collate

from ctm import checkpoint as checkpoint_of
from ctm import encoders, record
from ctm.baselines import LSTM, LSTMConfig
from ctm.early_exit import think_until
from ctm.loss import beginning, due, gather_tick, paced_loss
from ctm.model import CTM, CTMConfig, Thinker, Thought
from tasks.metrics import ByDifficulty, Calibration, classification
from tasks.optim import Optim, QuantileClip
from tasks.parity import ParityTask, split_of

TINY = (
    "task=parity", "data.length=8", "data.batch_size=8", "data.n_val=16", "data.n_test=16",
    "model.ctm.d_model=32", "model.ctm.d_input=16", "model.ctm.heads=2", "model.ctm.ticks=4",
    "model.ctm.n_synch_out=6", "model.ctm.n_synch_action=6", "model.optim.clip_quantile=0.5",
    "model.optim.clip_history=4", "model.optim.no_decay=[bias]", "model.optim.weight_decay=0.1",
    "model.optim.muon=true", "trainer.val_check_interval=4", "trainer.log_every_n_steps=3", "checkpoint.every=3",
)  # fmt: skip


def small(**arguments) -> ParityTask:
    torch.manual_seed(0)
    return ParityTask(**{"length": 12, "n_val": 50, "n_test": 50, "batch_size": 8} | arguments)


# -------------------------------------------------------------------------------------------------------------- data


def test_targets_are_cumulative_parities():
    values, parities = small().dataset("train")[5]
    assert values.dtype == np.float32 and set(values.tolist()) == {-1.0, 1.0}
    product = 1.0
    for value, parity in zip(values, parities, strict=True):
        product *= value
        assert parity == (product < 0)


def test_no_sequence_is_in_two_splits():
    task = small(length=8)  # of only 256 sequences
    seen = {s: {task.dataset(s)[i][0].tobytes() for i in range(400 if s == "train" else 50)} for s in ("train", "val")}
    seen["test"] = {task.dataset("test")[i][0].tobytes() for i in range(50)}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["val"] and not seen["val"] & seen["test"]
    shares = [split_of(np.random.default_rng(i).random(64) < 0.5) for i in range(2000)]
    assert 0.77 < shares.count("train") / 2000 < 0.83 and 0.08 < shares.count("test") / 2000 < 0.12


def test_the_stream_follows_seed_and_position_alone():
    def first(seed, split="train", workers=0):
        torch.manual_seed(seed)
        task = ParityTask(length=16, batch_size=4, n_test=8, num_workers=workers)
        return torch.cat([x for x, _ in task.test_dataloader()]) if split == "test" else batches(task)

    def batches(task):
        loader = iter(task.train_dataloader())
        return torch.cat([next(loader)[0] for _ in range(3)])

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))
    assert torch.equal(first(1), first(1, workers=2))
    assert torch.equal(first(1, "test"), first(2, "test"))


@pytest.mark.parametrize(
    "wrong", [{"length": 7}, {"lookahead": 0}, {"n_val": 0}, {"eval_batch_size": 0}, {"num_workers": -1}]
)
def test_settings_that_cannot_be(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=rf"data\.{name}={value} must be at least"):
        small(**wrong)


def test_the_shipped_model_knows_the_parity_of_64_bits():
    """On test sequences, by its most certain tick; README: all of 2,000."""
    model = checkpoint_of.load("ctm/assets/parity.safetensors")
    assert sum(p.numel() for p in model.parameters()) == 5_719_714
    values, parities = default_collate([small(length=64, n_test=64).dataset("test")[i] for i in range(64)])
    with torch.no_grad():
        thought = model(values)
    said = gather_tick(thought.predictions, thought.certainty.argmax(1)).view(64, 64, 2).argmax(-1)
    assert (said == parities).all(1).sum() == 64


def test_the_shipped_model_is_found_from_any_folder(train):
    printed = ok(
        train("test", "task=parity/quick", "ckpt_path=ctm/assets/parity.safetensors", "data.n_test=20",
              "trainer.precision=32-true")
    )  # fmt: skip
    assert "of 20 unseen test samples" in printed and "solved: 0" not in printed


# --------------------------------------------------------------------------------- metrics of every classification


def logits(probability_of_1: torch.Tensor) -> torch.Tensor:
    """Logits (..., P * 2) of the probability of class 1, (..., P)."""
    return torch.stack([1 - probability_of_1, probability_of_1], dim=-1).log().flatten(-2)


def test_loss_by_hand():
    task = small(length=8)
    probability = torch.full((1, 3, 8), 0.5)
    probability[0, 1], probability[0, 2] = 0.9, 0.8
    targets = torch.ones(1, 8, dtype=torch.long)
    thought = Thought(logits(probability), torch.tensor([[0.1, 0.2, 0.9]]))
    best, sure = -np.log(0.9), -np.log(0.8)
    batch = torch.zeros(1, 8), targets
    assert task.loss(thought, batch).item() == pytest.approx((best + sure) / 2, rel=1e-5)
    last = thought._replace(certainty=torch.tensor([[0.9, 0.2, 0.1]]))
    assert task.loss(last, batch, most_certain=False).item() == pytest.approx((best + sure) / 2, rel=1e-5)


def test_curriculum_by_hand():
    """Ten samples have the first two of eight places right, nine of them the third: places 1 to 2 + 3 count."""
    probability = torch.tensor([0.9, 0.8, 0.6, 0.4, 0.3, 0.9, 0.9, 0.9]).repeat(10, 1)[:, None]
    probability[3, 0, 2] = 0.4
    batch = torch.zeros(10, 8), torch.ones(10, 8, dtype=torch.long)
    loss = small(length=8, lookahead=3).loss(Thought(logits(probability), torch.ones(10, 1)), batch)
    assert float(loss) == pytest.approx(-float(probability[:, 0, :5].log().mean()), rel=1e-5)


def test_when_all_is_asked_the_published_loss_is_added():
    """Sure of the first tick, where what is due is right and the last place is not: the published loss sees it."""
    probability = torch.full((10, 2, 8), 0.99)
    probability[:, 0, 7] = 0.01
    thought = Thought(logits(probability), torch.tensor([[0.9, 0.8]]).repeat(10, 1))
    batch = torch.zeros(10, 8), torch.ones(10, 8, dtype=torch.long)
    published = small(length=8).loss(thought, batch).item()
    paced = -math.log(0.99)
    assert published > 0.25 > 20 * paced
    assert small(length=8, lookahead=1).loss(thought, batch).item() == pytest.approx(paced + published, rel=1e-4)
    probability[:, 1, 2] = 0.01  # the third place is not known: the last is not asked for
    thought = thought._replace(predictions=logits(probability))
    mask = due(2, 8) & (torch.arange(8) < 4)
    expected = -float(probability[0][mask].log().mean())
    assert small(length=8, lookahead=2).loss(thought, batch).item() == pytest.approx(expected, rel=1e-4)


def test_pace_by_hand():
    """Three places in four ticks: one is due at once, one from tick 2, the last from tick 3; unasked ones never."""
    expected = [[True, False, False], [True, True, False], [True, True, True], [True, True, True]]
    assert due(4, 3).tolist() == expected
    assert due(2, 4).tolist() == [[True, True, False, False], [True] * 4]
    assert [int(n) for n in due(75, 64).sum(1)[[0, 1, 36, 73, 74]]] == [1, 2, 32, 64, 64]
    probability = torch.linspace(0.1, 0.9, 12).reshape(1, 4, 3)
    targets = torch.ones(1, 3, dtype=torch.long)
    for asked in (torch.ones(3), torch.tensor([1.0, 1.0, 0.0])):
        counted = probability[0][due(4, 3) & (asked > 0)]
        for asked_of_all in (asked, asked[None]):
            loss = paced_loss(logits(probability), targets, asked_of_all)
            assert float(loss) == pytest.approx(-float(counted.log().mean()), rel=1e-5)


def test_only_what_is_due_tells_what_is_known():
    """Wrong before it is due and right from then on is right."""
    probability = torch.full((10, 2, 8), 0.1)
    probability[:, due(2, 8)] = 0.9
    assert beginning(logits(probability), torch.ones(10, 8, dtype=torch.long), 1).tolist() == [1] * 8
    probability[:3, 1, 2] = 0.1  # right in 17 of 20: the third is not known yet
    assert beginning(logits(probability), torch.ones(10, 8, dtype=torch.long), 1).tolist() == [1] * 3 + [0] * 5


def test_decoders_by_hand():
    """One sample, one position, three ticks: wrong and fairly sure, right and unsure, right by a hair."""
    probability = torch.tensor([0.1, 0.6, 0.55])[None, :, None]
    thought = Thought(logits(probability), torch.tensor([[0.53, 0.03, 0.01]]))
    values = classification(thought, torch.tensor([[1]]), 2)
    assert values["accuracy"].tolist() == [0] and values["ticks"].tolist() == [1]
    assert values["accuracy_by_tick"].tolist() == [[0, 1, 1]]
    assert values["accuracy_most_certain_by_tick"].tolist() == [[0, 0, 0]]
    assert values["accuracy_averaged_by_tick"].tolist() == [[0, 0, 0]]  # means .1, .35, .4167
    assert values["accuracy_weighted"].tolist() == [0]
    assert "solved" not in values, "there is but one position"
    sure_late = thought._replace(certainty=torch.tensor([[0.01, 0.53, 0.5]]))
    values = classification(sure_late, torch.tensor([[1]]), 2)
    assert values["accuracy_most_certain_by_tick"].tolist() == [[0, 1, 1]]
    assert values["accuracy_weighted_by_tick"].tolist() == [[0, 1, 1]]  # .59, .567
    assert classification(sure_late, torch.tensor([[1]]), 2, most_certain=False)["ticks"].tolist() == [3]


def test_solved_means_every_position():
    right = torch.tensor([[0.9, 0.9, 0.9], [0.9, 0.2, 0.9]])[:, None]
    values = classification(Thought(logits(right), torch.ones(2, 1)), torch.ones(2, 3, dtype=torch.long), 2)
    assert values["solved"].tolist() == [1, 0]
    assert values["accuracy"].tolist() == pytest.approx([1, 2 / 3])


def test_calibration_error_by_hand():
    """Ten predictions of probability 0.75, of which five are right; at the second tick all say 0.55 and are right."""
    probability = torch.stack([torch.full((10, 1), 0.75), torch.full((10, 1), 0.55)], dim=1)
    targets = torch.tensor([[1]] * 5 + [[0]] * 5)
    calibration = Calibration(2)
    for rows in (slice(0, 4), slice(4, 10)):  # in uneven batches
        calibration.update(Thought(logits(probability[rows]), torch.ones(10, 2)[rows]), targets[rows])
    values = calibration.compute()
    assert values["calibration_error_by_tick"].tolist() == pytest.approx([0.25, 0.05], abs=1e-5)
    assert values["calibration_error_averaged_by_tick"].tolist() == pytest.approx([0.25, 0.15], abs=1e-5)
    assert float(values["calibration_error"]) == pytest.approx(0.05, abs=1e-5)


def test_means_by_difficulty():
    table = ByDifficulty()
    table.update(torch.tensor([3, 1]), {"ticks": torch.tensor([8.0, 2.0]), "curve_by_tick": torch.zeros(2, 4)})
    table.update(torch.tensor([3]), {"ticks": torch.tensor([4.0])})
    assert table.rows() == [{"difficulty": 1, "n": 1, "ticks": 2.0}, {"difficulty": 3, "n": 2, "ticks": 6.0}]


# -------------------------------------------------------------------------------------------------------- early exit


@pytest.fixture(params=["ctm", "lstm"])
def thinker(request) -> Thinker:
    torch.manual_seed(0)
    if request.param == "ctm":
        net = CTM(CTMConfig(24, 16, 6, 4, 6, 6, synapse_depth=1, memory_length=3), (4, 2))
    else:
        net = LSTM(LSTMConfig(24, 16, 2, 6, 4), (4, 2))
    model = Thinker(encoders.Parity(16), net).eval()
    with torch.no_grad():
        net.head.weight.mul_(30)  # so that certainties differ
    return model


def test_early_exit_is_the_full_run_up_to_the_tick_of_the_threshold(thinker):
    values = torch.where(torch.rand(16, 10) < 0.5, -1.0, 1.0)
    thought = thinker(values)
    threshold = float(thought.certainty.detach().max(1).values.median())
    answer = think_until(thinker, values, threshold=threshold)
    passed = thought.certainty >= threshold
    assert 0 < passed.any(1).sum() < 16, "some leave early, some never"
    for i in range(16):
        tick = int(passed[i].int().argmax()) if passed[i].any() else int(thought.certainty[i].argmax())
        torch.testing.assert_close(answer.predictions[i], thought.predictions[i, tick], rtol=1e-4, atol=1e-5)
        assert int(answer.ticks[i]) == (tick + 1 if passed[i].any() else 6)
    assert think_until(thinker, values, threshold=2.0).ticks.tolist() == [6] * 16
    assert think_until(thinker, values, threshold=0.0).ticks.tolist() == [1] * 16


def test_finished_samples_are_not_thought_about(thinker, monkeypatch):
    values = torch.where(torch.rand(16, 10) < 0.5, -1.0, 1.0)
    sizes, forward = [], thinker.net.forward

    def counted(read, ticks, state):
        sizes.append(len(read.keys))
        return forward(read, ticks, state)

    monkeypatch.setattr(thinker.net, "forward", counted)
    answer = think_until(thinker, values, threshold=0.2)
    assert sum(sizes) == int(answer.ticks.sum()) and sizes == sorted(sizes, reverse=True)


# --------------------------------------------------------------------------------------------------------- optimiser


def test_clipping_by_quantile_by_hand():
    parameter = nn.Parameter(torch.zeros(2))
    clip, norms = QuantileClip(0.5, 3), []
    for length in (1.0, 3.0, 10.0, 8.0, 2.0):
        parameter.grad = torch.tensor([0.6, 0.8]) * length
        clip([parameter])
        norms.append(length)
        limit = np.quantile(norms[-3:], 0.5)
        assert float(parameter.grad.norm()) == pytest.approx(min(length, limit), rel=1e-5)
        torch.testing.assert_close(F.normalize(parameter.grad, dim=0), torch.tensor([0.6, 0.8]))
    again = QuantileClip(0.5, 3)
    again.load_state_dict(copy.deepcopy(clip.state_dict()))
    for one in (clip, again):
        parameter.grad = torch.tensor([6.0, 8.0])
        one([parameter])
        assert float(parameter.grad.norm()) == pytest.approx(8.0, rel=1e-5)  # of 8, 2 and 10
    other = QuantileClip(0.5, 9)
    other.load_state_dict(clip.state_dict())
    for length, limit in ((4.0, 4.0), (8.0, 6.0)):
        parameter.grad = torch.tensor([0.6, 0.8]) * length
        other([parameter])
        assert float(parameter.grad.norm()) == pytest.approx(limit, rel=1e-5)  # of a history of its own


def test_weight_decay_leaves_names_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with_decay, without = Optim(weight_decay=0.1, no_decay=("bias", "1.")).groups(model.named_parameters())
    assert [p is q for p, q in zip(with_decay["params"], [model[0].weight], strict=True)] == [True]
    assert len(without["params"]) == 3 and without["weight_decay"] == 0
    optimizer = Optim(weight_decay=0.1, no_decay=("bias", "1.")).configure(model)["optimizer"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert len(Optim().groups(model.named_parameters())) == 1
    with pytest.raises(ValueError, match="'nrom' is in no parameter's name"):
        Optim(no_decay=("nrom",)).groups(model.named_parameters())


def test_muon_takes_the_matrices_and_adamw_the_rest():
    """Step by step what PyTorch's two optimisers do apart, under one schedule, across saving and loading."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3), nn.LSTMCell(3, 2))

    optim = Optim(muon=True, lr=0.01, warmup=0, steps=10, weight_decay=0.1, beta2=0.9, no_decay=("bias",))
    one, two = net(), net()
    made = optim.configure(one)
    both, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    named = dict(two.named_parameters())
    in_muon = ["1.weight", "3.weight_ih", "3.weight_hh"]
    in_adamw = [name for name in named if name not in in_muon]
    muon = torch.optim.Muon([named[n] for n in in_muon], 0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": [named[n]], "weight_decay": 0.0 if "bias" in n else 0.1} for n in in_adamw], 0.01, betas=(0.9, 0.9)
    )
    for step in range(6):
        if step == 3:  # into a new optimiser, as after a restart
            made = optim.configure(one)
            made["optimizer"].load_state_dict(copy.deepcopy(both.state_dict()))
            made["lr_scheduler"]["scheduler"].load_state_dict(schedule.state_dict())
            both, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
        for group in muon.param_groups + adamw.param_groups:
            group["lr"] = 0.01 * optim.factor(step)
        torch.manual_seed(step)
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in (both, muon, adamw):
            optimizer.step()
        schedule.step()
        for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
            assert torch.equal(p, q), (step, name)
    with pytest.raises(ValueError, match="nothing that trains here is a matrix"):
        Optim(muon=True).configure(nn.LayerNorm(3))
    model, optimizer = copy.deepcopy((one, both))  # together, as what is trained is copied
    for both_, net_ in ((both, one), (optimizer, model)):
        for p in net_.parameters():
            p.grad = torch.ones_like(p)
        both_.step()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), model.parameters(), strict=True))
    assert not torch.equal(model[1].weight, two[1].weight)


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_with_its_clipping(train, tmp_path):
    ok(train(*TINY, "run=whole", "trainer.max_steps=12"))
    ok(train(*TINY, "run=half", "trainer.max_steps=6"))
    ok(train("task=parity", "run=half", "ckpt_path=last", "trainer.max_steps=12"))
    whole, half = (tmp_path / "runs/parity" / name for name in ("whole", "half"))
    assert_same_run(whole, half)
    clips = [checkpoint(run)["clip"] for run in (whole, half)]
    assert clips[0]["n"] == clips[1]["n"] == 12 and torch.equal(clips[0]["norms"], clips[1]["norms"])
    assert len(checkpoint(whole)["optimizer_states"][0]["param_groups"]) == 3, "AdamW with decay and without, and Muon"
    assert {p.name for p in whole.iterdir()} >= {"difficulty.csv", "media"}
    assert (whole / "media/test/sample-parity.png").stat().st_size > 1000
    curves = (whole / "curves.csv").read_text()
    assert "test/calibration_error_averaged_by_tick,4," in curves and "test/solved_averaged_by_tick,4," in curves
    assert "val/solved_by_tick,4," in curves and "val/solved_averaged_by_tick" not in curves
    refused = train("task=parity", "run=half", "ckpt_path=last", "trainer.max_steps=14", "model.optim.muon=false")
    assert refused.returncode == 2 and "cannot be continued by an optimiser of other parts" in refused.stderr
    printed = ok(train("test", "task=parity", "run=half", "ckpt_path=best", "early_exit=0.001"))
    assert "early exit: " in printed
    [run] = (tmp_path / "runs/parity").glob("*-test")
    result = json.loads((run / "test.json").read_text())
    assert 1 <= result["test/early_exit_ticks"] < result["test/ticks"] + 4 and result["early_exit_seconds"] > 0
    assert "seconds" not in (run / "metrics.csv").read_text(), "metrics follow from the configuration alone"


def test_a_start_from_which_attention_tells_places_apart():
    """As published but for what is asked for; and a checkpoint brings both options along."""

    def made(place_gain: float, query_std: float) -> Thinker:
        torch.manual_seed(0)
        config = CTMConfig(64, 32, 3, 4, 6, 6, "random", synapse_depth=1, memory_length=2, query_std=query_std)
        return Thinker(encoders.Parity(32, place_gain=place_gain), CTM(config, (16, 2))).eval()

    published, spread = made(1.0, 0.0), made(10.0, 4.0)
    assert torch.equal(spread.encoder.position.project.weight, 10 * published.encoder.position.project.weight)
    assert torch.equal(spread.encoder.position.project.bias, published.encoder.position.project.bias)
    assert torch.equal(spread.net.query.weight, published.net.query.weight)
    assert float(published.net.query.bias.abs().max()) < 0.5 and 3 < float(spread.net.query.bias.std()) < 5
    again = checkpoint_of.build(checkpoint_of.describe(spread))
    assert again.encoder.config == spread.encoder.config and again.net.config == spread.net.config

    def looks(model: Thinker) -> list[float]:
        """How far a head's attention to 16 equal values is from even, of four heads at the first tick."""
        with record(model) as seen:
            model(torch.ones(1, 16))
        return (seen.attention[0, 0] * 16 - 1).abs().amax(-1).tolist()

    assert max(looks(published)) < 0.2 and min(looks(spread)) > 0.5


def test_a_sequence_needs_an_embedding():
    with pytest.raises(ValueError, match=r"give model\.ff\.d_input"):
        encoders.Parity(None)


def test_difficulty_counts_flips():
    assert small().difficulty((torch.tensor([[1.0, -1, -1], [1, 1, 1]]), None)).tolist() == [2, 0]
