"""Small learning problems and agents that the tests of all agents share; their makers are those of `rlkit2.testing`."""

from rlkit2.testing import batch_maker as batch_maker
from rlkit2.testing import map_batch as map_batch
from rlkit2.testing import random_batch as random_batch
from rlkit2.testing import random_preferences as random_preferences
from rlkit2.testing import small_config as small_config
