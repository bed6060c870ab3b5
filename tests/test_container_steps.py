"""The images' build steps, replayed on this machine as far as they are Python's: each RUN, HEALTHCHECK and CMD in the folder that
the COPY lines before it have made, in a fresh virtual environment. No index is asked: wheels are made from what is installed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_containers import ROOT, ignored, instructions, into_image

HERE = Path(sysconfig.get_path("purelib"))
WORKDIR = "/opt/llm-builder"
ADDED = ("trl", "gguf")  # what the base image of the replay lacks
# What needs root or a package index of the system's, and what that leaves for Python to find.
SYSTEM = ("groupadd", "useradd", "install", "apt-get", "rm")


def files(distribution: importlib.metadata.Distribution) -> list[Path]:
    """A distribution's files below site-packages, but for what its installation has made."""
    made = ("INSTALLER", "REQUESTED", "direct_url.json", "RECORD")
    return [
        Path(str(file)) for file in distribution.files or []
        if ".." not in file.parts and file.suffix != ".pyc" and not (file.parts[0].endswith(".dist-info") and file.name in made)
    ]  # fmt: skip


def pack(name: str, into: Path, code: bool) -> None:
    """A wheel of an installed distribution, with its `code` or, for what only asks who is there, without."""
    found = importlib.metadata.distribution(name)
    paths = [path for path in files(found) if code or path.parts[0].endswith(".dist-info")]
    folder = next(path.parts[0] for path in paths if path.name == "METADATA")
    with zipfile.ZipFile(into / f"{folder.removesuffix('.dist-info')}-py3-none-any.whl", "w") as wheel:
        for path in paths:
            if path.name != "WHEEL":
                wheel.write(HERE / path, str(path))
        wheel.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{folder}/RECORD", "".join(f"{path},,\n" for path in [*paths, f"{folder}/RECORD"]))


def not_sent(folder: str, names: list[str]) -> list[str]:
    """What of a folder's entries the build does not get."""
    return [name for name in names if ignored(str((Path(folder) / name).relative_to(ROOT)))]


