"""Models that see or hear through the command: adapters trained, killed, gone on with, exported; what is refused in one line."""

from __future__ import annotations

import json
import random
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from commands import Command, figures, same, saved

from launchers import local, run, senses
from nemo_ext import platform, run_folder

platform.activate()

SIZES = dict(vocab_size=576, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256)  # fmt: skip
TOWER = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4)
EARS = dict(hidden_size=24, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_mel_bins=80,
            max_source_positions=1500)  # fmt: skip


def tokenizer(small, folder, placeholder: str) -> int:
    """Put a tokenizer with a placeholder into a model's folder; the placeholder's id."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(small.tokenizer)
    words.add_special_tokens({"additional_special_tokens": [placeholder]})
    words.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    words.save_pretrained(folder)
    return words.convert_tokens_to_ids(placeholder)


@pytest.fixture(scope="module")
def llava(small, tmp_path_factory) -> SimpleNamespace:
    """A small LLaVA with its processor, pictures of one colour, and the keys of a run that trains both its adapters."""
    import transformers as tf
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("llava"), random.Random(1)
    token = tokenizer(small, folder / "base", "<image>")
    torch.manual_seed(1)
    config = tf.LlavaConfig(tf.SiglipVisionConfig(**TOWER), tf.LlamaConfig(**SIZES), image_token_index=token, image_seq_length=16,
                            vision_feature_select_strategy="full")  # fmt: skip
    tf.LlavaForConditionalGeneration(config).save_pretrained(folder / "base")
    tf.SiglipImageProcessor(size=dict(height=16, width=16)).save_pretrained(folder / "base")
    records = []
    for number in range(40):
        Image.new("RGB", (20, 24), tuple(rng.randrange(256) for _ in range(3))).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"A class of {rng.choice('abc')}"}]
        records.append({"image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    keys = (
        f"recipe=neva_llama3 model=hf:{folder / 'base'} data={folder / 'data.json'} seq=64 global_batch=4 micro_batch=2 steps=6 "
        "every=2 lr=1e-2 rank=4 stage=instruct train_language=lora train_tower=lora heldout=0.2 val_batches=4 tensorboard=false "
        "preview=0 answers=1"
    )
    return SimpleNamespace(folder=folder, base=folder / "base", keys=keys.split(), cache=small.cache)


@pytest.fixture(scope="module")
def whole(llava, tmp_path_factory):
    """What the command said that ran to its end and exported."""
    found = Command(llava, f"out={tmp_path_factory.mktemp('runs') / 'whole'}", "export=hf").end()
    assert found.code == 0, found.error
    return found


@pytest.mark.slow
def test_a_killed_run_goes_on_exactly(llava, whole, tmp_path):
    """Its launcher and workers are killed after a checkpoint."""
    first = Command(llava, f"out={tmp_path}").when(saved(2))
    first.process.send_signal(signal.SIGKILL)
    first.end()
    again = Command(llava, f"out={tmp_path}").end()
    assert again.code == 0 and "continuing" in again.output, again.error
    assert run_folder.read_json(again.out / "summary.json")["resumed_from_step"] in (2, 4)
    same(figures(whole.out), figures(again.out), 0.0)


def test_operations_of_the_tower_are_counted(whole):
    """What of a step's operations is not the language model's are those of a whole number of images."""
    from nemo_ext import adapters
    from nemo_ext.architecture import Architecture
    from nemo_ext.data.multimodal import inputs
    from nemo_ext.multimodal.flops import trained_flops
    from nemo_ext.multimodal.freezing import Trained

    job = json.loads((whole.out / "job.json").read_text())
    a, sense = Architecture(**job["architecture"]), inputs.from_dict(job["senses"][0]).sense
    trained = adapters.trained(a, "lora", job["keys"])
    each = trained_flops(sense, a.hidden_size, Trained("lora", "lora"), 4)
    for record in run_folder.read_records(whole.out)[0]:
        total = record["tflops"] * record["step_time"] * 1e12
        images = (total - 4 * 64 * a.flops_per_token(64, trained)) / each
        assert abs(images - round(images)) < 1e-6 and 4 <= round(images) <= 12


def heldout_loss(model, out) -> float:
    """The mean loss of all learnt held-out tokens, conversation by conversation, by transformers' model."""
    from nemo_ext.data.multimodal import inputs
    from nemo_ext.data.multimodal.store import Samples

    job, total, weight = json.loads((out / "job.json").read_text()), 0.0, 0.0
    source = inputs.from_dict(job["senses"][0])
    for _, _, heldout in job["blend"]:
        samples = Samples(heldout)
        for ids, weights, media in (samples[number] for number in range(len(samples))):
            pixels = torch.cat([torch.from_numpy(source.inputs(each.location.read(), each.shape)) for each in media])
            ids, counts = torch.from_numpy(ids), torch.from_numpy(weights.astype("float32"))[1:]
            with torch.no_grad():
                logits = model(input_ids=ids[None], pixel_values=pixels).logits[0, :-1]
            each = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            total, weight = total + (each * counts).sum().item(), weight + counts.sum().item()
    return total / weight


