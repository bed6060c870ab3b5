"""The command: routes, keys, messages and exit codes; resumption and a full disk as its user sees them."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from tiny_gguf_models import tiny

from conversion import convert, verify
from nemo_ext.command_line import main
from nemo_ext.errors import UserError

ROOT = Path(convert.__file__).parents[1]


def call(*arguments) -> int:
    return main(convert.Options, convert.command, list(map(str, arguments)), about="", example="python conversion/convert.py")


def run(*arguments, **environment) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, str(ROOT / "conversion" / "convert.py"), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd="/")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny_models.save("llama", tmp_path_factory.mktemp("llama") / "hf")


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs the command and checks for exit code 2, one line that says so, and nothing written."""

    def check(message: str, *arguments) -> None:
        before = sorted(tmp_path.rglob("*"))
        assert call(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
        assert sorted(tmp_path.rglob("*")) == before

    return check


@pytest.fixture(scope="module")
def verified(llama, tmp_path_factory) -> tuple[Path, list[subprocess.CompletedProcess]]:
    """The whole command both ways, with its verification, in processes of its own."""
    folder = tmp_path_factory.mktemp("verified")
    there = run(f"from=hf:{llama}", f"to=nemo:{folder / 'nemo'}")
    return folder, [there, run(f"from=nemo:{folder / 'nemo'}", f"to=hf:{folder / 'hf'}")]


def test_there_and_back(verified, llama):
    folder, runs = verified
    for process in runs:
        assert process.returncode == 0, process.stderr
        lines = process.stdout.splitlines()
        assert any(line.startswith("written: ") and "peak resident memory" in line for line in lines)
        assert any(line.startswith("verified: logits of") for line in lines)
        assert "unfinished" not in process.stdout
    names = ("config.json", "generation_config.json", "model.safetensors")
    assert all((folder / "hf" / name).read_bytes() == (llama / name).read_bytes() for name in names)
    for kind in ("nemo", "hf"):
        assert "largest difference" in json.loads((folder / kind / "conversion.json").read_text())["verified"]["summary"]


def test_a_disagreement_fails_and_nothing_appears(llama, tmp_path, monkeypatch, capsys):
    report = verify.Report("a", "b", "float32", failures=["layer 1 differs"])
    monkeypatch.setattr(verify, "check", lambda *a, **k: report)
    assert call(f"from=hf:{llama}", f"to=nemo:{tmp_path / 'nemo'}") == 1
    assert "layer 1 differs; what was converted is kept" in capsys.readouterr().err
    assert not (tmp_path / "nemo").exists()
    assert call(f"from=hf:{llama}", f"to=nemo:{tmp_path / 'nemo'}", "verify=false") == 0
    assert "not verified (verify=false)" in capsys.readouterr().out
    assert json.loads((tmp_path / "nemo" / "conversion.json").read_text())["verified"] is False


def test_options_reach_the_verification(llama, tmp_path, monkeypatch):
    seen = {}

    def check(a, b, **options):
        seen.update(options, a=a, b=b)
        return verify.Report(a, b, "float32")

    monkeypatch.setattr(verify, "check", check)
    assert call(f"from=hf:{llama}", f"to=nemo:{tmp_path / 'nemo'}", "tp=2", "pp=2", "prompts=x.txt") == 0
    assert seen["a"] == f"hf:{llama}" and seen["b"].startswith("nemo:")
    assert (seen["tp"], seen["pp"], seen["ep"], seen["prompts"]) == (2, 2, 1, "x.txt")


def test_dtype_and_shards(llama, tmp_path, capsys):
    nemo = tmp_path / "nemo"
    assert call(f"from=hf:{llama}", f"to=nemo:{nemo}", "verify=false", "dtype=bfloat16", "workers=1") == 0
    assert call(f"from=nemo:{nemo}", f"to=hf:{tmp_path / 'hf'}", "verify=false", "max_shard=0.2MB") == 0
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    output = capsys.readouterr().out
    assert "converting nemo: 0.4/0.4 MB in 0:00" in output and f"hf:{tmp_path / 'hf'} is complete after 0:00" in output


def test_a_name_in_hugging_faces_cache(llama, tmp_path, monkeypatch, refused):
    import huggingface_hub

    cached = {"some/model": str(llama / "config.json")}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: cached.get(name))
    refused("neither a folder nor a model in Hugging Face's local cache", "from=hf:other/model", f"to=nemo:{tmp_path / 'nemo'}")
    assert call("from=hf:some/model", f"to=nemo:{tmp_path / 'nemo'}", "verify=false") == 0


