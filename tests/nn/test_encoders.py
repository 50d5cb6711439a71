"""Encoders of images: all seeds at once as one after the other by torch's own layers, shapes, and the random shift."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from rlkit2.errors import ConfigError
from rlkit2.nn import EncodedMLP, Image, as_rows, choose_encoder, make_network, random_shift
from rlkit2.nn.encoders import ENCODERS, ImpalaEncoder, NatureEncoder, encoded_size

SEEDS = (3, 0, 8)


def rows_of(seeds: int, rows: int, size: int) -> Tensor:
    return torch.randint(0, 256, (seeds, rows, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def network(image: Image, name: str, seeds: Any = SEEDS, extra: int = 0) -> EncodedMLP:
    size = image.stop + extra
    made = make_network(size, (8,), 2, encoder=choose_encoder(name, [image]), seeds=seeds, dtype=torch.float64)
    assert isinstance(made, EncodedMLP)
    return made


def plain_features(encoder: Any, seed: int, pixels: Tensor) -> Tensor:
    """What one seed's convolutions make of `[B, C, H, W]` in 0 to 1, by torch's functions for one network."""
    weights = [(w[seed], b[seed]) for w, b in zip(encoder.weights, encoder.biases, strict=True)]
    if isinstance(encoder, NatureEncoder):
        for (w, b), stride in zip(weights, encoder.strides, strict=True):
            pixels = F.conv2d(pixels, w, b, stride).relu()
        return pixels.flatten(1)
    for i in range(0, len(weights), 3):
        pixels = F.max_pool2d(F.conv2d(pixels, *weights[i], padding=1), 3, 2, 1)
        inner = F.conv2d(pixels.relu(), *weights[i + 1], padding=1).relu()
        pixels = pixels + F.conv2d(inner, *weights[i + 2], padding=1)
    return pixels.relu().flatten(1)


@pytest.mark.parametrize("shape", [(16, 16, 3), (3, 17, 16), (7, 9), (2, 9, 8, 3)])
@pytest.mark.parametrize("name", ["nature", "impala"])
def test_all_seeds_at_once_are_as_one_after_the_other(shape: tuple[int, ...], name: str) -> None:
    image = Image(0, shape)
    stacked, inputs = network(image, name), rows_of(len(SEEDS), 5, image.stop)
    outputs = stacked(inputs)
    (encoder,) = stacked.encoders
    planes = image.planes(inputs).double() / 255.0
    for k, seed in enumerate(SEEDS):
        features = plain_features(encoder, k, planes[k])
        torch.testing.assert_close(encoder(image.planes(inputs))[k], features, rtol=1e-12, atol=1e-14)
        alone = network(image, name, [seed])
        torch.testing.assert_close(alone(inputs[k : k + 1])[0], outputs[k], rtol=1e-12, atol=1e-14)


def test_the_gradient_of_a_seed_is_its_own() -> None:
    image = Image(0, (8, 8, 1))
    stacked, inputs = network(image, "nature"), rows_of(len(SEEDS), 4, image.stop)
    stacked(inputs)[1].square().sum().backward()
    for parameter in stacked.parameters():
        assert parameter.grad is not None
        sizes = parameter.grad.flatten(1).abs().sum(1)
        assert sizes[1] > 0
        assert sizes[[0, 2]].sum() == 0


@pytest.mark.parametrize("name", list(ENCODERS))
@pytest.mark.parametrize("side", [5, 15, 16, 35, 36])
def test_a_plan_says_what_the_encoder_puts_out(name: str, side: int) -> None:
    image = Image(2, (side, side + 1, 2))
    encoder = ENCODERS[name](image, seeds=[0], stream="x")
    planes = image.planes(rows_of(1, 1, image.stop))
    assert encoder(planes).shape == (1, 1, encoder.plan.features)
    assert encoder.plan.weights == sum(parameter.numel() for parameter in encoder.parameters())
    assert encoded_size(image.stop + 3, choose_encoder(name, [image])) == encoder.plan.features + 5


def test_columns_beside_the_image_pass_by() -> None:
    image = Image(2, (8, 8, 1))
    stacked = network(image, "none", extra=3)
    inputs = rows_of(3, 4, image.stop + 3).double()
    expected = torch.cat([inputs[..., 2:66] / 255.0, inputs[..., :2], inputs[..., 66:]], -1)
    torch.testing.assert_close(stacked(inputs), stacked.head(expected))
    inputs.requires_grad_()
    stacked(inputs, frozen=True).sum().backward()
    assert inputs.grad is not None
    assert inputs.grad[..., 66:].abs().sum() > 0
    assert all(parameter.grad is None for parameter in stacked.parameters())


def test_channels_are_found_on_either_side_and_frames_of_a_stack_are_channels() -> None:
    assert Image(0, (84, 84, 4)).sides == (1, 84, 84, 4)
    assert Image(0, (4, 84, 84)).sides == (4, 84, 84, 1)
    assert Image(0, (84, 80)).sides == (1, 84, 80, 1)
    assert Image(0, (4, 84, 80, 3)).sides == (4, 84, 80, 3)
    assert Image(0, (4, 3, 84, 80)).sides == (12, 84, 80, 1)
    frames = rows_of(1, 1, 2 * 5 * 6 * 3).view(1, 1, 2, 5, 6, 3)
    planes = Image(0, (2, 5, 6, 3)).planes(frames.flatten(2))
    torch.testing.assert_close(planes[0, 0, 4], frames[0, 0, 1, :, :, 1])


def test_rows_are_found_in_any_shape() -> None:
    seen = choose_encoder("none", [Image(0, (4, 5, 1))])
    assert as_rows(torch.zeros(2, 3, 4, 5, 1), seen).shape == (2, 3, 20)
    assert as_rows(torch.zeros(3, 20), seen).shape == (3, 20)
    assert as_rows(torch.zeros(3, 5, 4, 1), seen).shape == (3, 5, 4, 1)
    assert as_rows(torch.zeros(2, 3, 4, 5, 1), None).shape == (2, 3, 4, 5, 1)


def test_auto_takes_what_fits_and_a_small_image_is_refused_by_name() -> None:
    assert choose_encoder("auto", []) is None
    assert choose_encoder("auto", [Image(0, (36, 36, 3))])["name"] == "nature"  # type: ignore[index]
    assert choose_encoder("auto", [Image(0, (4, 36, 4))])["name"] == "none"  # type: ignore[index]
    with pytest.raises(ConfigError, match="4 x 36 are too small for encoder = 'nature', which needs 5 x 5; use"):
        network(Image(0, (4, 36, 4)), "nature")
    assert network(Image(0, (1, 2, 4)), "impala")(rows_of(3, 1, 8)).shape == (3, 1, 2)
    assert ImpalaEncoder.plan_of(Image(0, (84, 84, 3))).features == 11 * 11 * 32
    assert NatureEncoder.plan_of(Image(0, (84, 84, 4))).features == 3136


@settings(max_examples=30)
@given(
    st.sampled_from([(6, 7), (6, 7, 2), (2, 6, 7), (2, 6, 7, 3)]), st.integers(0, 3), st.floats(0, 1), st.floats(0, 1)
)
def test_a_shift_moves_every_channel_by_the_same_pixels(
    shape: tuple[int, ...], pixels: int, first: float, second: float
) -> None:
    image = Image(1, shape)
    rows = rows_of(1, 2, image.stop + 1)
    draws = torch.tensor([[[first, second], [0.5, 0.5]]], dtype=torch.float64)
    moved = random_shift(rows, [image], pixels, draws)
    planes, found = image.planes(rows), image.planes(moved)
    down, right = (min(int((2 * pixels + 1) * draw), 2 * pixels) - pixels for draw in (first, second))
    for y in range(6):
        for x in range(7):
            source = planes[0, 0, :, min(max(y + down, 0), 5), min(max(x + right, 0), 6)]
            assert torch.equal(found[0, 0, :, y, x], source)
    assert torch.equal(found[0, 1], planes[0, 1])  # the middle of the range is no shift
    assert torch.equal(moved[..., 0], rows[..., 0])
    assert torch.equal(moved[..., -1], rows[..., -1])
