"""Images: look at one and say its class.

The default data are real handwritten digits that come with scikit-learn, so that it runs anywhere; the others are
torchvision's own sets, or folders of files, one folder a class.
"""

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import datasets
from torchvision.transforms import v2 as transforms

from ctm.loss import gather_tick
from ctm.model import Thought
from tasks.base import Shuffled, Task
from tasks.metrics import answer_tick
from tasks.seen import Sample

Batch = tuple[Tensor, Tensor]
"""Images (B, 3, H, W), gray ones as three equal channels, and classes (B,)."""

Name = Literal["digits", "mnist", "cifar10", "cifar100", "imagenet", "folder"]


class Kind(NamedTuple):
    """What is fixed of a data set."""

    size: int
    """Side in pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of the colours, which are normalised by them."""
    where: str
    """Where its files belong under `data.root`."""


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FOLDERS = "train/CLASS/*.jpg and test/CLASS/*.jpg (or val/CLASS/*.jpg)"
KINDS = {
    "digits": Kind(8, (0.305,), (0.376,), ""),
    "mnist": Kind(28, (0.1307,), (0.3081,), "MNIST/raw/train-images-idx3-ubyte and the other three, as published"),
    "cifar10": Kind(
        32, (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768), "cifar-10-batches-py/"
    ),
    "cifar100": Kind(
        32, (0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047), "cifar-100-python/"
    ),
    "imagenet": Kind(224, *IMAGENET, FOLDERS),
    "folder": Kind(224, *IMAGENET, FOLDERS),
}


class Source(NamedTuple):
    """Images by number, and their classes."""

    load: Callable[[int], Image.Image]
    labels: np.ndarray
    name: Callable[[int], str]


def of_arrays(images: np.ndarray, labels: np.ndarray) -> Source:
    """From bytes (n, H, W) or (n, H, W, 3)."""
    return Source(lambda i: Image.fromarray(images[i]).convert("RGB"), np.asarray(labels), str)


def of_files(samples: list[tuple[str, int]]) -> Source:
    """From (path, class)."""
    paths = [path for path, _ in samples]

    def load(i: int) -> Image.Image:
        with Image.open(paths[i]) as image:
            return image.convert("RGB")

    return Source(load, np.array([label for _, label in samples]), paths.__getitem__)


def stratified(labels: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of all samples in two parts, always the same: the rest, and a share of every class (rounded)."""
    rng, taken = np.random.default_rng(0), []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        taken.append(members[: round(share * len(members))])
    taken = np.sort(np.concatenate(taken))
    return np.setdiff1d(np.arange(len(labels)), taken), taken


def embedded_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits, bytes (n, 8, 8), and their classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * (255 / 16)).round().astype(np.uint8), digits.target


def jittered(image: Image.Image) -> Image.Image:
    """Turned by up to ten degrees and shifted by up to a pixel in both directions; what comes in is black."""
    degrees = float(torch.empty(()).uniform_(-10, 10))
    left, top = torch.randint(-1, 2, (2,)).tolist()
    turned = image.rotate(degrees, Image.Resampling.BILINEAR)
    return turned.crop((left, top, left + image.width, top + image.height))


class Normalised:
    """A Pillow image -> (3, H, W) around 0. Torchvision's own steps take ten times as long for a small image."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels.float().div_(255).sub_(self.mean).div_(self.std).contiguous()


class Pictures(Dataset):
    """Some images of a source. Those to train on are an endless stream, shuffled anew on every pass, in which the
    augmentation follows from seed and position alone; an unreadable one is replaced by the next.

    Otherwise an unreadable image is None.
    """

    def __init__(self, source: Source, members: np.ndarray, transform: Callable, seed: int | None):
        self.source, self.members, self.transform, self.seed = source, members, transform, seed
        self.shuffled = None if seed is None else Shuffled(len(members), seed)
        self.skipped = torch.zeros(len(source.labels), dtype=torch.bool).share_memory_()  # of all workers

    def __len__(self) -> int:
        if self.shuffled:
            raise TypeError("the training stream has no end")
        return len(self.members)

    def read(self, i: int) -> Image.Image | None:
        try:
            return self.source.load(i)
        except Exception as error:  # Pillow raises many kinds for a damaged file
            if not self.skipped[i]:
                self.skipped[i] = True
                name, n = self.source.name(i), int(self.skipped.sum())
                print(f"skipped: {name} cannot be read ({error}); {n} so far", flush=True)
            return None

    def __getitem__(self, position: int) -> tuple[Tensor, int] | None:
        if self.shuffled is None:
            i = int(self.members[position])
            image = self.read(i)
            return None if image is None else (self.transform(image), int(self.source.labels[i]))
        for further in range(len(self.members)):
            i = int(self.members[self.shuffled(position + further)])
            if (image := self.read(i)) is not None:
                break
        else:
            raise ValueError("data.root: not one of the training images can be read")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(np.random.SeedSequence((self.seed, position)).generate_state(1)[0]))
            return self.transform(image), int(self.source.labels[i])


