"""Small tokenizers with the pre-tokenizers of the families trained here, and text that tells encoders apart."""

import json
import os
import random

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
PROSE = (
    "The quick brown fox jumps over the lazy dog; it wasn't amused. In 1984, 12,345 people read it.\n\n"
    "def f(x, y=0):\n    return [x ** 2 for _ in range(10)]  # squares\n\n\tTabbed\r\nCRLF  two   three spaces\n"
    "भारत एक विशाल देश है। यहाँ 22 भाषाएँ बोली जाती हैं, और २०११ में गिनती हुई।\n"
    "ಕನ್ನಡ ಒಂದು ದ್ರಾವಿಡ ಭಾಷೆ. ಕರ್ನಾಟಕದಲ್ಲಿ ಕೋಟ್ಯಂತರ ಜನರು ಮಾತನಾಡುತ್ತಾರೆ.\n"
    "👩‍👩‍👧‍👦🏽 emoji 🎉🎉, 漢字かな交じり文, العربية ٣٤٥, עברית, Ünïcödé, e\u0301 é, ½ Ⅷ \u00a0\u3000\u2028 end\n"
)


def varied_texts(count: int) -> list[str]:
    """Deterministic texts of mixed scripts, digits, odd white space, control characters and special tokens."""
    rng = random.Random(7)
    ranges = [
        (0x20, 0x7F),
        (0x20, 0x7F),
        (0x900, 0x97F),
        (0xC80, 0xCFF),
        (0x1F300, 0x1F6FF),
        (0x4E00, 0x4FFF),
        (0x600, 0x6FF),
        (0x2000, 0x206F),
        (0x300, 0x36F),
        (0, 0x20),
        (0xA0, 0x17F),
        (0xAC00, 0xAC80),
        (0x2160, 0x2188),
        (0xF0000, 0xF0010),
    ]
    gaps = ["", " ", "  ", "\n", "\n\n", "\t", " \n ", "\r\n", "'s", "'LL", "123", "...", "   \n", "\u00a0", "\u3000", "<|eos|>"]
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 40)):
            low, high = rng.choice(ranges)
            parts += [chr(rng.randint(low, high)) for _ in range(rng.randint(1, 9))] + [rng.choice(gaps)]
        texts.append("".join(parts))
    words = PROSE.split(" ")
    return texts + [PROSE] + [" ".join(rng.choices(words, k=rng.randint(5, 300))) for _ in range(count // 4)]


def train_tokenizer(folder, family: str, vocab_size: int = 900):
    """Write a tokenizer folder in the manner of a family: "llama3", "qwen2", "gpt2", "smollm"."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=family == "llama3"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family in ("gpt2", "smollm"))
    if family in ("llama3", "qwen2"):
        split = pre_tokenizers.Split(Regex(LLAMA3 if family == "llama3" else QWEN2), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    elif family == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    if family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    # As in SmolLM2, "smollm" lacks bytes that its training text did not have.
    alphabet = [] if family == "smollm" else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|bos|>", "<|eos|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([PROSE] * 4 + varied_texts(200), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eos|>", "bos_token": "<|bos|>"})
    )
    return folder


def die(job, task):
    """What a worker that the kernel kills does."""
    os._exit(9)
