"""constraints.txt pins all that is installed, so that pip has nothing to search for."""

from __future__ import annotations

import functools
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
SYSTEMS = [
    {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"},
    {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
]
PYTHONS = ("3.11", "3.12", "3.13")


@functools.cache
def pins() -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


HERE = {name: str(value) for name, value in default_environment().items()}
ENVIRONMENTS = [
    {**HERE, **system, "python_version": python, "python_full_version": f"{python}.7"}
    for system in SYSTEMS
    for python in PYTHONS
]


def pinned(name: str, environment: dict[str, str]) -> list[str]:
    """Versions that the lock has of a package there."""
    return [
        str(pin.specifier)
        for pin in pins().get(canonicalize_name(name), [])
        if pin.marker is None or pin.marker.evaluate(environment)
    ]


def test_every_line_pins_one_version() -> None:
    for requirements in pins().values():
        for pin in requirements:
            assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), pin


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_what_an_extra_asks_for_is_pinned_everywhere(extra: str) -> None:
    for text in metadata.requires("histostream") or []:
        requirement = Requirement(text)
        if requirement.name == "histostream":
            continue
        for environment in ENVIRONMENTS:
            marker = requirement.marker
            if marker is None or marker.evaluate({**environment, "extra": extra}):
                versions = pinned(requirement.name, environment)
                where = environment["sys_platform"], environment["python_version"]
                assert len(versions) == 1, (text, where, versions)
                assert requirement.specifier.contains(versions[0].removeprefix("=="))


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_what_is_installed_for_an_extra_is_pinned_with_all_it_needs(extra: str) -> None:
    """Walk through the installed packages; those that are not installed are not gone into."""
    loose, seen = set(), set()
    waiting = [("histostream", extra)]
    while waiting:
        name, of_extra = waiting.pop()
        if (name, of_extra) in seen:
            continue
        seen.add((name, of_extra))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if name != "histostream" and pinned(name, HERE) != [f"=={distribution.version}"]:
            version = distribution.version.split("+")[0]  # torch's CPU build is 2.13.0+cpu
            if pinned(name, HERE) != [f"=={version}"]:
                loose.add(f"{name} {distribution.version}: {pinned(name, HERE) or 'not pinned'}")
        for text in distribution.requires or []:
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or marker.evaluate({**HERE, "extra": of_extra}):
                waiting += [(requirement.name, each) for each in ("", *requirement.extras)]
    assert not loose, "run `make lock`, then install again"
