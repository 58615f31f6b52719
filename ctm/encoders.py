"""Encoders: what the world shows -> what a CTM or a baseline reads: tokens (B, S, E), or ready vectors (B, E).

Every encoder takes the width E of what it gives first (None: features as they are, without a projection) and keeps
its other arguments in `config`, so that a checkpoint can name it and `ctm.load` can build it again.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

Depth = Literal[18, 34, 50, 101, 152]


class Encoder(nn.Module):
    """Base of all encoders.

    Attributes:
        config: the arguments that build it again, plain values.
        width: channels of what it gives.
        answer_ticks: of a list of reads, at how many of the last ticks an answer is due; None for all ticks.
        replayable: whether it only launches kernels, the same for every input of a shape (`ctm.ops.replay`).
    """

    config: dict
    width: int
    answer_ticks: int | None = None
    replayable: bool = False

    def n_tokens(self, *size: int) -> int:
        """S for inputs of this size."""
        raise NotImplementedError


class Projection(nn.Sequential):
    """Features -> tokens of width E: a linear layer and LayerNorm, no activation."""

    def __init__(self, n_in: int, d_input: int):
        super().__init__(nn.Linear(n_in, d_input), nn.LayerNorm(d_input))


class MapEncoder(Encoder):
    """Base of the encoders that make a map of features, one token for each of its places, row by row.

    A subclass gives `features` and calls `finish` when it knows how many channels they have.
    """

    def finish(self, d_input: int | None, n_features: int, position: nn.Module | None) -> None:
        self.position = position
        self.width = d_input or n_features
        self.project = Projection(n_features, d_input) if d_input else nn.Identity()

    def features(self, x: Tensor) -> Tensor:
        """(B, channels, *map)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        if self.position is not None:
            features = features + self.position(features)
        return self.project(features.flatten(2).mT)


# ----------------------------------------------------------------------------------------------------------------------
# Where a feature is: added to the features of a map


class FourierPosition(nn.Module):
    """Learnable Fourier features of the place (arXiv 2106.02795), for maps (B, C, H, W) -> (C, H, W).

    Frequencies start from a normal distribution of standard deviation gamma^-2, as the published code has it (the
    paper it follows says gamma^-1).
    """

    WIDTH = 256

    def __init__(self, n_features: int, gamma: float = 0.4):
        super().__init__()
        self.frequencies = nn.Linear(2, self.WIDTH // 2, bias=False)
        nn.init.normal_(self.frequencies.weight, std=gamma**-2)
        n_hidden = self.WIDTH // 2
        self.mlp = nn.Sequential(
            nn.Linear(self.WIDTH, n_hidden), nn.GLU(), nn.Linear(n_hidden // 2, n_features), nn.LayerNorm(n_features)
        )

    def forward(self, features: Tensor) -> Tensor:
        rows, columns = (
            torch.arange(n, device=features.device, dtype=self.frequencies.weight.dtype) / max(n - 1, 1)
            for n in features.shape[-2:]
        )
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        angles = self.frequencies(torch.stack([x, y], dim=-1))
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1) / math.sqrt(self.WIDTH)
        return rearrange(self.mlp(waves), "h w c -> c h w")


class MultiFourierPosition(nn.Module):
    """Ten `FourierPosition`s of different scales, weighted by a learned softmax."""

    def __init__(self, n_features: int):
        super().__init__()
        self.mix = nn.Parameter(torch.ones(10))
        self.scales = nn.ModuleList(FourierPosition(n_features, float(gamma)) for gamma in np.linspace(1.0, 0.1, 10))

    def forward(self, features: Tensor) -> Tensor:
        return sum(weight * scale(features) for weight, scale in zip(self.mix.softmax(0), self.scales, strict=True))


def half_turn(n: int, start: Tensor) -> Tensor:
    """A vector (2,) turned by n angles from 0 to 180 degrees, both included: (n, 2)."""
    angles = torch.deg2rad(torch.linspace(0, 180, n, device=start.device, dtype=start.dtype))
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([cos * start[0] - sin * start[1], sin * start[0] + cos * start[1]], dim=-1)


class RotationPosition(nn.Module):
    """The row and the column as two turned copies of a learned vector, for maps (B, C, H, W) -> (C, H, W)."""

    def __init__(self, n_features: int):
        super().__init__()
        self.start = nn.Parameter(torch.tensor([0.0, 1.0]))
        self.project = nn.Linear(4, n_features)

    def forward(self, features: Tensor) -> Tensor:
        height, width = features.shape[-2:]
        rows, columns = half_turn(height, self.start), half_turn(width, self.start)
        places = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1)
        return rearrange(self.project(places), "h w c -> c h w")


