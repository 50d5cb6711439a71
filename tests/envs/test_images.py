"""Environments seen by a camera: the same task as without, and pictures that show the state."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import rlkit2.envs  # noqa: F401 - registers the environments
from rlkit2.envs import cartpole_images, rooms
from rlkit2.envs.behaviors import make_behavior
from rlkit2.envs.builtin import builtin_recipes
from rlkit2.envs.recipe import read_recipe
from rlkit2.envs.rollouts import rollout
from rlkit2.errors import ConfigError

PAIRS = {
    "rlkit2/Rooms-v0": ({}, {"observation": "image"}, "rooms"),
    "rlkit2/GridRooms-v0": ({}, {"observation": "image"}, "grid"),
}


def episodes(env_id: str, kwargs: dict[str, Any], behavior: str) -> list[Any]:
    spec = copy.copy(gymnasium.spec(env_id))  # the registry keeps its own
    spec.kwargs = {**spec.kwargs, **kwargs}
    env = gymnasium.make(spec)
    return list(rollout(spec, lambda: make_behavior(behavior, env, epsilon=0.3), episodes=3, seed=1, max_steps=15))


@pytest.mark.parametrize("env_id", list(PAIRS))
def test_a_camera_changes_nothing_but_the_observations(env_id: str) -> None:
    plain, seen, behavior = PAIRS[env_id]
    for one, other in zip(episodes(env_id, plain, behavior), episodes(env_id, seen, behavior), strict=True):
        assert np.array_equal(one.actions, other.actions)
        assert np.array_equal(one.rewards, other.rewards)
        assert other.observations.dtype == np.uint8
        distinct = np.unique(np.asarray(one.observations).reshape(len(one.observations), -1), axis=0)
        pictures = np.unique(other.observations.reshape(len(other.observations), -1), axis=0)
        assert len(distinct) == len(pictures)  # other states look different


def test_cartpole_is_the_same_behind_the_camera() -> None:
    one, other = (episodes(name, {}, "cartpole") for name in ("CartPole-v1", "rlkit2/CartPoleImages-v0"))
    assert all(np.array_equal(a.actions, b.actions) for a, b in zip(one, other, strict=True))
    assert other[0].observations.shape[1:] == (32, 32, 1)


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        ("rlkit2/Rooms-v0", {"observation": "image"}),
        ("rlkit2/Rooms-v0", {"observation": "image_and_goal"}),
        ("rlkit2/GridRooms-v0", {"observation": "image"}),
        ("rlkit2/CartPoleImages-v0", {}),
    ],
)
def test_environments_keep_to_gymnasiums_rules(env_id: str, kwargs: dict[str, Any]) -> None:
    env = gymnasium.make(env_id, **kwargs)
    check_env(env.unwrapped, skip_render_check=True)


def test_the_red_spot_is_where_the_point_is() -> None:
    positions = np.array([[-0.51, 0.33], [0.72, -0.68]], np.float32)
    empty = rooms.camera(np.full((1, 2), 9.0, np.float32))[0].astype(int)
    axis = (np.arange(32) + 0.5) / 16 - 1
    for position, picture in zip(positions, rooms.camera(positions), strict=True):
        changed = np.abs(picture.astype(int) - empty).sum(-1)
        place = (changed.sum(0) @ axis / changed.sum(), -(changed.sum(1) @ axis) / changed.sum())
        np.testing.assert_allclose(place, position, atol=0.01)
    goal = rooms.camera(positions, np.array([0.35, 0.35]))[0]
    assert (goal != rooms.camera(positions)[0]).any()


def test_the_pole_leans_with_its_angle_and_no_picture_shows_a_velocity() -> None:
    columns = np.arange(32) - 15.5
    for angle in (-0.15, 0.0, 0.15):
        tip = cartpole_images.camera(np.array([0.3, 0.0, angle, 0.0]))[5:12, :, 0].astype(float).sum(0)
        lean = tip @ columns / tip.sum()
        assert np.sign(round(lean, 1)) == np.sign(angle)
    still, fast = (cartpole_images.camera(np.array([0.3, v, 0.1, v])) for v in (0.0, 2.0))
    assert np.array_equal(still, fast)
    moved = cartpole_images.camera(np.array([0.9, 0.0, 0.1, 0.0]))
    assert (moved != still).any()


def test_unknown_views_are_refused_and_recipes_differ_by_the_view_alone() -> None:
    with pytest.raises(ConfigError, match="observation must be one of position, image, image_and_goal, not 'smell'"):
        rooms.Rooms(observation="smell")
    with pytest.raises(ConfigError, match="observation must be 'cell' or 'image', not 'smell'"):
        gymnasium.make("rlkit2/GridRooms-v0", observation="smell")
    recipes = builtin_recipes()
    for name in (
        "rooms{}/expert-sparse-v0",
        "rooms{}/stitch-sparse-v0",
        "gridworld{}/mixed-v0",
        "cartpole{}/medium-v0",
    ):
        plain, seen = (read_recipe(recipes[f"builtin/{name.format(view)}"]) for view in ("", "-images"))
        assert (plain.seed, plain.behaviors) == (seen.seed, seen.behaviors)
