"""What rlkit2 brings along: `python -m tests.audit` (`make audit`).

Every installed package that rlkit2 needs, with its version and licence. An error is what is missing, is not as a requirement or `constraints.txt`
says, or has a licence that is neither permissive nor reciprocal for its own files alone. With pip-audit installed (`pip install pip-audit`), known
vulnerabilities are asked for too, which needs the network.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
# Permissive, or reciprocal for their own files alone (MPL).
ALLOWED = re.compile(
    r"MIT|BSD|Apache|ISC|PSF|Python Software Foundation|HPND|Zlib|0BSD|CC0|BSL|Unlicense|MPL|Mozilla|matplotlib|Enthought|"
    r"public domain|CNRI"
)
REFUSED = re.compile(r"(?<!L)\bA?GPL|SSPL|Commons Clause|Proprietary|Non-?Commercial", re.IGNORECASE)


@dataclass(frozen=True)
class Package:
    """An installed package. `needed_by`: the first one that asks for it."""

    name: str
    version: str
    licence: str
    needed_by: str


def licence_of(package: importlib.metadata.Distribution) -> str:
    """What a package says its licence is: the expression, else the classifiers, else the first line of the text."""
    about = package.metadata
    classifiers = [
        text.rpartition("::")[2].strip() for text in about.get_all("Classifier") or [] if "License ::" in text
    ]
    lines = (about.get("License") or "").strip().splitlines()
    return about.get("License-Expression") or ", ".join(classifiers) or (lines[0].strip() if lines else "unknown")


def closure(root: str, extras: Sequence[str] = ()) -> tuple[list[Package], list[str]]:
    """All installed packages that `root` with some extras needs, by name, and what is wrong with the requirements."""
    found: dict[str, Package] = {}
    wrong = []
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(f"{root}[{','.join(extras)}]" if extras else root), "the user")]
    while waiting:
        requirement, by = waiting.pop()
        name = canonicalize_name(requirement.name)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed, but {by} needs it")
            continue
        if not requirement.specifier.contains(Version(package.version), prereleases=True):
            wrong.append(f"{name} {package.version} is not {requirement.specifier}, which {by} needs")
        found.setdefault(name, Package(name, package.version, licence_of(package), by))
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                waiting += [(needed, name) for needed in _needs(package, extra)]
    return sorted(found.values(), key=lambda package: package.name), wrong


def _needs(package: importlib.metadata.Distribution, extra: str) -> Iterator[Requirement]:
    for text in package.requires or []:
        requirement = Requirement(text)
        plain = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        chosen = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if chosen and (not extra or not plain):
            yield requirement


def licence_faults(packages: Sequence[Package]) -> list[str]:
    """Packages whose licence is unknown or not allowed."""
    return [
        f"{package.name} {package.version}: licence {package.licence}"
        for package in packages
        if not ALLOWED.search(package.licence) or REFUSED.search(package.licence)
    ]


def constraint_faults(path: Path) -> list[str]:
    """Installed versions that are not those of a constraints file."""
    wrong = []
    for line in path.read_text().splitlines():
        if line.partition("#")[0].strip():
            pin = Requirement(line.partition("#")[0])
            installed = importlib.metadata.version(pin.name)
            if not pin.specifier.contains(Version(installed).public):
                wrong.append(f"{pin.name} {installed} is not {pin.specifier} of {path.name}")
    return wrong


def vulnerabilities() -> tuple[str, bool]:
    """What pip-audit says about this environment, and whether that is a fault."""
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--skip-editable"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named pip_audit" in done.stderr:
        return "known vulnerabilities: not asked for (pip install pip-audit)", False
    if "ConnectionError" in done.stderr or "Max retries" in done.stderr or "ServiceError" in done.stderr:
        return "known vulnerabilities: not asked for (no network)", False
    return f"known vulnerabilities:\n{done.stdout}{done.stderr}", bool(done.returncode)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", nargs="*", default=[], help="of rlkit2, such as mujoco trl")
    packages, wrong = closure("rlkit2", parser.parse_args().extras)
    for package in packages:
        sys.stdout.write(f"{package.name:<24}{package.version:<16}{package.licence[:60]:<62}for {package.needed_by}\n")
    wrong += licence_faults(packages) + constraint_faults(ROOT / "constraints.txt")
    text, bad = vulnerabilities()
    sys.stdout.write(f"{len(packages)} packages; {text}\n")
    for fault in wrong:
        sys.stdout.write(f"wrong: {fault}\n")
    return int(bool(wrong) or bad)


if __name__ == "__main__":
    sys.exit(main())
