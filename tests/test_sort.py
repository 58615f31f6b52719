"""Sorting: what is said over ticks, and how it is judged."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_run import assert_same_run, ok

from ctm.model import Thought
from tasks.sort import SortTask, greedy

TINY = (
    "task=sort", "data.n=3", "data.batch_size=8", "data.n_val=16", "data.n_test=16", "model.ctm.d_input=3",
    "model.ctm.d_model=32", "model.ctm.n_synch_out=8", "model.ctm.ticks=6", "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=3", "checkpoint.every=3",
)  # fmt: skip


def small(**arguments) -> SortTask:
    torch.manual_seed(0)
    return SortTask(**{"n": 5, "n_val": 20, "n_test": 20, "batch_size": 8} | arguments)


def says(symbols: list[int], classes: int) -> torch.Tensor:
    """Logits (1, T, C) that say these."""
    return 10.0 * F.one_hot(torch.tensor([symbols]), classes)


def test_targets_sort():
    numbers, order = small().dataset("train")[3]
    assert numbers.dtype == np.float32 and (np.diff(numbers[order]) > 0).all()
    many = np.stack([small().dataset("train")[i][0] for i in range(400)])
    assert abs(many.mean()) < 0.1 and abs(many.std() - 1) < 0.1
    assert not np.array_equal(small().dataset("val")[0][0], small().dataset("test")[0][0])


def test_decoding_resets_at_blanks():
    blank = 3
    for symbols, said in (
        ([0, 0, blank, 0, 1, 1], [0, 0, 1]),
        ([blank, 2, 2, 1, blank, 0], [2, 1, 0]),
        ([0, 1, 0, 1, 0, 1], [0, 1, 0]),
        ([blank] * 6, [-1, -1, -1]),
        ([1, 1, 1, 1, 1, blank], [1, -1, -1]),
    ):
        assert greedy(says(symbols, 4), 3).symbols.tolist() == [said], symbols
    assert greedy(says([0, 1, 0, 1, 0, 1], 4), 3).count.tolist() == [6]
    assert greedy(says([blank, 2, 2, 1, blank, 0], 4), 3).tick.tolist() == [[2, 4, 6]]


def test_metrics_by_hand():
    task = small(n=3)
    numbers, order = torch.tensor([[0.3, -1.0, 2.0]]), torch.tensor([[1, 0, 2]])

    def metrics(symbols):
        return task.metrics(Thought(says(symbols, 4), torch.ones(1, len(symbols))), (numbers, order))

    values = metrics([3, 1, 1, 0, 3, 2])
    assert values["solved"].tolist() == [1] and values["ticks"].tolist() == [6]
    assert values["accuracy_by_tick"][0].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1])
    values = metrics([3, 1, 1, 2, 3, 0])
    assert values["solved"].tolist() == [0] and values["accuracy"].tolist() == pytest.approx([1 / 3])
    assert metrics([1, 0, 2, 3, 1, 3])["solved"].tolist() == [0], "one symbol too many"
    assert metrics([1, 0, 3, 3, 3, 3])["accuracy"].tolist() == pytest.approx([2 / 3])


def test_the_loss_is_the_probability_of_all_ways_to_say_it():
    """Summed over every path of four ticks whose decoding is the order."""
    task = small(n=2)
    torch.manual_seed(1)
    logits = torch.randn(1, 4, 3)
    probability = logits.softmax(-1)[0]
    total = 0.0
    for path in itertools.product(range(3), repeat=4):
        collapsed = [symbol for symbol, _ in itertools.groupby(path) if symbol != 2]
        if collapsed == [1, 0]:
            total += float(probability[torch.arange(4), list(path)].prod())
    loss = task.loss(Thought(logits, torch.ones(1, 4)), (torch.zeros(1, 2), torch.tensor([[1, 0]])))
    assert float(loss) == pytest.approx(-np.log(total) / 2, rel=1e-5)  # PyTorch's mean is per symbol


def test_difficulty_is_the_smallest_gap():
    numbers = torch.tensor([[0.0, 5.0, 2.0], [0.0, 0.3, 1.0], [0.0, 0.25, 1.0], [0.0, 0.0, 1.0]])
    assert small().difficulty((numbers, None)).tolist() == [0, 2, 2, 30]


@pytest.mark.slow
def test_a_run_and_its_continuation(train, tmp_path):
    ok(train(*TINY, "run=whole", "trainer.max_steps=8"))
    ok(train(*TINY, "run=half", "trainer.max_steps=4"))
    ok(train("task=sort", "run=half", "ckpt_path=last", "trainer.max_steps=8"))
    assert_same_run(tmp_path / "runs/sort/whole", tmp_path / "runs/sort/half")