class RotationPosition1d(nn.Module):
    """The place in a sequence as a turned vector, for sequences (B, C, L) -> (C, L)."""

    def __init__(self, n_features: int):
        super().__init__()
        self.project = nn.Linear(2, n_features)
        self.register_buffer("start", torch.tensor([0.0, 1.0]), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.project(half_turn(features.shape[-1], self.start)).mT


MapPosition = Literal["none", "learnable-fourier", "multi-learnable-fourier", "rotational"]
SequencePosition = Literal["none", "rotational-1d"]
POSITIONS: dict[str, Callable[[int], nn.Module | None]] = {
    "none": lambda n_features: None,
    "learnable-fourier": FourierPosition,
    "multi-learnable-fourier": MultiFourierPosition,
    "rotational": RotationPosition,
    "rotational-1d": RotationPosition1d,
}


# ----------------------------------------------------------------------------------------------------------------------
# Images


class ResNet(MapEncoder):
    """Images (B, channels, H, W) -> tokens: the first stages of a ResNet.

    As published the stem does not stride (3x3 convolution, then a 2x max-pool), there is a learned 1x1 colour
    transform before it, and every weight starts from PyTorch's default initialisation.

    Args:
        d_input: E, or None for features as they are.
        depth: of the ResNet whose blocks are used.
        stages: how many of its four stages; each after the first halves the map.
        channels: colour channels of the images.
        position: position embedding of the features.
    """

    # As published: depth 152 has four blocks in its second stage, not the usual eight (the released model's 185,989,886
    # parameters say so, too).
    BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 4, 36, 3]}

    replayable = True

    def __init__(
        self,
        d_input: int | None,
        depth: Depth = 18,
        stages: Literal[1, 2, 3, 4] = 1,
        channels: int = 3,
        position: MapPosition = "none",
    ):
        super().__init__()
        self.config = {"depth": depth, "stages": stages, "channels": channels, "position": position}
        self.rgb = nn.Conv2d(channels, 3, kernel_size=1)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        block = BasicBlock if depth < 50 else Bottleneck
        self.stages = nn.Sequential()
        n_in = 64
        for stage, n_blocks in enumerate(self.BLOCKS[depth][:stages]):
            planes, stride = 64 * 2**stage, 1 if stage == 0 else 2
            blocks = nn.Sequential()
            for _ in range(n_blocks):
                n_out = planes * block.expansion
                skip = None
                if stride != 1 or n_in != n_out:
                    skip = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
                blocks.append(block(n_in, planes, stride, skip))
                n_in, stride = n_out, 1
            self.stages.append(blocks)
        self.finish(d_input, n_in, POSITIONS[position](n_in))

    def features(self, images: Tensor) -> Tensor:
        if images.is_cuda:  # the layout that tensor cores want
            images = images.contiguous(memory_format=torch.channels_last)
        return self.stages(self.stem(self.rgb(images)))

    def n_tokens(self, height: int, width: int) -> int:
        for _ in range(len(self.stages)):  # the max-pool and every later stage halve, rounding up
            height, width = (height + 1) // 2, (width + 1) // 2
        return height * width


