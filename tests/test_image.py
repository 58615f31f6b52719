"""Images: every data set in small, what is kept apart, and files that cannot be read."""

import json
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from test_run import ok

from ctm.model import Thought
from tasks import image
from tasks.image import ImageTask, embedded_digits, stratified


def small(**arguments) -> ImageTask:
    torch.manual_seed(0)
    return ImageTask(**{"batch_size": 8, "eval_batch_size": 16} | arguments)


def write_idx(path: Path, values: np.ndarray) -> None:
    """In the format of MNIST's files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = (0x0800 | values.ndim).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(head + values.astype(np.uint8).tobytes())


def write_mnist(root: Path) -> None:
    rng = np.random.default_rng(0)
    for part, n in (("train", 200), ("t10k", 50)):
        write_idx(root / f"MNIST/raw/{part}-images-idx3-ubyte", rng.integers(256, size=(n, 28, 28)))
        write_idx(root / f"MNIST/raw/{part}-labels-idx1-ubyte", np.arange(n) % 10)


def write_folder(root: Path, parts=("train", "val"), n=8) -> None:
    rng = np.random.default_rng(0)
    for part in parts:
        for name in ("ant", "bee"):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(256, size=(30 + i, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")


def test_embedded_digits_are_split_evenly_and_apart():
    task = small()
    counts = {}
    seen = {}
    for split, (source, members) in task.parts.items():
        labels = source.labels[members]
        counts[split] = np.bincount(labels)
        seen[split] = {source.load(int(i)).tobytes() for i in members}
    assert {split: int(n.sum()) for split, n in counts.items()} == {"train": 1079, "val": 359, "test": 359}
    images, labels = embedded_digits()
    total = np.bincount(labels)
    assert (abs(counts["test"] / total - 0.2) < 0.01).all() and (abs(counts["val"] / total - 0.2) < 0.01).all()
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["val"] and not seen["val"] & seen["test"]
    assert images.shape == (1797, 8, 8) and images.max() == 255
    assert task.describe() == "digits, 10 classes, 8x8: 1,079 train, 359 val, 359 test"


def test_the_split_is_always_the_same():
    labels = np.repeat([0, 1], [10, 30])
    rest, taken = stratified(labels, 0.2)
    assert np.bincount(labels[taken]).tolist() == [2, 6] and not set(rest) & set(taken)
    assert np.array_equal(stratified(labels, 0.2)[1], taken)


def test_digits_are_normalised():
    dataset = small(augment=False).dataset("train")
    batch = torch.stack([dataset[i][0] for i in range(500)])
    assert batch.shape == (500, 3, 8, 8) and torch.equal(batch[:, 0], batch[:, 2])
    assert abs(float(batch.mean())) < 0.02 and abs(float(batch.std()) - 1) < 0.02


def test_augmentation_follows_seed_and_position_alone():
    def draw(seed=0, workers=0, **arguments):
        torch.manual_seed(seed)
        batches = iter(ImageTask(batch_size=16, num_workers=workers, **arguments).train_dataloader())
        return torch.cat([next(batches)[0] for _ in range(2)])

    plain = draw(augment=False)
    assert torch.equal(draw(), draw()) and torch.equal(draw(), draw(workers=2))
    assert not torch.equal(draw(), plain) and not torch.equal(draw(seed=1), draw())
    before = torch.get_rng_state()
    small().dataset("train")[3]
    assert torch.equal(before, torch.get_rng_state()), "the model's random numbers are not touched"


@pytest.mark.parametrize("degrees", [0.0, 9.0])
def test_digits_are_turned_and_shifted(degrees, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor, low, high: tensor.fill_(degrees))
    pixels = embedded_digits()[0][5]
    plain = Image.fromarray(pixels)
    turned = np.pad(np.asarray(plain.rotate(degrees, Image.Resampling.BILINEAR)), 1)
    windows = {turned[y : y + 8, x : x + 8].tobytes() for y in range(3) for x in range(3)}
    seen = {np.asarray(image.jittered(plain)).tobytes() for _ in range(200)}
    assert seen == windows and (plain.tobytes() in seen) == (degrees == 0)


def test_a_pass_takes_every_image_once():
    dataset = small(augment=False).dataset("train")
    n = len(dataset.members)
    passes = [[dataset.shuffled(turn * n + i) for i in range(n)] for turn in (0, 1)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(n)) and passes[0] != passes[1]


def test_mnist(tmp_path):
    write_mnist(tmp_path)
    task = small(name="mnist", root=str(tmp_path), val_share=0.1)
    assert [len(members) for _, members in task.parts.values()] == [180, 20, 50]
    pixels, label = task.dataset("test")[7]
    assert pixels.shape == (3, 28, 28) and label == 7
    raw = np.frombuffer((tmp_path / "MNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16:], np.uint8)[7 * 784 : 8 * 784]
    torch.testing.assert_close(pixels[0].flatten() * 0.3081 + 0.1307, torch.from_numpy(raw / 255).float())
    for content in (b"", b"short" * 10):
        (tmp_path / "MNIST/raw/t10k-images-idx3-ubyte").write_bytes(content)
        with pytest.raises(ValueError, match=r"data.name=mnist: it cannot be read from .*MNIST/raw"):
            small(name="mnist", root=str(tmp_path))


@pytest.mark.parametrize(("name", "n_classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar(name, n_classes, tmp_path, monkeypatch):
    kind = image.PUBLISHED[name]
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(kind, "_load_meta", lambda self: setattr(self, "classes", list(map(str, range(n_classes)))))
    rng = np.random.default_rng(0)
    for file in [file for file, _ in kind.train_list + kind.test_list]:
        path = tmp_path / kind.base_folder / file
        path.parent.mkdir(exist_ok=True)
        key = "labels" if name == "cifar10" else "fine_labels"
        content = {
            "data": rng.integers(256, size=(400, 3072), dtype=np.uint8),
            key: [i % n_classes for i in range(400)],
        }
        path.write_bytes(pickle.dumps(content))
    task = small(name=name, root=str(tmp_path), val_share=0.25)
    assert task.out_dims == (1, n_classes) and task.sample_size == (32, 32)
    train = 2000 if name == "cifar10" else 400
    assert [len(members) for _, members in task.parts.values()] == [train * 3 // 4, train // 4, 400]
    pixels, label = task.dataset("train")[0]
    assert pixels.shape == (3, 32, 32) and 0 <= label < n_classes
    assert type(task.transform(True).transforms[0]).__name__ == "AutoAugment"
    assert len(task.transform(False).transforms) == len(task.transform(True).transforms) - 1
    values = task.metrics(Thought(torch.eye(n_classes)[:3, None], torch.ones(3, 1)), (None, torch.tensor([0, 9, 9])))
    assert ("top5" in values) == (n_classes == 100)
    assert values["accuracy"].tolist() == [1, 0, 0]


def test_without_a_network_the_place_of_the_files_is_named(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(image.PUBLISHED["cifar10"], "download", no_network)
    with pytest.raises(ValueError, match="no route to host") as error:
        small(name="cifar10", root=str(tmp_path))
    for word in (str(tmp_path), "cifar-10-batches-py", "data.root=PATH"):
        assert word in str(error.value)


def test_class_folders_and_a_corrupt_image(tmp_path, capsys):
    write_folder(tmp_path)
    good = (tmp_path / "train/ant/0.png").read_bytes()
    (tmp_path / "train/ant/0.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "val/bee/3.png").write_bytes(b"no picture")
    task = small(name="folder", root=str(tmp_path), size=16)
    assert task.classes == ["ant", "bee"] and [len(members) for _, members in task.parts.values()] == [12, 4, 16]
    train = task.dataset("train")
    seen = [train[i] for i in range(48)]
    assert all(pixels.shape == (3, 16, 16) for pixels, _ in seen)
    tested = [label for _, labels in task.test_dataloader() for label in labels.tolist()]
    assert sorted(tested) == [0] * 8 + [1] * 7, "the unreadable one is left out"
    printed = capsys.readouterr().out.splitlines()
    named = [line for line in printed if "bee/3.png cannot be read" in line]
    assert len(named) == 1 and "1 so far" in named[0]
    if any(task.parts["train"][0].name(int(i)).endswith("train/ant/0.png") for i in task.parts["train"][1]):
        assert sum("ant/0.png cannot be read" in line for line in printed) == 1, "named once, in many passes"


def test_unreadable_images_are_left_out_alone_and_in_whole_batches(tmp_path, capfd):
    write_folder(tmp_path)
    for i in range(7):
        (tmp_path / f"val/bee/{i}.png").write_bytes(b"no picture")
    for size, batches in ((1, [1] * 9), (4, [4, 4, 1])):  # a batch of four without one picture is left out
        loader = small(name="folder", root=str(tmp_path), size=16, eval_batch_size=size).test_dataloader()
        assert [len(labels) for _, labels in loader] == batches
    capfd.readouterr()
    task = small(name="folder", root=str(tmp_path), size=16, eval_batch_size=2, num_workers=2)
    for _ in range(2):
        assert sum(len(labels) for _, labels in task.test_dataloader()) == 9
    printed = [line for line in capfd.readouterr().out.splitlines() if line.startswith("skipped: ")]
    assert len(printed) == 7, "each is named once, in all passes and processes"
    assert max(int(line.split()[-3]) for line in printed) == 7
    for path in (tmp_path / "val").glob("*/*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="not one of the images to validate or test on can be read"):
        list(small(name="folder", root=str(tmp_path), size=16).test_dataloader())


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"no folder train in .*train/CLASS"):
        small(name="folder", root=str(tmp_path))
    write_folder(tmp_path)
    (tmp_path / "val/bee").rename(tmp_path / "val/cow")
    with pytest.raises(ValueError, match="class 'bee' is in one of the training and test folders only"):
        small(name="folder", root=str(tmp_path))
    for path in [*(tmp_path / "train/bee").iterdir()]:
        path.unlink()
    with pytest.raises(ValueError, match=r"no valid file for the classes bee.*train/CLASS"):
        small(name="folder", root=str(tmp_path))
    (tmp_path / "train/bee").rmdir()
    with pytest.raises(ValueError, match="there is but one class, 'ant'"):  # whose certainty would be 0 / 0
        small(name="folder", root=str(tmp_path))


@pytest.mark.parametrize("wrong", [{"val_share": 0}, {"val_share": 0.001}, {"size": 32}, {"name": "folder", "size": 4}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=rf"data\.{next(reversed(wrong))}"):
        small(**wrong)


@pytest.mark.slow
def test_digits_are_learned_in_a_thousand_steps(train, tmp_path):
    words = ("task=image", "run=d", "trainer.max_steps=1000", "model.optim.steps=1000", "early_exit=0.9")
    printed = ok(train(*words, OMP_NUM_THREADS="2"))
    result = json.loads((tmp_path / "runs/image/d/test.json").read_text())
    assert result["test/accuracy"] > 0.95 and "early exit: " in printed
