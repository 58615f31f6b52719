"""QAMNIST: questions and answers, what is kept apart, and which ticks count."""

from functools import partial

import numpy as np
import pytest
import torch
from test_image import write_mnist
from test_run import assert_same_run, ok

from ctm.early_exit import think_until
from ctm.encoders import QAMNIST
from ctm.lit import LitCTM
from ctm.loss import gather_tick
from ctm.model import CTMConfig
from tasks.qamnist import MINUS, PLUS, EqualAmounts, QAMNISTTask, question_and_answer

TINY = (
    "task=qamnist", "data.source=digits", "data.batch_size=4", "data.n_val=8", "data.n_test=8",
    "model.ctm.d_model=32", "model.ctm.d_input=8", "model.ctm.heads=2", "model.ctm.n_synch_out=6",
    "model.ctm.n_synch_action=6", "model.lstm.d_input=8", "model.lstm.heads=2",
    "model.encoder.digit_ticks=1", "model.encoder.question_ticks=1", "model.encoder.answer_ticks=3",
    "trainer.val_check_interval=4", "trainer.log_every_n_steps=3", "checkpoint.every=3",
)  # fmt: skip


def small(**arguments) -> QAMNISTTask:
    torch.manual_seed(0)
    return QAMNISTTask(**{"source": "digits", "n_val": 32, "n_test": 48, "batch_size": 4} | arguments)


def by_hand(digits: list[int], question: list[int]) -> int:
    value = digits[question[0]]
    for operator, index in zip(question[1::2], question[2::2], strict=True):
        value = (value + digits[index]) % 10 if operator == PLUS else (value - digits[index]) % 10
    return value


def test_answers_are_right():
    operators = set()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        digits = rng.integers(10, size=1 + seed % 4)
        question, answer = question_and_answer(digits, 1 + seed % 3, rng)
        assert len(question) == 2 * (1 + seed % 3) + 1 and answer == by_hand(digits.tolist(), question.tolist())
        assert question[::2].min() >= 0 and question[::2].max() < len(digits)
        operators |= set(question[1::2].tolist())
    assert operators == {PLUS, MINUS} == {-1, -2}
    assert by_hand([3, 7], [0, MINUS, 1, MINUS, 1]) == 9


def test_a_sample_shows_the_digits_it_asks_about():
    task = small()
    images, labels = task.digits["train"]
    mean, std = task.normalisation
    for position in (0, 5, 21):
        pictures, question, answer = task.dataset("train")[position]
        assert pictures.shape[1:] == (1, 32, 32)
        shown = [
            int(labels[next(i for i in range(len(images)) if torch.equal(images[i], bytes_))])
            for bytes_ in (pictures[:, 0] * std + mean).mul(255).round().byte()
        ]
        assert by_hand(shown, question.tolist()) == answer
    assert abs(images.float().mean() / 255 - mean) < 0.05 and abs((images.float() / 255).std() - std) < 0.06


def test_digits_of_the_splits_are_disjoint():
    digits = small().digits
    seen = {split: {image.numpy().tobytes() for image in images} for split, (images, _) in digits.items()}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["val"] and not seen["val"] & seen["test"]
    assert [len(labels) for _, labels in digits.values()] == [1079, 359, 359]


def test_amounts_are_drawn_for_every_batch_and_shared_equally_otherwise():
    task = small(max_digits=3, max_operations=2, n_val=24)
    train, val = task.dataset("train"), task.dataset("val")
    for batch in range(20):
        assert len({train.amounts(position) for position in range(4 * batch, 4 * batch + 4)}) == 1
    assert {train.amounts(4 * batch) for batch in range(100)} == set(task.amounts)
    assert [val.amounts(i) for i in range(24)] == [amounts for amounts in task.amounts for _ in range(4)]
    shares = [list(EqualAmounts(val, 3, rank, 2)) for rank in (0, 1)]
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(24))
    assert all(len({val.amounts(i) for i in batch}) == 1 for share in shares for batch in share)
    sizes = {(len(digits), digits.shape[1], question.shape[1]) for digits, question, _ in task.val_dataloader()}
    assert sizes == {(4, n, 2 * operations + 1) for n, operations in task.amounts}


