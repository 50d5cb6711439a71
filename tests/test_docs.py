"""The documentation names what there is: extras, files, agents, options, metrics; every link leads somewhere."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

from docs.cells import KEPT, as_ipynb, code_of, notebooks, outputs
from docs.formulas import drawn
from docs.links import SAME, pages
from rlkit2.agents import agent_classes, list_agents, plain_name

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "docs/coming_from").glob("*.md"),
        *(ROOT / "docs/notebooks").glob("*.md"),
        *(ROOT / "agents").rglob("README.md"),
    ]
)
AGENTS = sorted({plain_name(name) for name in list_agents()})


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["README.md", "docs/install.md"])
def test_extras_are_those_of_the_project(page: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (ROOT / page).read_text()
    start = text.index("Extras:" if page == "README.md" else "| extra | for |")
    part = (
        text[start : text.index("\n\n", start)]
        if page != "README.md"
        else text[start : text.index("An open range", start)]
    )
    named = re.findall(
        r"`([a-z0-9]+)`", part if page == "README.md" else "\n".join(line.split("|")[1] for line in part.splitlines())
    )
    assert sorted(named) == sorted(extras)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", text):
        if not target.startswith(("http://", "https://", "generated/", "../generated/")):
            assert (page.parent / target).exists(), target
            if page.is_relative_to(ROOT / "docs"):  # what lies outside has no page on the site
                assert (page.parent / target).resolve().is_relative_to(ROOT / "docs"), target
        elif found := re.fullmatch(r"(?:\.\./)?generated/agents/(\w+)\.md", target):
            assert found[1] in [*AGENTS, "index"], target


def test_papers_name_files_that_exist() -> None:
    named = re.findall(r"`(rlkit2/[\w/]+\.py)`", (ROOT / "docs/papers.md").read_text())
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).is_file()]
    for cls in {cls for name in AGENTS for cls in agent_classes(name) if cls.__module__.startswith("rlkit2.")}:
        assert cls.__module__.replace(".", "/") + ".py" in named, f"{cls.__name__} is of no paper in docs/papers.md"


def test_papers_have_an_equation_or_the_place_of_one() -> None:
    rows = [line for line in (ROOT / "docs/papers.md").read_text().splitlines() if line.startswith("| ")]
    for row in rows:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        assert len(cells) == 4
        assert all(cells), row
        assert cells[2].count("$") % 2 == 0


def test_formulas_are_pictures_that_need_no_network() -> None:
    found = {
        line.strip().replace("\\|", "|")
        for page in PAGES
        for formula in re.findall(
            r"(?<!\$)\$([^$\n]+)\$(?!\$)", re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.S)
        )
        for line in formula.split("\\\\")
        if page.is_relative_to(ROOT / "docs")
    }
    assert len(found) > 20
    for formula in found:
        picture = drawn(formula)
        assert picture.startswith("<svg ")
        assert "currentColor" in picture
        assert "<path" in picture
    with pytest.raises(ValueError, match="Unknown symbol"):
        drawn("\\nothing")


def test_what_is_made_elsewhere_are_targets_of_the_makefile() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    flow = (ROOT / ".github/workflows/tests.yml").read_text()
    named = re.findall(r"target: \[?([\w-]+)", flow)
    assert len(named) > 4
    assert set(named) | set(re.findall(r"^make ([\w-]+)", (ROOT / "CONTRIBUTING.md").read_text(), re.M)) <= set(targets)


def test_names_of_other_libraries_exist_and_lead_to_their_pages() -> None:
    assert {name.split(".")[0] for name in pages()} >= {"torch", "numpy", "gymnasium", "minari"}
    for name, address in pages().items():
        assert re.fullmatch(r"https://[\w./-]+/[\w./-]*#[\w.]+", address)
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(module or "builtins"), last) or name in ("None", "minari.DataCollector")
    assert set(SAME.values()) <= set(pages())


def test_every_page_is_in_the_contents() -> None:
    index = (ROOT / "docs/index.md").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        if not name.startswith(("generated/", "_build/")) and name != "index":
            assert re.search(rf"^{re.escape(name)}$", index, re.M), f"docs/{name}.md is not in docs/index.md"


@pytest.mark.parametrize("name", AGENTS)
def test_an_agents_page_has_its_card_its_options_and_its_metrics_explained(generate: ModuleType, name: str) -> None:
    assert name in generate.carded_agents()
    page = generate.agent_page(name)
    for cls in agent_classes(name):
        for field in fields(cls.config_class):
            assert f"| `{field.name}` |" in page
    found = generate.metrics_of(name)
    assert found
    explained = {metric: generate.explained(metric) or ("", "") for metric in found}
    missing = [metric for metric, texts in explained.items() if not all(texts)]
    assert not missing, "say in docs/metrics.toml what they are and when to worry"
    assert "](../" not in page.replace("](../../", "")  # links of the card lead to pages of the site
    for preset in generate.presets_of(name):
        assert f"`{preset}` is `{name}` with " in page


@pytest.mark.parametrize("page", notebooks(), ids=lambda page: page.stem)
def test_what_a_notebook_shows_is_of_the_cells_that_it_has(page: Path) -> None:
    kept = outputs(page)
    assert kept["code"] == code_of(page), f"its cells have changed: python docs/cells.py {page.stem}"
    shown = [name for cell in kept["cells"] for name in cell["figures"]]
    assert len(shown) >= 3
    assert sorted(shown) == sorted(path.name for path in KEPT.glob(f"{page.stem}-*.png"))
    alone = json.loads(as_ipynb(page))["cells"]
    assert sum(cell["cell_type"] == "code" for cell in alone) == len(kept["cells"])
    assert alone[0]["source"].startswith("# ")
    assert not [cell for cell in alone if "code-cell" in cell["source"] or "{download}" in cell["source"]]


def test_the_command_line_page_holds_every_command(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "_printed", lambda *words: " ".join(words))
    page = generate.command_line()
    from rlkit2.cli.main import COMMANDS

    assert all(f"\n## rlkit2 {name}\n" in page for name in COMMANDS)
    assert "### rlkit2 data check" in page
