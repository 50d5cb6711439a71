"""What a loader had to cut, join, infer or drop: counted in `DatasetSpec.notes`, said once as a warning, and again by the audit and by `info`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from rlkit2.data.spaces import DatasetWarning
from rlkit2.data.spec import DatasetSpec

# What is counted, as a sentence after the number.
NOTES = {
    "non_finite_values": "values are NaN or infinite",
    "missing_values_filled": "missing observations were filled as asked",
    "episodes_without_end_flag": "episodes were cut off without a flag; they count as truncated",
    "flags_in_mid_episode": "steps in mid-episode are flagged as ends and kept so: values stop there, episodes go on",
    "episodes_without_final_observation": "terminated episodes lack their final observation; the last one stands in, nothing is bootstrapped from it",
    "last_steps_dropped_for_want_of_a_next_observation": "last steps were left out because the observation after them was never stored",
    "episodes_dropped": "episodes were left out because their only step lacks a next observation",
    "episodes_without_steps": "episodes without a single step were left out",
    "episodes_cut_at_a_jump": "episodes end because the next row does not start from their next observation; they count as truncated",
    "episodes_cut_at_the_step_limit": "episodes were cut at the given number of steps; they count as truncated",
    "terminations_taken_as_cuts": "terminations count as truncations, because the task was said never to terminate",
    "next_observations_within_rounding": "next observations differ from the observation after them by rounding only; they are taken as equal",
    "rows_after_a_termination": "rows recorded after a termination, while the episode went on, were left out",
    "steps_without_rewards": "steps have no rewards in the files; they are 0",
    "long_arrow_episodes": "Arrow or Parquet episodes have more than 32,767 steps, whose order Minari's writer does not keep where Arrow has several "
    "threads: they may be shuffled; hold them against their source, or store them as HDF5",
    "cameras_left_out": "cameras were left out; the other observations are read",
    "done_taken_as_termination": "episodes end with a done flag without a reason; it counts as a termination (--never-terminates: as a cut)",
    "action_spaces_inferred": "action space was inferred from the data; give another with action_space= or --action-space",
}


def note_lines(notes: Mapping[str, int]) -> list[str]:
    """The notes as lines."""
    return [f"{count:,} {NOTES.get(code, code.replace('_', ' '))}" for code, count in notes.items()]


def say_notes(spec: DatasetSpec) -> None:
    """Warn in one line of everything that was done to the data; nothing is said where nothing was done."""
    lines = note_lines(spec.notes)
    if "action_spaces_inferred" in spec.notes:
        lines.append(f"the actions are taken as {' '.join(str(spec.action_space).split())}")
    if lines:
        warnings.warn(f"{spec.id}: {'; '.join(lines)}", DatasetWarning, stacklevel=4)
