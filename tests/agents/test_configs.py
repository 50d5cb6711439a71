"""Every field of every agent's config is checked: outside its type or range it is refused by name, inside by a rule over fields only."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit2.agents import agent_class, agent_classes, list_agents, make_config
from rlkit2.errors import ConfigError
from rlkit2.fields import Checked, field_types, read_value

AGENTS = list_agents()
CASES = [(name, cls.action_kinds[0]) for name in AGENTS for cls in agent_classes(name)]
every_class = pytest.mark.parametrize(("name", "kind"), CASES, ids=["-".join(case) for case in CASES])
WILD = st.one_of(
    st.integers(-(10**12), 10**12),
    st.floats(),
    st.sampled_from(
        [0, 1, -1, 0.0, 1.0, 2.0, 0.5, 1e-9, math.inf, math.nan, True, False, None, "", "none", "mean", "min", "ggd"]
    ),
    st.text(max_size=6),
    st.lists(st.one_of(st.integers(-2, 64), st.floats()), max_size=3),
)


def bounded(hint: Any) -> bool:
    """Whether every number in a type has a range."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (int, float):
        return False
    if origin in (Annotated, Literal):
        return True
    return all(bounded(argument) for argument in arguments if argument is not Ellipsis)


@every_class
def test_every_number_has_a_range_and_every_choice_its_list(name: str, kind: str) -> None:
    config_class = agent_class(name, kind).config_class
    assert issubclass(config_class, Checked)
    assert [field for field, hint in field_types(config_class).items() if not bounded(hint)] == []
    texts = {field for field, hint in field_types(config_class).items() if hint in (str, str | None)}
    assert texts <= {"preferences", "rewards", "expert_dataset"}  # names of files and datasets


@given(st.sampled_from(CASES), WILD, st.data())
def test_what_is_outside_is_refused_by_name(case: tuple[str, str], value: Any, data: st.DataObject) -> None:
    name, kind = case
    hints = field_types(agent_class(name, kind).config_class)
    field = data.draw(st.sampled_from(sorted(hints)))
    try:
        read_value(value, hints[field])
        inside = True
    except TypeError:
        inside = False
    if not inside:
        with pytest.raises(ConfigError, match=f"^{field} must be ") as refused:
            make_config(name, kind, **{field: value})
        assert "\n" not in str(refused.value)
        return
    try:
        config = make_config(name, kind, **{field: value})
    except ConfigError as error:
        rule = str(error)
    else:
        rule = ""
        again = type(config)(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
        assert again == config
    assert not rule or any(other in rule for other in hints), rule


@every_class
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_step_sizes_are_finite_and_not_negative(name: str, kind: str, value: float) -> None:
    rates = [field for field in field_types(agent_class(name, kind).config_class) if field.endswith("learning_rate")]
    assert rates
    for field in rates:
        with pytest.raises(ConfigError, match=f"^{field} must be a number of at least 0"):
            make_config(name, kind, **{field: value})


@every_class
@pytest.mark.parametrize("sizes", [(5, 7), (6,), ()], ids=str)
def test_hidden_sizes_set_every_network(name: str, kind: str, sizes: tuple[int, ...]) -> None:
    """No hidden layer is a choice, too: linear networks."""
    if name == "dt":
        pytest.skip("its sizes are the width of every block: test_dt.py")
    agent = agent_class(name, kind)(make_config(name, kind, hidden_sizes=sizes), 3, 2)
    shapes = {part: tensor.shape for part, tensor in agent.state_dict().items() if not part.startswith("optimizer")}
    widths: dict[str, list[int]] = {}
    for part, shape in shapes.items():
        if ".layers." in part and part.endswith("bias"):
            widths.setdefault(part.partition(".")[0], []).append(shape[-1])
    assert widths
    assert all(found[:-1] == list(sizes) for found in widths.values()), widths


def test_the_special_sizes_stand_beside_it() -> None:
    config = make_config("odice", hidden_sizes=(8,), policy_hidden_sizes=(9,))
    assert (config.value_widths, config.policy_widths) == ((8,), (9,))
    config = make_config("odice")
    assert (config.value_widths, config.policy_widths) == ((256, 256), (256, 256))
    config = make_config("odice_released")
    assert (config.value_widths, config.policy_widths) == ((256, 256), (1024, 1024))
    config = make_config("odice_released", hidden_sizes=(8,))
    assert (config.value_widths, config.policy_widths) == ((8,), (8,))
    config = make_config("odice", hidden_sizes=(), policy_hidden_sizes=(9,))
    assert (config.value_widths, config.policy_widths) == ((), (9,))  # linear, not the default
    assert make_config("odice", hidden_sizes=(9,), value_hidden_sizes=()).value_widths == ()


@pytest.mark.parametrize(
    "name", [name for name in AGENTS if "sample_weighting" in field_types(agent_class(name).config_class)]
)
@pytest.mark.parametrize("weighting", ["biv", "biev", "iv"])
def test_weights_from_a_spread_need_two_members(name: str, weighting: str) -> None:
    with pytest.raises(
        ConfigError, match=f"sample_weighting = '{weighting}' needs num_critics of at least 2|edac needs"
    ):
        make_config(name, critic="ggd", sample_weighting=weighting, num_critics=1)


@pytest.mark.parametrize(
    "name", [name for name in AGENTS if "policy_head" in field_types(agent_class(name).config_class)]
)
def test_choices_are_not_asked_of_continuous_actions(name: str) -> None:
    config = make_config(name, policy_head="categorical", hidden_sizes=(4,))
    agent_class(name)(config, 3, 2, discrete=True)
    with pytest.raises(ConfigError, match="policy_head = 'categorical' is for discrete actions"):
        agent_class(name)(config, 3, 2)