def test_the_stream_is_the_same_at_any_number_of_workers():
    def first(workers):
        batches = iter(small(num_workers=workers).train_dataloader())
        return [next(batches) for _ in range(3)]

    for one, other in zip(first(0), first(2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_only_the_answering_ticks_count():
    task = small()
    encoder = partial(QAMNIST, digit_ticks=2, question_ticks=1, answer_ticks=3)
    config = CTMConfig(d_model=32, d_input=8, heads=2, n_synch_out=6, n_synch_action=6, synapse_depth=1)
    model = LitCTM(task, encoder, ctm=config).eval()
    batch = next(iter(task.val_dataloader()))
    thought, whole = model(*batch[:2]), model.model(*batch[:2])
    assert whole.predictions.shape[1] == 2 * batch[0].shape[1] + batch[1].shape[1] + 3
    assert torch.equal(thought.predictions, whole.predictions[:, -3:]) and thought.certainty.shape[1] == 3
    assert set(task.metrics(thought, batch)["ticks"].tolist()) <= {1, 2, 3}
    answer = think_until(model.model, *batch[:2], threshold=2.0)
    best = thought.certainty.argmax(1)
    torch.testing.assert_close(answer.predictions, gather_tick(thought.predictions, best), rtol=1e-4, atol=1e-5)
    assert answer.ticks.tolist() == [3] * len(best), "only answering ticks are counted, and nobody leaves before them"
    assert think_until(model.model, *batch[:2], threshold=0.0).ticks.tolist() == [1] * len(best)
    lstm = LitCTM(task, encoder, net="lstm")
    assert lstm.model.encoder.config["project_question"] and not model.model.encoder.config["project_question"]


def test_mnist_where_it_is_on_the_disk(tmp_path):
    with pytest.raises(ValueError, match=r"data\.source=mnist: put its files in .*MNIST/raw"):
        small(source="mnist", root=str(tmp_path))
    assert "scikit-learn" in small(source="auto", root=str(tmp_path)).describe()
    write_mnist(tmp_path)
    task = small(source="auto", root=str(tmp_path))
    assert "MNIST in" in task.describe() and task.normalisation == (0.1307, 0.3081)
    assert [len(labels) for _, labels in task.digits.values()] == [180, 20, 50]
    pictures, _, _ = task.dataset("test")[0]
    assert pictures.shape[1:] == (1, 32, 32)
    for spoil in (lambda path: path.write_bytes(path.read_bytes()[:99]), lambda path: path.unlink()):
        spoil(tmp_path / "MNIST/raw/train-images-idx3-ubyte")  # other digits in its place would go unnoticed
        with pytest.raises(ValueError, match=r"data\.root: MNIST cannot be read from .*MNIST/raw.*data\.source=digits"):
            small(source="auto", root=str(tmp_path))


@pytest.mark.parametrize("wrong", [{"max_digits": 0}, {"max_operations": 0}, {"max_digits": 51}, {"n_test": 15}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=rf"data\.{next(iter(wrong))}"):
        small(**wrong)


@pytest.mark.slow
def test_a_run_and_its_continuation(train, tmp_path):
    ok(train(*TINY, "run=whole", "trainer.max_steps=6"))
    ok(train(*TINY, "run=half", "trainer.max_steps=4"))
    ok(train("task=qamnist", "run=half", "ckpt_path=last", "trainer.max_steps=6"))
    assert_same_run(tmp_path / "runs/qamnist/whole", tmp_path / "runs/qamnist/half")
    assert "early exit: " in ok(train(*TINY, "model.net=lstm", "overlay=fast", "early_exit=0.9"))
