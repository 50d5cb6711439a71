"""Names of other libraries as links to their pages, without a network: `links.toml` says which page holds which names."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent / "links.toml"
# How a name is written in an annotation, and what the pages call it.
SAME = {
    "Annotated": "typing.Annotated",
    "Any": "typing.Any",
    "Callable": "collections.abc.Callable",
    "ClassVar": "typing.ClassVar",
    "Literal": "typing.Literal",
    "Mapping": "collections.abc.Mapping",
    "Sequence": "collections.abc.Sequence",
    "Tensor": "torch.Tensor",
    "gymnasium.core.Env": "gymnasium.Env",
    "gymnasium.spaces.space.Space": "gymnasium.spaces.Space",
    "matplotlib.axes._axes.Axes": "matplotlib.axes.Axes",
    "minari.dataset.minari_dataset.MinariDataset": "minari.MinariDataset",
    "numpy.random._generator.Generator": "numpy.random.Generator",
    "torch._C.Generator": "torch.Generator",
    "torch.nn.modules.container.Sequential": "torch.nn.Sequential",
    "torch.nn.modules.module.Module": "torch.nn.Module",
}


@cache
def pages() -> dict[str, str]:
    """Full names and the addresses of what is said about them."""
    found: dict[str, str] = {}
    for library in tomllib.loads(TABLE.read_text()).values():
        for page, names in library["pages"].items():
            for name in names:
                found[name] = library["root"] + page.replace("NAME", name) + f"#{name}"
    return found


def linked(app: Any, env: Any, node: Any, content: Any) -> Any:
    """What Sphinx does with a name that it does not know: a link, or None, and the name stays plain text."""
    from docutils import nodes
    from sphinx.util.nodes import make_refnode

    own = env.get_domain("py").objects.get(f"rlkit2.errors.{node.get('reftarget')}")
    if own is not None:  # docstrings name errors by themselves
        return make_refnode(app.builder, node["refdoc"], own.docname, own.node_id, content)
    name = SAME.get(node.get("reftarget", ""), node.get("reftarget", ""))
    if name not in pages():
        return None
    return nodes.reference("", "", content, internal=False, refuri=pages()[name], reftitle=name)


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("missing-reference", linked)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
