"""Formulas as pictures that are part of the page, so that they are read without a network: drawn by matplotlib, in the colour of the text."""

from __future__ import annotations

import io
import re
from functools import cache
from html import escape
from typing import Any

SIZE = 12  # points, of the letters of a formula in a picture; the page scales it to its own


@cache
def drawn(formula: str) -> str:
    """An SVG element as high as the text around it is, with the formula as its alternative text.

    Raises:
        ValueError: matplotlib cannot draw it.
    """
    from matplotlib import rc_context
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import math_to_image

    picture = io.BytesIO()
    with rc_context({"svg.hashsalt": formula, "mathtext.fontset": "dejavusans", "font.size": SIZE}):
        depth = math_to_image(f"${formula}$", picture, prop=FontProperties(size=SIZE), dpi=72, format="svg")
    found = re.search(
        r'<svg .*?width="([\d.]+)pt" height="([\d.]+)pt" viewBox="([^"]+)".*?>(.*)</svg>',
        picture.getvalue().decode(),
        re.S,
    )
    if found is None:
        raise ValueError("no picture")
    width, height, box = float(found[1]) / SIZE, float(found[2]) / SIZE, found[3]
    inside = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", found[4], flags=re.S)
    inside = re.sub(r'<g id="patch_1">.*?</g>', "", inside, count=1, flags=re.S)  # the background
    style = f"width:{width:.3f}em;height:{height:.3f}em;vertical-align:{-depth / SIZE:.3f}em;fill:currentColor"
    return f'<svg role="img" aria-label="{escape(formula)}" viewBox="{box}" style="{style}">{inside}</svg>'


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    from docutils import nodes
    from sphinx.util.logging import getLogger

    def shown(formula: str, node: Any) -> str:
        lines = [line.strip() for line in re.split(r"\\\\|\n\n", formula) if line.strip()]
        try:
            return "<br>".join(drawn(" ".join(line.split())) for line in lines)
        except ValueError as error:
            getLogger(__name__).warning(
                "the formula %r cannot be drawn: %s", formula, str(error).splitlines()[-1], location=node
            )
            return f"<code>{escape(formula)}</code>"

    def inline(writer: Any, node: Any) -> None:
        writer.body.append(f'<span class="math">{shown(node.astext(), node)}</span>')
        raise nodes.SkipNode

    def block(writer: Any, node: Any) -> None:
        writer.body.append(
            f'<div class="math" style="text-align:center;margin:1em 0">{shown(node.astext(), node)}</div>'
        )
        raise nodes.SkipNode

    app.add_html_math_renderer("drawn", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