def readable(samples: list) -> list[Tensor] | None:
    """A batch of the images that could be read; None where there are none."""
    samples = [sample for sample in samples if sample is not None]
    return default_collate(samples) if samples else None


class Readable(DataLoader):
    """Leaves out batches of which not one image could be read."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        nothing = True
        for batch in super().__iter__():
            if batch is not None:
                nothing = False
                yield batch
        if nothing:
            raise ValueError("data.root: not one of the images to validate or test on can be read")


class ImageTask(Task):
    """Image classification.

    Args:
        name: digits (scikit-learn's, no download), torchvision's mnist, cifar10 or cifar100, or folders of files:
            folder, and imagenet, which differs in nothing but its name.
        root: where the files are, or are put: digits needs none.
        size: side in pixels to which the files of folder and imagenet are cropped; null for 224.
        val_share: share of the training part that is kept for validation, of every class.
        augment: the published augmentation of each data set: AutoAugment for cifar10 and cifar100, a random resized
            crop and flip for imagenet and folder, nothing for mnist; for digits a small turn and shift.
        batch_size: training images of a step, per process.
        eval_batch_size: the same in validation and test.
        num_workers: processes that read images; 0 reads them in the main process.
    """

    replayable = True

    def __init__(
        self,
        name: Name = "digits",
        root: str = "data",
        size: int | None = None,
        val_share: float = 0.25,
        augment: bool = True,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers)
        if not 0 < val_share < 1:
            raise ValueError(f"data.val_share={val_share} must be above 0 and below 1")
        if size is not None and name not in ("imagenet", "folder"):
            raise ValueError(f"data.size={size}: the images of {name} have {KINDS[name].size} pixels a side")
        if size is not None and size < 8:
            raise ValueError(f"data.size={size} must be at least 8")
        self.name, self.kind, self.root = name, KINDS[name], Path(root).expanduser()
        self.size, self.val_share, self.augment = size or self.kind.size, val_share, augment
        train, test, self.classes = self.sources
        rest, val = stratified(train.labels, val_share)
        self.parts = {"train": (train, rest), "val": (train, val), "test": test}
        for split, (_, members) in self.parts.items():
            if not len(members):
                raise ValueError(f"data.name={name}: no images are left for {split}; change data.val_share={val_share}")
        self.out_dims, self.sample_size = (1, len(self.classes)), (self.size, self.size)
        self.sets: dict[str, Pictures] = {}

    # ---------------------------------------------------------------------------------------------------------- data
    @cached_property
    def sources(self) -> tuple[Source, tuple[Source, np.ndarray], list[str]]:
        """The part to train and validate on; another source, and which of its images are the test; names of classes."""
        if self.name == "digits":
            images, labels = embedded_digits()
            rest, test = stratified(labels, 0.2)
            source = of_arrays(images, labels)
            return of_arrays(images[rest], labels[rest]), (source, test), [str(i) for i in range(10)]
        parts = [self._published(train) if self.name in PUBLISHED else self._folder(train) for train in (True, False)]
        if len(parts[0][1]) < 2:
            raise ValueError(f"data.root={self.root}: there is but one class, {parts[0][1][0]!r}, and nothing to tell")
        if parts[0][1] != parts[1][1]:
            odd = sorted(set(parts[0][1]) ^ set(parts[1][1]))[0]
            raise ValueError(f"data.root={self.root}: class {odd!r} is in one of the training and test folders only")
        return parts[0][0], (parts[1][0], np.arange(len(parts[1][0].labels))), parts[0][1]

    @property
    def remedy(self) -> str:
        return f"put its files there as {self.kind.where}, or say where they are with data.root=PATH"

    def _published(self, train: bool) -> tuple[Source, list[str]]:
        try:
            found = PUBLISHED[self.name](self.root, train=train, download=True)
            return of_arrays(np.asarray(found.data), np.asarray(found.targets)), list(found.classes)
        except Exception as error:  # torchvision raises many kinds where there is no network, or a damaged file
            why = str(error) or type(error).__name__
            reason = f"it cannot be read from {self.root.absolute()}, nor downloaded ({why})"
        raise ValueError(f"data.name={self.name}: {reason}; {self.remedy}")

    def _folder(self, train: bool) -> tuple[Source, list[str]]:
        names = ("train",) if train else ("test", "val")
        folder = next((self.root / name for name in names if (self.root / name).is_dir()), None)
        reason = f"there is no folder {' or '.join(names)} in {self.root.absolute()}"
        if folder:
            try:
                found = datasets.ImageFolder(str(folder))
                return of_files(found.samples), found.classes
            except OSError as error:  # a class without images, or no class at all
                reason = str(error)
        raise ValueError(f"data.name={self.name}: {reason}; {self.remedy}")

    def dataset(self, split: str) -> Pictures:
        if split not in self.sets:
            seed = self.seed if split == "train" else None
            transform = self.transform(split == "train" and self.augment)
            self.sets[split] = Pictures(*self.parts[split], transform, seed)
        return self.sets[split]

    def transform(self, augment: bool) -> Callable[[Image.Image], Tensor]:
        """A Pillow image -> (3, size, size)."""
        if self.name in ("imagenet", "folder"):
            crop = [transforms.Resize(self.size * 256 // 224), transforms.CenterCrop(self.size)]
            steps = [transforms.RandomResizedCrop(self.size), transforms.RandomHorizontalFlip()] if augment else crop
        elif augment and self.name == "digits":
            steps = [jittered]
        elif augment and self.name.startswith("cifar"):
            steps = [transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)]
        else:
            steps = []
        return transforms.Compose([*steps, Normalised(self.kind.mean, self.kind.std)])

    def _eval_dataloader(self, split: str) -> DataLoader:
        return super()._eval_dataloader(split, Readable, collate_fn=readable, num_workers=self.num_workers)

    def describe(self) -> str:
        counts = ", ".join(f"{len(members):,} {split}" for split, (_, members) in self.parts.items())
        return f"{self.name}, {len(self.classes)} classes, {self.size}x{self.size}: {counts}"

    # --------------------------------------------------------------------------------------------------------- metrics
    @torch.no_grad()
    def metrics(self, thought: Thought, batch: Batch, most_certain: bool = True) -> dict[str, Tensor]:
        """As for every classification; with 100 classes or more also `top5`."""
        values = super().metrics(thought, batch, most_certain)
        if len(self.classes) >= 100:
            answer = gather_tick(thought.predictions, answer_tick(thought.certainty, most_certain))
            values["top5"] = (answer.topk(5).indices == batch[1][:, None]).any(1).float()
        return values

    # -------------------------------------------------------------------------------------------------------- pictures
    def words(self, sample: Sample) -> tuple[str, str]:
        return self.classes[int(sample.probabilities[sample.answer].argmax())], self.classes[int(sample.batch[1])]

    def solving(self, sample: Sample, name: str) -> list:
        from tasks import figures

        mean, std = (np.array(values)[:, None, None] for values in (self.kind.mean, self.kind.std))
        pixels = (sample.batch[0] * std + mean).clip(0, 1).transpose(1, 2, 0)
        said, right = self.words(sample)
        return [
            figures.Picture(
                f"{name}-image", f"{right}, taken for {said}" if said != right else f"{right}, known as such",
                "Where attention looks while the picture is thought about, and the probabilities of the classes that"
                " are ever likely.",
                partial(
                    figures.image, pixels, self.classes, int(sample.batch[1]), sample.probabilities[:, 0],
                    sample.certainty, sample.answer, sample.attention,
                ),
            )
        ]  # fmt: skip


PUBLISHED = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
