"""Adds what this project needs to a Python that brings NVIDIA's packages, without changing one of those: a container's.

    python requirements/into_image.py           # installs; dryrun=true only says what

Packages of the lock that are missing are installed at the lock's versions, without their dependencies. Before that, each one's
dependencies are compared with what will be there; the build ends where one is not met. Afterwards nothing that was installed
before may have another version.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
# What makes an image the one that this project is written for. It was built together, and a wheel beside it would not fit.
BROUGHT = (
    "torch",
    "torchvision",
    "nemo-toolkit",
    "megatron-core",
    "lightning",
    "nvidia-modelopt",
    "nvidia-resiliency-ext",
)


def canonical(name: str) -> str:
    """A distribution's name as indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: Path) -> dict[str, str]:
    """The pinned versions of a requirements file, by canonical name."""
    lines = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
    return {canonical(line.split("==")[0]): line.split("==")[1] for line in lines if line}


def installed() -> dict[str, str]:
    """The versions of all distributions that this Python sees."""
    return {
        canonical(each.metadata["Name"]): each.version for each in importlib.metadata.distributions() if each.metadata["Name"]
    }


def wanted() -> dict[str, str]:
    """What the project is locked to, save torch, which is the image's."""
    return {**pins(HERE / "lock.txt"), **pins(HERE / "unresolved.txt")}


def missing(there: Mapping[str, str]) -> dict[str, str]:
    """What has to be added to an image that holds `there`. Raises SystemExit where the image is another kind of image."""
    lacking = [name for name in BROUGHT if name not in there]
    if lacking:
        raise SystemExit(f"this image lacks {', '.join(lacking)}: build on nvcr.io/nvidia/nemo, or use Dockerfile.cpu")
    return {name: version for name, version in wanted().items() if name not in there}


def unmet(names: list[str], there: Mapping[str, str]) -> list[str]:
    """Which dependencies of the installed distributions `names` are not met by the versions `there`."""
    from packaging.requirements import Requirement

    allowed = pins(HERE / "unresolved.txt")
    problems = []
    for name in names:
        if name in allowed:  # unresolved.txt says why
            continue
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            found = there.get(canonical(requirement.name))
            if found is None:
                problems.append(f"{name} asks for {text}: not installed")
            elif not requirement.specifier.contains(found.split("+")[0], prereleases=True):
                problems.append(f"{name} asks for {text}: {found} is installed")
    return problems


def install(packages: Mapping[str, str]) -> None:
    """Install exactly these, by pip or, where the environment has none, by uv. Raises SystemExit."""
    if importlib.util.find_spec("pip"):
        tool = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-cache-dir"]
    elif uv := shutil.which("uv"):
        tool = [uv, "pip", "install", "--no-cache", "--python", sys.executable]
    else:
        raise SystemExit("this image has neither pip nor uv")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{name}=={version}\n" for name, version in packages.items()))
        file.flush()
        # NVIDIA's images constrain pip to what they hold; nothing of that is touched.
        environment = {**os.environ, "PIP_CONSTRAINT": "", "UV_CONSTRAINT": ""}
        done = subprocess.run([*tool, "--no-deps", "-r", file.name], env=environment)
    if done.returncode:
        raise SystemExit(f"installing failed with exit code {done.returncode}")


def main(arguments: list[str]) -> None:
    before = installed()
    packages = missing(before)
    print(f"{len(packages)} packages are added: {' '.join(f'{name}=={version}' for name, version in packages.items())}")
    if "dryrun=true" in arguments:
        return
    if packages:
        install(packages)
    importlib.invalidate_caches()
    after = installed()
    changed = [
        f"{name} {version} became {after.get(name, 'nothing')}" for name, version in before.items() if after.get(name) != version
    ]
    problems = [*changed, *unmet(list(packages), after)]
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main(sys.argv[1:])