def test_the_exports_give_the_runs_losses_in_transformers(whole, llava):
    from peft import PeftModel
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    assert "verified: logits differ from PEFT's" in whole.output
    losses = [record["val_loss"] for record in run_folder.read_records(whole.out)[1]]
    base = LlavaForConditionalGeneration.from_pretrained(llava.base).eval()
    assert abs(heldout_loss(base, whole.out) - losses[0]) < 1e-5
    merged = LlavaForConditionalGeneration.from_pretrained(whole.out / "hf").eval()
    assert abs(heldout_loss(merged, whole.out) - losses[-1]) < 1e-5
    assert losses[-1] < losses[0] - 0.1
    adapted = PeftModel.from_pretrained(base, whole.out / "lora").eval()
    assert abs(heldout_loss(adapted, whole.out) - losses[-1]) < 1e-5
    assert AutoProcessor.from_pretrained(whole.out / "hf").image_processor.size == {"height": 16, "width": 16}
    (answer,) = run_folder.read_json(whole.out / "summary.json")["answers"]
    assert answer["before"] is not None and answer["after"] is not None and (whole.out / answer["image"]).is_file()


@pytest.fixture(scope="module")
def voxtral(small, tmp_path_factory) -> SimpleNamespace:
    """A small Voxtral with its feature extractor, and the keys of a run."""
    import transformers as tf

    folder = tmp_path_factory.mktemp("voxtral")
    token = tokenizer(small, folder / "base", "<audio>")
    config = tf.VoxtralConfig(tf.VoxtralEncoderConfig(**EARS), tf.LlamaConfig(**SIZES), audio_token_id=token)
    tf.VoxtralForConditionalGeneration(config).save_pretrained(folder / "base")
    tf.WhisperFeatureExtractor(feature_size=80).save_pretrained(folder / "base")
    keys = f"recipe=alm_llama3 model=hf:{folder / 'base'} seq=64 steps=2 global_batch=4 preview=0"
    return SimpleNamespace(folder=folder, keys=keys.split(), cache=small.cache)


@pytest.mark.parametrize(
    ("which", "record", "says"),
    [
        ("llava", {"image": "none.png", "text": "<image>What?"}, r"data\.json, record 2: .*none\.png"),
        ("llava", {"image": "text.png", "text": "<image>What?"}, r"data\.json, record 2: .*text\.png"),
        ("llava", {"image": "0.png", "text": "<image><image>What?"}, r"data\.json, record 2: 1 image for 2 <image>"),
        ("voxtral", {"audio": "text.wav", "text": "<audio>What?"}, r"data\.json, record 2: .*text\.wav"),
    ],
)
def test_a_bad_sample_is_named_in_one_line(llava, voxtral, which, record, says, tmp_path, monkeypatch, capsys):
    model = {"llava": llava, "voxtral": voxtral}[which]
    monkeypatch.setenv("LLM_BUILDER_CACHE", str(model.cache))
    monkeypatch.setattr(local, "run", lambda *args, **kwargs: pytest.fail("trains"))
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "0.png").write_bytes((llava.folder / "0.png").read_bytes())
    words = record.pop("text")
    turns = [{"from": "human", "value": words}, {"from": "gpt", "value": "A."}]
    plain = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A."}]}
    (tmp_path / "data.json").write_text(json.dumps([plain, {**record, "conversations": turns}]))
    keys = [key for key in model.keys if not key.startswith("data=")]
    assert run.main([*keys, f"data={tmp_path / 'data.json'}", "skip_bad=false", f"out={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and re.search(says, error), error


def test_data_that_is_not_there_is_said_before_a_model_is_made(llava, tmp_path, monkeypatch, capsys):
    for name in ("request", "whole"):
        monkeypatch.setattr(senses, name, lambda *args, **kwargs: pytest.fail("makes a model"))
    keys = [key for key in llava.keys if not key.startswith("data=")]
    assert run.main([*keys, "data=/nowhere.json", f"out={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "/nowhere.json" in error, error
