import json

import pytest
import torch


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A folder with a small random Llama (float32, grouped queries, every width a multiple of 64) and a byte-level tokenizer."""
    import transformers as tf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=258, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, attention_bias=True,
        bos_token_id=256, eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.mul_(3.0)
            if name.endswith(("down_proj.weight", "k_proj.weight")):  # channels that stand out, as real models have them
                parameter[:, ::17] *= 4.0
    model.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts_file(tmp_path_factory):
    """Forty documents of random words as JSONL."""
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    generator = torch.Generator().manual_seed(0)
    words = ["water", "stone", "the", "of", "river", "and", "runs", "falls", "under", "old"]
    lines = []
    for _ in range(40):
        chosen = torch.randint(len(words), (60,), generator=generator)
        lines.append(json.dumps({"text": " ".join(words[i] for i in chosen)}))
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="session")
def ids():
    """Token ids `[8, 48]`."""
    return torch.randint(256, (8, 48), generator=torch.Generator().manual_seed(1))
