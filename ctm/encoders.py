"""Encoders: what the world shows -> tokens (B, S, E) for a CTM or a baseline to attend to.

Every encoder takes its token width first (None: features as they are, without a projection) and keeps its other
arguments in `config`, so that a checkpoint can name it and `ctm.load` can build it again.
"""

from typing import Literal

from einops import rearrange
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

Depth = Literal[18, 34, 50, 101, 152]


class Encoder(nn.Module):
    """Base of all encoders.

    Attributes:
        config: the arguments that build it again, plain values.
        width: channels of a token.
    """

    config: dict
    width: int

    def n_tokens(self, *size: int) -> int:
        """S for inputs of this size."""
        raise NotImplementedError


class Projection(nn.Sequential):
    """Features -> tokens of width E: a linear layer and LayerNorm, no activation."""

    def __init__(self, n_in: int, d_input: int):
        super().__init__(nn.Linear(n_in, d_input), nn.LayerNorm(d_input))


class ResNet(Encoder):
    """Images (B, 3, H, W) -> tokens (B, S, E): the first stages of a ResNet, one token for each place of its map.

    As published the stem does not stride (3x3 convolution, then a 2x max-pool), there is a learned 1x1 colour
    transform before it, and every weight starts from PyTorch's default initialisation.

    Args:
        d_input: E, or None for features as they are.
        depth: of the ResNet whose blocks are used.
        stages: how many of its four stages; each after the first halves the map.
        channels: colour channels of the images.
    """

    BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}

    def __init__(self, d_input: int | None, depth: Depth = 18, stages: Literal[1, 2, 3, 4] = 1, channels: int = 3):
        super().__init__()
        self.config = {"depth": depth, "stages": stages, "channels": channels}
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
        self.width = d_input or n_in
        self.project = Projection(n_in, d_input) if d_input else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        features = self.stages(self.stem(self.rgb(images)))
        return self.project(rearrange(features, "b c h w -> b (h w) c"))

    def n_tokens(self, height: int, width: int) -> int:
        for _ in range(len(self.stages)):  # the max-pool and every later stage halve, rounding up
            height, width = (height + 1) // 2, (width + 1) // 2
        return height * width


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
