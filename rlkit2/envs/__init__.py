"""Environments of our own, behaviour policies and the built-in datasets. Importing this package registers the environments."""

from __future__ import annotations

import gymnasium

from rlkit2.envs.gridworld import GridTables, four_rooms_tables

__all__ = ["GridTables", "four_rooms_tables"]

# id -> (entry point, vector entry point, time limit, arguments)
_ENVIRONMENTS: dict[str, tuple[str, str | None, int, dict[str, str]]] = {
    "rlkit2/Rooms-v0": ("rooms:RoomsEnv", "rooms:RoomsVectorEnv", 100, {}),
    "rlkit2/RoomsDense-v0": ("rooms:RoomsEnv", "rooms:RoomsVectorEnv", 100, {"reward": "dense"}),
    "rlkit2/NoisyRooms-v0": ("noisy_rooms:NoisyRoomsEnv", "noisy_rooms:NoisyRoomsVectorEnv", 100, {}),
    "rlkit2/CartPoleImages-v0": ("cartpole_images:CartPoleImagesEnv", None, 500, {}),
    "rlkit2/GridRooms-v0": ("gridworld:GridRoomsEnv", None, 200, {}),
}

for _id, (_entry, _vector, _limit, _arguments) in _ENVIRONMENTS.items():
    gymnasium.register(
        id=_id,
        entry_point=f"rlkit2.envs.{_entry}",
        vector_entry_point=f"rlkit2.envs.{_vector}" if _vector else None,
        max_episode_steps=_limit,
        kwargs=_arguments,
    )