class Image:
    """A Dockerfile's steps in `folder`, which stands for WORKDIR; `index` is where pip finds wheels. `code` is the site-packages
    folder whose code is used from the ENV line on, where wheels have none."""

    def __init__(self, file: str, folder: Path, index: Path, code: Path | None = None, **environment: str) -> None:
        self.file, self.folder, self.stage, self.code = file, folder, folder.with_name(folder.name + "-stage"), code
        self.environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_DISABLE_PIP_VERSION_CHECK": "1",
                            "LLM_BUILDER_RUNS": str(folder / "runs"), **environment}  # fmt: skip
        for name in ("PYTHONPATH", "VIRTUAL_ENV", "PIP_TARGET", "MAKEFLAGS", "PYTHONHOME"):
            self.environment.pop(name, None)
        self.environment |= environment
        self.said: dict[str, str] = {}  # by command
        self.changed: dict[str, str] = {}  # files that are copied with another text

    def build(self) -> None:
        for name, rest in instructions(self.file):
            if name == "FROM":
                if self.folder.exists():
                    self.folder.rename(self.stage)
                self.folder.mkdir()
            elif name == "COPY":
                self.copy(rest)
            elif name == "RUN":
                for command in rest.split(" && "):
                    self.run(command)
            elif name == "ENV":
                self.set(rest)
            elif name in ("CMD", "HEALTHCHECK"):
                self.run(" ".join(json.loads(rest[rest.index("[") :])))

    def copy(self, rest: str) -> None:
        *sources, target = rest.split()
        if sources[0].startswith("--from="):
            shutil.copytree(self.stage / Path(sources[1]).relative_to(WORKDIR), self.folder / target, symlinks=True)
            return
        for source in sources:
            if (ROOT / source).is_file():
                shutil.copyfile(ROOT / source, self.folder / source)
            else:
                shutil.copytree(ROOT / source, self.folder / source, ignore=not_sent, dirs_exist_ok=True)
        for path, text in self.changed.items():
            if (self.folder / path).exists():
                (self.folder / path).write_text(text)

    def set(self, rest: str) -> None:
        """The variables of an ENV line, save HOME: that user is not made here."""
        for word in rest.split():
            name, _, value = word.partition("=")
            if name != "HOME":
                self.environment[name] = value.replace("${PATH}", self.environment["PATH"]).replace(WORKDIR, str(self.folder))
        if self.code:
            self.environment["PYTHONPATH"] = str(self.code)

    def run(self, command: str) -> None:
        """Run what is Python's. Settings before a command are the shell's."""
        words = [word for word in command.split() if not re.match(r"[A-Z_]+=", word)]
        if words[0] in SYSTEM:
            return
        assert words[0] in ("python", "make"), command
        done = subprocess.run(["bash", "-c", command], cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{self.file}: {command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        self.said[" ".join(words)] = done.stdout


def installed(python: Path) -> dict[str, str]:
    """Names and versions that a Python sees."""
    code = "import importlib.metadata as m, json; print(json.dumps({d.metadata['Name']: d.version for d in m.distributions()}))"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    return {into_image.canonical(name): version for name, version in json.loads(done.stdout).items()}


def check_what_was_said(image: Image) -> None:
    assert "sandbox of rewards" in image.said["python launchers/doctor.py"]
    assert "cpt_llama3" in image.said["python launchers/run.py"]
    assert "no run" in image.said["python launchers/health.py"]


@pytest.fixture
def index(tmp_path) -> Path:
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def test_the_gpu_image(tmp_path, index):
    """On an environment that has all of this one's packages but two, as the container lacks some: those are added, by pip."""
    base = tmp_path / "base"
    venv.create(base, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(base)}))
    lacking = {path.parts[0] for name in ADDED for path in files(importlib.metadata.distribution(name))}
    for path in HERE.iterdir():
        if path.name not in lacking and path.name != "__pycache__":
            (site / path.name).symlink_to(path)
    for name in ADDED:
        pack(name, index, code=True)
    before = installed(base / "bin" / "python")
    assert not set(ADDED) & before.keys() and set(into_image.BROUGHT) <= before.keys()
    image = Image("Dockerfile", tmp_path / "llm-builder", index, PATH=f"{base / 'bin'}:{os.environ['PATH']}")
    image.build()
    assert "2 packages are added" in image.said["python requirements/into_image.py"]
    after = installed(base / "bin" / "python")
    assert after == {**before, **{name: importlib.metadata.version(name) for name in ADDED}}
    done = subprocess.run(
        [base / "bin" / "python", "-I", "-c", "import gguf; print(gguf.__file__)"], capture_output=True, text=True
    )
    assert done.stdout.startswith(str(site))
    check_what_was_said(image)


def needed(names: set[str]) -> set[str]:
    """Distributions and what they need, as canonical names."""
    found: set[str] = set()
    while names:
        found.add(name := into_image.canonical(names.pop()))
        wanted = map(Requirement, importlib.metadata.requires(name) or [])
        more = {each.name for each in wanted if not each.marker or each.marker.evaluate({"extra": ""})}
        names |= {into_image.canonical(each) for each in more} - found
    return found


def test_the_cpu_image(tmp_path, index):
    """`make setup` with nothing but Makefile and requirements/ makes an environment of the pinned versions: here torch's and the
    unresolved, for whoever runs these tests has installed the whole lock by the same target. Wheels hold names and dependencies
    only, so that the steps after it take the code from this environment."""
    torch = into_image.pins(ROOT / "requirements" / "torch.txt")
    pinned = torch | into_image.pins(ROOT / "requirements" / "unresolved.txt")
    lock = into_image.pins(ROOT / "requirements" / "lock.txt")
    pinned |= {name: lock[name] for name in needed(set(torch)) & lock.keys()}
    for name in pinned:
        pack(name, index, code=False)
    folder = tmp_path / "llm-builder"
    image = Image("Dockerfile.cpu", folder, index, code=HERE, PYTHON=sys.executable, PIP_EXTRA_INDEX_URL="")
    image.changed["requirements/lock.txt"] = "".join(f"{name}=={lock[name]}\n" for name in pinned.keys() & lock.keys())
    image.build()
    assert sorted(path.name for path in image.stage.iterdir()) == [".venv", "Makefile", "requirements"]
    found = installed(folder / ".venv" / "bin" / "python")
    assert len(pinned) > 10 and {name: found[name].split("+")[0] for name in pinned} == pinned
    check_what_was_said(image)
