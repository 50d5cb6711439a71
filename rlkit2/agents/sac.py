"""SAC: soft actor-critic, an actor that is rewarded for its entropy and two critics whose minimum it climbs.

    y     = r + gamma (1 - terminated) (min_i Q_target_i(s', a') - tau log pi(a'|s')),   a' ~ pi(.|s')
    L(Q)  = E[ sum_i (Q_i(s, a) - y)^2 ]                         (critic = "mse"; with a noise model see `rlkit2.agents.error_model`)
    L(pi) = E[ tau log pi(a|s) - min_i Q_i(s, a) ],   a ~ pi(.|s)
    tau moves so that the policy's entropy is that of `target_entropy`

These are the equations of `rlkit2.agents.sacn` for N = 2, so the terms are written there: SAC is what SAC-N was made from. Here the defaults are
those of an agent that collects its own data, `rlkit2 train sac --env ENV --online STEPS`, with one update after every step of the environment.

With a noise model and several critics (`critic = "ggd"`, `num_critics = 10`, `target` and `policy_objective = "released"`, `sample_weighting =
"biev"`) it is the SAC of Kim et al. (arXiv 2408.02295): two groups of members, the minimum over the groups.

Source: Haarnoja, Zhou, Hartikainen, Tucker et al., "Soft Actor-Critic Algorithms and Applications" (arXiv 1812.05905). Differences from the authors'
code: those of `rlkit2.agents.sacn`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlkit2.agents.sacn import SACN, SACNConfig
from rlkit2.fields import Bounds, Count, Widths


@dataclass(frozen=True)
class SACConfig(SACNConfig):
    """SAC, for continuous actions."""

    # critics; their minimum is what targets and the policy see
    num_critics: Count = 2
    # hidden layers of Q and the policy
    hidden_sizes: Widths = (256, 256)
    # the policy's log standard deviation is clamped to these
    log_std_bounds: Bounds = (-20.0, 2.0)


class SAC(SACN):
    """SAC for S seeds; arguments as for `Agent`."""

    config_class = SACConfig
    config: SACConfig
