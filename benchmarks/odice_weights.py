"""Where an O-DICE run puts its weights: by steps from the start and to the end of an episode, and by the episode's return.

    python benchmarks/odice_weights.py runs/odice-zoo-hopper-medium-replay-v0-001

Per row and averaged over seeds and heads: the share of the least weights (0, or the floor), the
mean weight (the whole dataset has mean 1), the residual and the value in
units of reward, and the discounted return that really followed. Below the table: whether what decides the weights tells what follows, the
correlation of e(s, a) (or R) with the return to go less V, over steps with 300 or more left (luck is large: 1 is out of reach, 0 is noise).
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from rlkit2 import load_dataset, load_run
from rlkit2.agents.odice import ODICE
from rlkit2.data.returns import discounted_returns
from rlkit2.errors import ConfigError, RLKitError

AHEAD = 300
EDGES = (0, 1, 3, 6, 12, 25, 50, 100, 10**9)


def main(path: Path) -> None:
    """Print the table of one run."""
    run = load_run(path)
    agent = run.agent
    if not isinstance(agent, ODICE):
        raise ConfigError(f"{path} is a run of {run.config['agent']}; this needs one of odice")
    dataset = load_dataset(run.config["dataset"]["source"])
    if agent.needs_episodes(agent.config):
        dataset = dataset.looking_ahead(discount=agent.config.discount, episodes=True)
    if agent.labels_data(agent.config):
        agent.label(dataset, anew=False)
    every = dataset.gather(torch.arange(len(dataset)).expand(len(agent.seeds), -1))
    terms = agent.terms(every)
    # the agent's V and R have units of their own: here both are in units of reward
    scale = (agent.residual_scale / agent.residual_spread).view(-1, 1, 1)
    mean, unit = 0.0, torch.ones(1, 1, 1)
    if agent.config.value_unit == "return" and agent.normalizer.return_std is not None:
        mean, unit = (part.unsqueeze(-1) for part in (agent.normalizer.return_mean, agent.normalizer.return_std))
    weight = terms.weight.double()
    least = agent.config.weight_floor if agent.config.weight == "above_quantile" else 0.0
    columns = {
        "least weight": (weight <= least).double(),
        "weight": weight / weight.mean((1, 2), keepdim=True),
        "residual": terms.residual_forward.double() / scale * unit,
        "value": mean + unit * terms.value.double(),
    }
    rows = {name: column.mean((0, 1)) for name, column in columns.items()}
    rows["return to go"] = discounted_returns(dataset.rewards, dataset.episode_starts, agent.config.discount)
    table = Table("transitions", "number", *rows, title=str(path))
    starts = torch.as_tensor(dataset.episode_starts)
    lengths = starts.diff()
    episode = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    elapsed = torch.arange(len(dataset)) - starts[episode]
    left = lengths[episode] - 1 - elapsed
    returns = torch.as_tensor(dataset.episode_returns).double()
    quantiles = torch.quantile(returns, torch.linspace(0, 1, 6, dtype=torch.float64)).tolist()
    for text, values, edges in (
        ("steps since the start", elapsed, EDGES),
        ("steps before the end", left, EDGES),
        ("return of the episode", returns[episode], quantiles),
    ):
        for low, high in itertools.pairwise(edges):
            chosen = (values >= low) & ((values < high) | (high == edges[-1]))
            if chosen.any():
                bound = "" if high == EDGES[-1] else f" to {high:.0f}"
                cells = (f"{column[chosen].mean():.3g}" for column in rows.values())
                table.add_row(f"{text} {low:.0f}{bound}", str(int(chosen.sum())), *cells)
    console = Console(width=120)
    console.print(table)
    deciding = terms.residual_forward.mean(1)
    if agent.expects:
        batch = agent.normalize(every)
        with torch.no_grad():
            deciding = agent.expected_residual(batch.observations, batch.actions)[:, 0]
    long = left >= AHEAD
    if long.any():
        gain = rows["return to go"] - columns["value"].mean(1)
        found = [
            torch.corrcoef(torch.stack(pair))[0, 1]
            for pair in zip(deciding[:, long].double(), gain[:, long], strict=True)
        ]
        console.print(f"correlation with what followed: {', '.join(f'{value:.3f}' for value in found)}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]))
    except RLKitError as error:
        sys.exit(str(error))
