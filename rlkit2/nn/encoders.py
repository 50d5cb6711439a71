"""Convolutional encoders for all seeds at once, in front of a `StackedMLP`.

Observations stay flat rows `[S, B, obs]` everywhere but here: an `Image` says which columns of a row are one, in bytes 0 to 255. The other
columns (vectors of a Dict, actions beside an observation) pass the encoder by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlkit2.errors import ConfigError
from rlkit2.nn.mlp import StackedMLP, named_tensors
from rlkit2.nn.random import uniform
from rlkit2.nn.transformer import DecisionTransformer

BRIGHTEST = 255.0
NATURE = (
    (36, ((32, 8, 4), (64, 4, 2), (64, 3, 1))),
    (16, ((16, 4, 2), (32, 3, 2), (32, 3, 1))),
    (5, ((16, 3, 1), (32, 3, 1))),
)
"""Channels, kernel and stride of every convolution, by the least side of the image; the first is that of Mnih et al. (Nature, 2015)."""
IMPALA = (16, 32, 32)
"""Channels of the stages of Espeholt et al. (ICML 2018), here with one residual block each."""


@dataclass(frozen=True)
class Image:
    """Columns `start` to `start + numel` of a flat observation that are an image.

    `shape`: as it is stored: `[H, W]`, `[H, W, C]` or `[C, H, W]` (channels are on the shorter one of the outer axes, in doubt on the last), or
    a stack of those, `[n, H, W, C]` or `[n, C, H, W]`, whose frames count as channels.
    """

    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """The column behind the last one."""
        return self.start + math.prod(self.shape)

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """The shape as (channels in front, height, width, channels behind)."""
        frames, shape = (self.shape[0], self.shape[1:]) if len(self.shape) == 4 else (1, self.shape)
        if len(shape) == 2:
            return frames, shape[0], shape[1], 1
        if shape[0] < shape[2]:
            return frames * shape[0], shape[1], shape[2], 1
        return frames, shape[0], shape[1], shape[2]

    @property
    def channels(self) -> int:
        """C, frames of a stack included."""
        return self.sides[0] * self.sides[3]

    def of(self, rows: Tensor) -> Tensor:
        """The image in flat `rows [..., obs]`, `[..., channels in front, H, W, channels behind]`, as a view."""
        return rows[..., self.start : self.stop].view(*rows.shape[:-1], *self.sides)

    def planes(self, rows: Tensor) -> Tensor:
        """The image in `rows [S, B, obs]` as `[S, B, C, H, W]`."""
        return self.of(rows).movedim(-1, 3).flatten(2, 3)


def as_rows(observations: Tensor, encoder: Mapping[str, Any] | None) -> Tensor:
    """Observations `[..., *shape]` of one image, of which `choose_encoder` says `encoder`, as rows `[..., obs]`; rows and all else unchanged."""
    if encoder is None or len(encoder["images"]) != 1:
        return observations
    shape = tuple(encoder["images"][0][1])
    return observations.flatten(-len(shape)) if observations.shape[-len(shape) :] == shape else observations


@dataclass(frozen=True)
class Plan:
    """An encoder before it is built.

    `shapes`: channels in and out and kernel of every convolution. `outputs`: numbers its layers put out for one image.
    """

    shapes: tuple[tuple[int, int, int], ...]
    features: int
    outputs: int

    @property
    def weights(self) -> int:
        """Weights and biases of one seed."""
        return sum(out * (channels * kernel**2 + 1) for channels, out, kernel in self.shapes)


class Encoder(nn.Module):
    """Images to features, for S seeds.

    Args:
        image: what it encodes.
        seeds: as for `StackedMLP`; `stream` names the encoder.

    Weights `weights.{i} [S, out, in, k, k]` and biases `biases.{i} [S, out]` start as those of `torch.nn.Conv2d`: uniform in +-1/sqrt(in k k).
    A layer is one grouped convolution, a group a seed.
    """

    def __init__(
        self,
        image: Image,
        *,
        seeds: Sequence[int],
        stream: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.plan, self.dtype = self.plan_of(image), dtype
        keys = torch.tensor(list(seeds), device=device)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, (channels, out, kernel) in enumerate(self.plan.shapes):
            bound = 1.0 / math.sqrt(channels * kernel**2)
            for kept, name, shape in (
                (self.weights, "weight", (out, channels, kernel, kernel)),
                (self.biases, "bias", (out,)),
            ):
                drawn = uniform((len(keys), *shape), keys, stream=f"{stream}.{i}.{name}")
                kept.append(nn.Parameter(((2.0 * drawn - 1.0) * bound).to(dtype)))

    @staticmethod
    def plan_of(image: Image) -> Plan:
        """Its sizes.

        Raises:
            ConfigError: the image is too small.
        """
        raise NotImplementedError

    def maps(self, inputs: Tensor) -> Tensor:
        """Feature maps `[B, S * out, h, w]` of `inputs [B, S * C, H, W]` in 0 to 1."""
        raise NotImplementedError

    def convolve(self, index: int, inputs: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        """Layer `index` of `inputs [B, S * in, H, W]`."""
        weight, bias = self.weights[index], self.biases[index]
        return F.conv2d(inputs, weight.flatten(0, 1), bias.flatten(), stride, padding, groups=len(weight))

    def forward(self, planes: Tensor) -> Tensor:
        """Features `[S, B, features]` of `planes [S, B, C, H, W]`, bytes 0 to 255."""
        seeds, rows = planes.shape[:2]
        inputs = planes.transpose(0, 1).flatten(1, 2).to(self.dtype) / BRIGHTEST
        return self.maps(inputs).reshape(rows, seeds, -1).transpose(0, 1)


class NatureEncoder(Encoder):
    """Two or three convolutions with ReLU; see `NATURE`."""

    @staticmethod
    def layers(image: Image) -> tuple[tuple[int, int, int], ...]:
        """Channels, kernel and stride of every convolution."""
        _, height, width, _ = image.sides
        for least, layers in NATURE:
            if min(height, width) >= least:
                return layers
        raise ConfigError(
            f"images of {height} x {width} are too small for encoder = 'nature', which needs {least} x {least}; use 'impala' or 'none'"
        )

    @staticmethod
    def plan_of(image: Image) -> Plan:
        """Its sizes."""
        _, height, width, _ = image.sides
        channels, shapes, outputs = image.channels, [], 0
        for out, kernel, stride in NatureEncoder.layers(image):
            shapes.append((channels, out, kernel))
            channels, height, width = out, (height - kernel) // stride + 1, (width - kernel) // stride + 1
            outputs += channels * height * width
        return Plan(tuple(shapes), channels * height * width, outputs)

    def __init__(self, image: Image, **options: Any) -> None:
        super().__init__(image, **options)
        self.strides = [stride for _, _, stride in self.layers(image)]

    def maps(self, inputs: Tensor) -> Tensor:
        """See `Encoder.maps`."""
        for i, stride in enumerate(self.strides):
            inputs = self.convolve(i, inputs, stride).relu()
        return inputs


class ImpalaEncoder(Encoder):
    """Three stages of a convolution, max pooling by two and a residual block; see `IMPALA`."""

    @staticmethod
    def plan_of(image: Image) -> Plan:
        """Its sizes."""
        _, height, width, _ = image.sides
        channels, shapes, outputs = image.channels, [], 0
        for out in IMPALA:
            shapes += [(channels, out, 3), (out, out, 3), (out, out, 3)]
            outputs += out * height * width
            channels, height, width = out, (height + 1) // 2, (width + 1) // 2
            outputs += 5 * out * height * width
        return Plan(tuple(shapes), channels * height * width, outputs)

    def maps(self, inputs: Tensor) -> Tensor:
        """See `Encoder.maps`."""
        for first in range(0, len(self.weights), 3):
            inputs = F.max_pool2d(self.convolve(first, inputs, padding=1), 3, 2, 1)
            residual = self.convolve(first + 1, inputs.relu(), padding=1)
            inputs = inputs + self.convolve(first + 2, residual.relu(), padding=1)
        return inputs.relu()


class PixelEncoder(Encoder):
    """The pixels as they are, in 0 to 1."""

    @staticmethod
    def plan_of(image: Image) -> Plan:
        """Its sizes."""
        return Plan((), math.prod(image.shape), math.prod(image.shape))

    def maps(self, inputs: Tensor) -> Tensor:
        """See `Encoder.maps`."""
        return inputs


ENCODERS: dict[str, type[Encoder]] = {"nature": NatureEncoder, "impala": ImpalaEncoder, "none": PixelEncoder}


def choose_encoder(name: str, images: Sequence[Image]) -> dict[str, Any] | None:
    """What `make_network` needs to build the encoder of these images, as JSON values; None where there are none.

    Args:
        name: a key of `ENCODERS`, or "auto": nature where every image is large enough, else none.
        images: of an observation.
    """
    if not images:
        return None
    if name == "auto":
        name = "nature" if min(min(image.sides[1:3]) for image in images) >= NATURE[-1][0] else "none"
    return {"name": name, "images": [[image.start, list(image.shape)] for image in images]}


class BorrowedEncoder(nn.Module):
    """The encoder of another network: it is looked through, and trained and kept there."""

    def __init__(self, lender: nn.Module) -> None:
        super().__init__()
        self._lender = (lender,)  # a tuple, so that its parameters are not among those of this module

    @property
    def lender(self) -> nn.Module:
        """The encoder itself."""
        return self._lender[0]

    @torch.no_grad()
    def forward(self, planes: Tensor) -> Tensor:
        """Its features, without gradient."""
        found: Tensor = self.lender(planes)
        return found


class EncodedMLP(nn.Module):
    """Encoders of the images in a row, and a `StackedMLP` on their features and the other columns.

    Args:
        images: where they are in the inputs `[S, B, in]`, in the order of their columns.
        encoders: one an image: `[S, B, C, H, W]` in bytes to `[S, B, features]`, every parameter led by the seed axis.
        head: the rest of the network; members share the encoders.
    """

    def __init__(self, images: Sequence[Image], encoders: Sequence[nn.Module], head: StackedMLP) -> None:
        super().__init__()
        self.images, self.encoders, self.head = tuple(images), nn.ModuleList(encoders), head

    def forward(self, inputs: Tensor, *, frozen: bool = False) -> Tensor:
        """Outputs for `inputs [S, B, in]`, uint8 or floating, in the shapes of the head's; `frozen`: no gradient of the weights."""
        found: Tensor = self.head(self._encoded(inputs, frozen), frozen=frozen)
        return found

    def features(self, inputs: Tensor) -> Tensor:
        """The head's last hidden layer at `inputs`, as `StackedMLP.features`."""
        return self.head.features(self._encoded(inputs, frozen=True))

    def _encoded(self, inputs: Tensor, frozen: bool) -> Tensor:
        """Features of the images and the other columns, `[S, B, n]`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            parts = [encode(image.planes(inputs)) for image, encode in zip(self.images, self.encoders, strict=True)]
        column = 0
        for image in self.images:
            if image.start > column:
                parts.append(inputs[..., column : image.start])
            column = image.stop
        if column < inputs.shape[-1]:
            parts.append(inputs[..., column:])
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0].contiguous()

    def borrow(self, other: EncodedMLP) -> None:
        """From now on look through the encoders of `other`, which alone trains them."""
        self.encoders = nn.ModuleList(BorrowedEncoder(encoder) for encoder in other.encoders)

    @property
    def kept_encoders(self) -> nn.ModuleList:
        """The encoders, those of other networks, too."""
        return nn.ModuleList(part.lender if isinstance(part, BorrowedEncoder) else part for part in self.encoders)

    def named_views(self) -> dict[str, Tensor]:
        """The tensors of the encoders, then those of the head."""
        encoders = {f"encoders.{name}": parameter.detach() for name, parameter in self.kept_encoders.named_parameters()}
        return {**encoders, **{f"head.{name}": tensor for name, tensor in named_tensors(self.head).items()}}


def make_network(
    input_size: int,
    hidden_sizes: Sequence[int],
    output_size: int | None = None,
    *,
    encoder: Mapping[str, Any] | None = None,
    stream: str = "",
    **options: Any,
) -> StackedMLP | EncodedMLP:
    """A `StackedMLP`, behind an encoder where the inputs hold images.

    Args:
        input_size, hidden_sizes, output_size, stream, options: as for `StackedMLP`.
        encoder: what `choose_encoder` says.

    Raises:
        ConfigError: the images are too small for the encoder.
    """
    if encoder is None:
        return StackedMLP(input_size, hidden_sizes, output_size, stream=stream, **options)
    images = images_of(encoder)
    placement = {name: options[name] for name in ("seeds", "dtype", "device") if name in options}
    kind = ENCODERS[encoder["name"]]
    made = [kind(image, stream=f"{stream}.encoder{i}", **placement) for i, image in enumerate(images)]
    head = StackedMLP(encoded_size(input_size, encoder), hidden_sizes, output_size, stream=stream, **options)
    return EncodedMLP(images, made, head)


def images_of(encoder: Mapping[str, Any]) -> list[Image]:
    """The images of what `choose_encoder` says."""
    return [Image(start, tuple(shape)) for start, shape in encoder["images"]]


def plans_of(encoder: Mapping[str, Any] | None) -> list[Plan]:
    """What an encoder will be, one plan an image; empty for None."""
    return [] if encoder is None else [ENCODERS[encoder["name"]].plan_of(image) for image in images_of(encoder)]


def encoded_size(input_size: int, encoder: Mapping[str, Any] | None) -> int:
    """Inputs of the MLP behind an encoder: features in place of the pixels."""
    if encoder is None:
        return input_size
    pixels = sum(math.prod(image.shape) for image in images_of(encoder))
    return input_size - pixels + sum(plan.features for plan in plans_of(encoder))


def can_be_rebuilt(network: nn.Module) -> bool:
    """Whether a saved policy on this network needs no code but rlkit2's."""
    if isinstance(network, EncodedMLP):
        return all(type(part) in ENCODERS.values() for part in network.kept_encoders)
    return isinstance(network, StackedMLP | DecisionTransformer)


def random_shift(rows: Tensor, images: Sequence[Image], pixels: int, draws: Tensor) -> Tensor:
    """Rows `[S, B, obs]` whose images are moved by up to `pixels` up, down, left and right, edges repeated.

    All images of a row move alike, and so do all frames and channels of an image. Source: Kostrikov, Yarats, Fergus, "Image Augmentation Is All You
    Need" (ICLR 2021).

    Args:
        draws: uniform numbers in (0, 1), `[S, B, 2]`.
    """
    shift = ((2 * pixels + 1) * draws).floor().to(torch.int64).clamp(max=2 * pixels) - pixels
    moved = rows.clone()
    for image in images:
        source, target = image.of(rows), image.of(moved)
        for axis, which in ((3, 0), (4, 1)):
            side = source.shape[axis]
            index = torch.arange(side, device=rows.device) + shift[..., which, None]
            shape = [*index.shape[:2], *(side if i == axis else 1 for i in range(2, source.ndim))]
            index = index.clamp(0, side - 1).view(shape).expand_as(source)
            source = source.gather(axis, index)
        target.copy_(source)
    return moved