def test_help_is_light():
    code = (
        "import sys; from conversion import convert; from nemo_ext.command_line import main\n"
        "main(convert.Options, convert.command, ['--help'], about='', example='')\n"
        "assert not {'torch', 'nemo', 'transformers'} & set(sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert "from=" in output and "to=" in output and "verify=" in output


def test_what_is_no_conversion(llama, tmp_path, refused):
    refused(
        "from=hf: to=hf: is no conversion; there are hf: to nemo:, nemo: to hf:", f"from=hf:{llama}", f"to=hf:{tmp_path / 'x'}"
    )
    refused("is no conversion", "from=gguf:x", f"to=gguf:{tmp_path / 'x'}")
    refused("from=/x: give hf:PATH", "from=/x", f"to=nemo:{tmp_path / 'x'}")
    refused("to= is missing", f"from=hf:{llama}")
    refused("unknown key shard_size", f"from=hf:{llama}", f"to=nemo:{tmp_path / 'x'}", "shard_size=1")


def test_values_that_are_none(llama, tmp_path, refused):
    to = f"to=nemo:{tmp_path / 'x'}"
    refused("workers=0 must be 1 or more", f"from=hf:{llama}", to, "workers=0")
    refused("dtype=int4 is not one of float32, bfloat16, float16", f"from=hf:{llama}", to, "dtype=int4")
    refused("max_shard= is the size of new safetensors files", f"from=hf:{llama}", to, "max_shard=1GB")
    refused("base= is the model of an adapter", f"from=hf:{llama}", to, "base=hf:x")
    refused("tp=3 does not divide", f"from=hf:{llama}", to, "tp=3")
    for size in ("five", "-1GB", "0", "5TBs"):
        with pytest.raises(UserError, match="is no size"):
            convert._bytes(size)
    assert [convert._bytes(size) for size in ("5GB", "1.5 MiB", "700")] == [5 * 10**9, 3 * 2**19, 700]


def test_adapters_need_their_base(tmp_path, refused):
    refused("needs the model that the adapter is for: base=hf:FOLDER", "from=lora:x", f"to=hf:{tmp_path / 'x'}")
    refused("give base=hf:FOLDER", "from=lora:x", "base=nemo:y", f"to=hf:{tmp_path / 'x'}")


def test_bad_input(llama, tmp_path, refused):
    to = f"to=nemo:{tmp_path / 'x'}"
    refused("neither a folder nor a model", f"from=hf:{tmp_path / 'nothing'}", to)
    refused("there is no such folder", f"from=nemo:{tmp_path / 'nothing'}", f"to=hf:{tmp_path / 'x'}")
    (tmp_path / "empty").mkdir()
    refused("no config.json", f"from=hf:{tmp_path / 'empty'}", to)
    refused("no NeMo checkpoint", f"from=nemo:{tmp_path / 'empty'}", f"to=hf:{tmp_path / 'x'}")
    broken = Path(shutil.copytree(llama, tmp_path / "broken"))
    config = json.loads((llama / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "falcon"}))
    refused("known: llama", f"from=hf:{broken}", to)
    (broken / "config.json").write_text(json.dumps(config))
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[:-7])
    refused("truncated", f"from=hf:{broken}", to)
    (broken / "model.safetensors").write_bytes(content[:8] + b"}" + content[9:])
    refused("corrupt", f"from=hf:{broken}", to)
    (broken / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00002.safetensors"}}')
    refused("lacks 1 of its 1 shards, first model-00001-of-00002.safetensors", f"from=hf:{broken}", to)
    refused("exists already", f"from=hf:{llama}", f"to=nemo:{llama}")


def test_an_unwritable_place(llama, tmp_path, refused):
    (tmp_path / "file").write_text("")
    refused("cannot write in", f"from=hf:{llama}", f"to=nemo:{tmp_path / 'file' / 'nemo'}", "verify=false")
    refused("cannot write in /proc", f"from=hf:{llama}", "to=nemo:/proc/nemo", "verify=false")


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int):
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_too_small(llama, tmp_path, refused):
    with small_disk(tmp_path / "disk", 400) as disk:
        refused("make space or choose another place", f"from=hf:{llama}", f"to=nemo:{disk / 'nemo'}", "verify=false")


def test_a_disk_that_fills_up_meanwhile(llama, tmp_path, monkeypatch, capsys):
    """The check saw space that another process took: one line, no final name, and the same command goes on."""
    size = sum(file.stat().st_size for file in llama.iterdir())
    with small_disk(tmp_path / "disk", 2 * size // 1024) as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(int(1.5 * size)))
        monkeypatch.setattr("conversion.atomic.free_bytes", lambda path: 10 * size)
        arguments = (f"from=hf:{llama}", f"to=nemo:{disk / 'nemo'}", "verify=false", "workers=1")
        assert call(*arguments) == 2
        error = capsys.readouterr().err
        assert "is full: make space, the same command goes on" in error and error.count("\n") == 1
        assert not (disk / "nemo").exists() and (disk / ".nemo.unfinished").is_dir()
        ballast.unlink()
        assert call(*arguments) == 0
        assert sorted(path.name for path in disk.iterdir()) == ["nemo"]


def test_gguf(tmp_path, capsys):
    """Out and in, from and to both formats; what lies hidden beside the target on the way is gone afterwards."""
    hf = tiny("llama", tmp_path / "hf")
    paths = {name: tmp_path / name for name in ("a.gguf", "b.gguf", "nemo", "back", "again")}
    assert call(f"from=hf:{hf}", f"to=gguf:{paths['a.gguf']}", "dtype=f32") == 0
    assert call(f"from=gguf:{paths['a.gguf']}", f"to=hf:{paths['back']}") == 0
    assert call(f"from=gguf:{paths['a.gguf']}", f"to=nemo:{paths['nemo']}") == 0
    assert call(f"from=nemo:{paths['nemo']}", f"to=gguf:{paths['b.gguf']}", "dtype=q8_0") == 0
    assert call(f"from=nemo:{paths['nemo']}", f"to=hf:{paths['again']}", "verify=false") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["hf", *paths])
    for name in ("nemo", "back"):
        record = json.loads((paths[name] / "conversion.json").read_text())
        assert record["source"] == f"gguf:{paths['a.gguf']}" and record["verified"]
    before, *others = (load_file(folder / "model.safetensors") for folder in (hf, paths["back"], paths["again"]))
    for after in others:
        assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    names = [GGUFReader(paths[name]).get_field("general.name").contents() for name in ("a.gguf", "b.gguf")]
    assert names == ["Hf", "nemo"]
    assert "not verified" in capsys.readouterr().out
