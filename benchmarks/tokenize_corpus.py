"""Tokenising a corpus into Megatron's indexed format: `nemo_ext.data.corpus.prepare` against two references, on the same text.

    python benchmarks/tokenize_corpus.py tokenizer=FOLDER [megabytes=30] [cores=1,2] [out=benchmarks/results/tokenize_corpus.json]

References: Megatron-Core's IndexedDatasetBuilder fed by one process with the Hugging Face tokenizer, document by document, as
Megatron's own preprocessing does; and `datasets.map(batched=True)` with the same tokenizer (timed without loading the JSON
lines into Arrow, and without any .bin/.idx at the end). Ours is timed whole: hashing, the proof that the fast encoder is exact,
reading, encoding, joining, fsync. Every contender runs in a process of its own, bound to its cores. The text is the built-in
`python-docs`, sources of the standard library, and a tenth of Hindi and Kannada sentences put together at random; little is
repeated, since encoders remember words. The run fails if ours and Megatron's files are not equal byte for byte.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

INDIC = (
    "भारत एक विशाल देश है और यहाँ की संस्कृति बहुत पुरानी है । लोग अनेक "
    "भाषाएँ बोलते हैं तथा त्योहार साथ मनाते हैं किसान खेत में सुबह से शाम तक "
    "काम करते हुए गीत गाते बच्चों को विद्यालय में गणित विज्ञान इतिहास पढ़ाया "
    "जाता था , नदी के किनारे बसा गाँव २०११ में जनगणना हुई स्वतंत्रता संग्राम "
    "राज्यों ಕನ್ನಡ ಒಂದು ದ್ರಾವಿಡ ಭಾಷೆ . ಕರ್ನಾಟಕದಲ್ಲಿ ಕೋಟ್ಯಂತರ ಜನರು "
    "ಮಾತನಾಡುತ್ತಾರೆ ಸಾಹಿತ್ಯ ಬಹಳ ಶ್ರೀಮಂತವಾಗಿದೆ ಬೆಂಗಳೂರು ನಗರವು ತಂತ್ರಜ್ಞಾನಕ್ಕೆ "
    "ಪ್ರಸಿದ್ಧ ಮಳೆ ಬಂದಾಗ ರೈತರು ಸಂತೋಷಪಡುತ್ತಾರೆ "
).split()


def write_corpus(path: Path, megabytes: float) -> tuple[int, int]:
    """Write the text as JSON lines. Returns bytes of text and documents."""
    from nemo_ext.data import stdlib_docs

    rng = random.Random(0)
    limit, size, count = int(megabytes * 1e6), 0, 0
    sources = sorted(p for p in Path(sysconfig.get_path("stdlib")).rglob("*.py") if "site-packages" not in p.parts)
    indic = (" ".join(rng.choices(INDIC, k=400)) for _ in range(int(limit * 0.1 / 6500)))
    sources = (p.read_bytes().decode("utf-8", "ignore") for p in sources)
    with open(path, "w", encoding="utf-8") as file:
        for texts in ((text for _, text in stdlib_docs.documents()), indic, sources):
            for text in texts:
                if size >= limit:
                    break
                if text.strip():
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    size, count = size + len(text.encode()), count + 1
    return size, count


class Clock:
    """Wall clock and processor seconds of this process and those it has waited for."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), self._cpu()

    @staticmethod
    def _cpu() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in usages)

    def read(self) -> dict:
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": self._cpu() - self.cpu}


def run_ours(data: str, tokenizer: str, out: str, cores: int) -> dict:
    from nemo_ext.data.corpus import prepare
    from nemo_ext.data.sources import parse

    clock = Clock()
    corpus = prepare(parse(data), tokenizer, out, heldout=0, seq_length=128, workers=cores)
    return {
        **clock.read(),
        "tokens": corpus.train_tokens,
        "prefix": corpus.sources[0].train_prefix,
        "encoder": corpus.encoder,
    }


def run_megatron(data: str, tokenizer: str, out: str, cores: int) -> dict:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from transformers import AutoTokenizer

    clock = Clock()
    hf = AutoTokenizer.from_pretrained(tokenizer)
    builder = IndexedDatasetBuilder(f"{out}/m.bin", dtype=DType.optimal_dtype(len(hf)))
    tokens = 0
    with open(data, encoding="utf-8") as file:
        for line in file:
            ids = hf(json.loads(line)["text"], add_special_tokens=False)["input_ids"] + [hf.eos_token_id]
            builder.add_document(torch.IntTensor(ids), [len(ids)])
            tokens += len(ids)
    builder.finalize(f"{out}/m.idx")
    return {**clock.read(), "tokens": tokens, "prefix": f"{out}/m"}