class ShallowWide(MapEncoder):
    """Images (B, channels, H, W) -> tokens: two wide gated convolutions, the first with stride 2."""

    replayable = True

    def __init__(self, d_input: int | None, channels: int = 3, position: MapPosition = "none"):
        super().__init__()
        self.config = {"channels": channels, "position": position}
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 4096, kernel_size=3, stride=2, padding=1),
            nn.GLU(dim=1),
            nn.BatchNorm2d(2048),
            nn.Conv2d(2048, 4096, kernel_size=3, padding=1, groups=32),
            nn.GLU(dim=1),
            nn.BatchNorm2d(2048),
        )
        self.finish(d_input, 2048, POSITIONS[position](2048))

    def features(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def n_tokens(self, height: int, width: int) -> int:
        return ((height + 1) // 2) * ((width + 1) // 2)


# ----------------------------------------------------------------------------------------------------------------------
# Sequences and vectors


class Parity(MapEncoder):
    """Sequences of -1 and 1 (B, L) -> L tokens: an embedding of each value, and its place.

    Args:
        d_input: E.
        position: embedding of the place.
        place_gain: how many times larger than published the place's part starts. Neighbours differ by half a turn / L,
            little beside the difference of two values.

    Raises:
        ValueError: without a width, or for a gain of no place.
    """

    replayable = True

    def __init__(self, d_input: int, position: SequencePosition = "rotational-1d", place_gain: float = 1.0):
        super().__init__()
        if not d_input:
            raise ValueError("a sequence has no features without an embedding: give model.ff.d_input")
        if place_gain <= 0 or (place_gain != 1 and position == "none"):
            raise ValueError(f"model.encoder.place_gain={place_gain} must be above 0, and is for a position embedding")
        self.config = {"position": position, "place_gain": place_gain}
        self.embedding = nn.Embedding(2, d_input)
        self.finish(d_input, d_input, POSITIONS[position](d_input))
        if self.position is not None:
            with torch.no_grad():
                self.position.project.weight.mul_(place_gain)

    def features(self, values: Tensor) -> Tensor:
        return self.embedding((values == 1).long()).mT

    def n_tokens(self, length: int) -> int:
        return length


class Vector(Encoder):
    """Vectors (B, E) as they are, for a model without attention (the published sorting task)."""

    def __init__(self, d_input: int):
        super().__init__()
        self.config, self.width = {}, d_input

    def forward(self, values: Tensor) -> Tensor:
        return values


class QAMNIST(Encoder):
    """Digits, then a question about them, then silence: one read for every tick.

    Digits are attended to. A part of the question is read as a vector: by turns the index of a digit (a fixed
    sinusoid) and an operator (an embedding). While the answer is due, the vector is zero.

    Args:
        d_input: E.
        digit_ticks: ticks that each digit is shown.
        question_ticks: ticks that each part of the question is shown.
        answer_ticks: ticks of silence at the end.
        project_question: whether parts of the question go through the projection of the tokens, too (as published
            for the LSTM baseline).
        channels: of the pictures of digits.
    """

    MAX_DIGITS = 50

    def __init__(
        self,
        d_input: int,
        digit_ticks: int = 10,
        question_ticks: int = 10,
        answer_ticks: int = 10,
        project_question: bool = False,
        channels: int = 1,
    ):
        super().__init__()
        self.config = {
            "digit_ticks": digit_ticks,
            "question_ticks": question_ticks,
            "answer_ticks": answer_ticks,
            "project_question": project_question,
            "channels": channels,
        }
        for name, value in self.config.items():
            if value < 1 and name.endswith("_ticks"):
                raise ValueError(f"model.encoder.{name}={value} must be at least 1")
        self.width, self.answer_ticks = d_input, answer_ticks
        self.digit = nn.Sequential()
        for n_in in (channels, d_input):
            self.digit.extend([nn.Conv2d(n_in, d_input, 3, padding=1), nn.BatchNorm2d(d_input), nn.ReLU()])
            self.digit.append(nn.MaxPool2d(2))
        self.register_buffer("index", sinusoids(self.MAX_DIGITS, d_input))
        self.operator = nn.Embedding(2, d_input)
        self.project = Projection(d_input, d_input)

    def forward(self, digits: Tensor, question: Tensor) -> list[Tensor]:
        """Digits (B, N, channels, H, W) and question (B, Q): by turns an index from 0 and -1 for plus, -2 for minus."""
        reads = []
        for digit in digits.unbind(1):  # one by one: in training each has its own batch statistics, as published
            reads += [self.project(self.digit(digit).flatten(2).mT)] * self.config["digit_ticks"]
        for i, part in enumerate(question.unbind(1)):
            read = self.index[part] if i % 2 == 0 else self.operator(-part - 1)
            read = self.project(read) if self.config["project_question"] else read
            reads += [read] * self.config["question_ticks"]
        return reads + [reads[-1].new_zeros(len(digits), self.width)] * self.config["answer_ticks"]

    def n_tokens(self, height: int, width: int) -> int:
        return (height // 4) * (width // 4)


def sinusoids(n: int, width: int) -> Tensor:
    """Sines (even channels) and cosines (odd) of the place, wavelengths from 2 pi to 20,000 pi: (n, width)."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
    angles = torch.arange(n)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def gated(n_in: int, n_out: int) -> list[nn.Module]:
    return [nn.Linear(n_in, 2 * n_out), nn.GLU(), nn.LayerNorm(n_out)]


class ClassicControl(Encoder):
    """Observations (B, n_in) of a control problem -> vectors (B, E)."""

    def __init__(self, d_input: int, n_in: int = 4):
        super().__init__()
        self.config, self.width = {"n_in": n_in}, d_input
        self.layers = nn.Sequential(nn.Flatten(), *gated(n_in, d_input), *gated(d_input, d_input))

    def forward(self, observation: Tensor) -> Tensor:
        return self.layers(observation)


class MiniGrid(Encoder):
    """Symbolic MiniGrid views (B, 7, 7, 3) of objects, colours and states -> vectors (B, E).

    Args:
        d_input: E, the width of all 49 cells together.
    """

    CELLS = 49

    def __init__(self, d_input: int):
        super().__init__()
        if d_input % self.CELLS:
            raise ValueError(f"d_input={d_input} must be a multiple of the {self.CELLS} cells of a view")
        self.config, self.width = {}, d_input
        self.object, self.color, self.state = nn.Embedding(11, 8), nn.Embedding(6, 8), nn.Embedding(3, 8)
        self.place = nn.Embedding(self.CELLS, 8)
        width = d_input // self.CELLS
        self.layers = nn.Sequential(*gated(32, width), *gated(width, width))

    def forward(self, view: Tensor) -> Tensor:
        object_, color, state = view.long().flatten(1, 2).unbind(-1)
        place = self.place.weight.expand(len(view), -1, -1)
        cells = torch.cat([self.object(object_), self.color(color), self.state(state), place], dim=-1)
        return self.layers(cells).flatten(1)


# ----------------------------------------------------------------------------------------------------------------------


def describe(encoder: Encoder) -> dict:
    """The encoder as plain values; `build` makes it again."""
    return {"name": type(encoder).__name__, **encoder.config}


def build(d_input: int | None, name: str, **config) -> Encoder:
    """An encoder of this module by its class name.

    Raises:
        ValueError: where there is no such encoder.
    """
    kind = globals().get(name)
    if not (isinstance(kind, type) and issubclass(kind, Encoder)):
        raise ValueError(f"there is no encoder {name!r} in ctm.encoders")
    return kind(d_input, **config)
