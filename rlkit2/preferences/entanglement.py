"""The names of `rlkit2.entanglement`, for those who look for them beside the preferences."""

from rlkit2.entanglement import *  # noqa: F403
from rlkit2.entanglement import __all__ as __all__