def run_datasets(data: str, tokenizer: str, out: str, cores: int) -> dict:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    loaded = datasets.Dataset.from_json(data, cache_dir=out)
    clock = Clock()
    hf = AutoTokenizer.from_pretrained(tokenizer)

    def encode(batch: dict) -> dict:
        return {"ids": [ids + [hf.eos_token_id] for ids in hf(batch["text"], add_special_tokens=False)["input_ids"]]}

    mapped = loaded.map(
        encode,
        batched=True,
        remove_columns=["text"],
        num_proc=cores if cores > 1 else None,
        cache_file_name=f"{out}/mapped.arrow",
    )
    measured = clock.read()
    return {**measured, "tokens": sum(map(len, mapped["ids"]))}


CONTENDERS = {"ours": run_ours, "megatron_builder": run_megatron, "datasets_map": run_datasets}


def contend(name: str, data: str, tokenizer: str, out: str, cores: int) -> None:
    """In a process of its own: bind to the first cores, run, print the result."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    print("RESULT", json.dumps(CONTENDERS[name](data, tokenizer, out, cores)))


def measure(name: str, data: Path, size: int, tokenizer: str, folder: Path, cores: int) -> dict:
    out = folder / f"{name}-{cores}"
    out.mkdir()
    environment = {
        **os.environ,
        "RAYON_NUM_THREADS": str(cores),
        "OMP_NUM_THREADS": str(cores),
        "TOKENIZERS_PARALLELISM": "true" if name == "datasets_map" else "false",
    }
    command = [sys.executable, __file__, "--contend", name, str(data), tokenizer, str(out), str(cores)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{name} on {cores} cores failed:\n{done.stderr[-2000:]}")
    result = {"contender": name, "cores": cores, **json.loads(lines[0][7:])}
    result["mb_per_s_per_core"] = size / 1e6 / result["seconds"] / cores
    result["mb_per_cpu_second"] = size / 1e6 / result["cpu_seconds"]
    result["tokens_per_s_per_core"] = result["tokens"] / result["seconds"] / cores
    print(
        f"{name:17s} {cores} core(s) {result['seconds']:7.1f} s {result['mb_per_s_per_core']:7.2f} MB/s/core "
        f"{result['tokens_per_s_per_core']:11,.0f} tokens/s/core {result['mb_per_cpu_second']:7.2f} MB per CPU second",
        flush=True,
    )
    return result


def same_files(first: str, second: str) -> bool:
    return all(Path(first + suffix).read_bytes() == Path(second + suffix).read_bytes() for suffix in (".bin", ".idx"))


def main() -> None:
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    tokenizer = settings["tokenizer"]
    target = Path(settings.get("out", ROOT / "benchmarks/results/tokenize_corpus.json"))
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = folder / "corpus.jsonl"
        size, documents = write_corpus(data, float(settings.get("megabytes", 30)))
        results = []
        for cores in map(int, settings.get("cores", "1,2").split(",")):
            rows = {name: measure(name, data, size, tokenizer, folder, cores) for name in CONTENDERS}
            if not same_files(rows["ours"]["prefix"], rows["megatron_builder"]["prefix"]):
                sys.exit("ours and Megatron's builder wrote different files")
            references = [rows["megatron_builder"], rows["datasets_map"]]
            for figure in ("mb_per_s_per_core", "mb_per_cpu_second"):
                rows["ours"][f"times_the_faster_reference_{figure}"] = rows["ours"][figure] / max(r[figure] for r in references)
            print(
                f"ours: {rows['ours']['times_the_faster_reference_mb_per_s_per_core']:.1f} times the faster reference, per core; "
                f"{rows['ours']['times_the_faster_reference_mb_per_cpu_second']:.1f} times by CPU seconds"
            )
            results += [{k: v for k, v in row.items() if k != "prefix"} for row in rows.values()]
    report = {
        "date": datetime.date.today().isoformat(),
        "hardware": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "load_average_before": load_before,
            "load_average_after": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version()}
        | {
            p: importlib.metadata.version(p)
            for p in ("tokenizers", "fastokens", "transformers", "datasets", "megatron-core", "numpy", "torch")
        },
        "text": {
            "bytes": size,
            "documents": documents,
            "vocabulary": len(json.loads((Path(tokenizer) / "tokenizer.json").read_text())["model"]["vocab"]),
        },
        "files_equal_to_megatron_builder": True,
        "results": results,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=2) + "\n")
    print(target)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contend"]:
        name, data, tokenizer, out, cores = sys.argv[2:]
        contend(name, data, tokenizer, out, int(cores))
    else:
        main()
