"""The lock is closed: each installed package finds what its metadata asks for, save the packages that say why not."""

import importlib.metadata
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements"


def pins(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (REQUIREMENTS / name).read_text().splitlines()]
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if line}


def test_every_package_is_pinned_once():
    every = [p for name in ("torch.txt", "lock.txt", "unresolved.txt") for p in pins(name)]
    assert len(every) == len(set(every)) > 150


def test_installed_versions_are_the_pinned_ones():
    for name in ("torch.txt", "lock.txt", "unresolved.txt"):
        for package, version in pins(name).items():
            assert importlib.metadata.version(package).split("+")[0] == version, package


def test_lock_is_closed():
    """No resolver runs at installation, so this is where an incompatible pin shows."""
    unresolved = pins("unresolved.txt")
    problems = []
    for package in [*pins("torch.txt"), *pins("lock.txt")]:
        for text in importlib.metadata.requires(package) or []:
            wanted = Requirement(text)
            if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
                continue
            try:
                found = importlib.metadata.version(wanted.name)
            except importlib.metadata.PackageNotFoundError:
                problems.append(f"{package} asks for {text}: not installed")
                continue
            if not wanted.specifier.contains(found.split("+")[0], prereleases=True):
                problems.append(f"{package} asks for {text}: {found} is installed")
    assert not problems, "\n".join(problems)
    assert all(
        re.search(rf"^# .*\n{package}==", (REQUIREMENTS / "unresolved.txt").read_text(), re.M | re.I) for package in unresolved
    )
