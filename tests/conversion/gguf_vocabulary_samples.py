"""A SentencePiece vocabulary like Gemma's, trained in a second, and the slow reference that says which ids llama.cpp gives.

`encode` follows the algorithm of llama.cpp's SPM tokenizer (src/llama-vocab.cpp) as it is described, not as it is written
there: special tokens are cut out from the longest to the shortest, and in what is left the neighbours whose union has the
highest score are united, the leftmost of equals, until no union is a token; what is no token becomes its bytes.
"""

from __future__ import annotations

import io
import random

TEXTS = {
    "English": "The sun is a star at the centre of our solar system, isn't it? It gives us light and heat.",
    "Hindi": "नमस्ते दुनिया, यह एक परीक्षण है। १२३ ज़िंदगी क्षेत्र",
    "Kannada": "ಕನ್ನಡ ಭಾಷೆಯು ಕರ್ನಾಟಕದ ಅಧಿಕೃತ ಭಾಷೆ. ಸೂರ್ಯನು ಒಂದು ನಕ್ಷತ್ರ, ೧೨೩",
    "emoji": "👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ❤️‍🔥 🙂🙂🙂",
    "code": 'def f(x: int) -> str:\n\treturn f"{x**2:>10}"  # 3.14\n\n\n\r\n        pass',
    "spaces": "  leading,   inner \u00a0 and trailing     ",
    "only spaces": "       ",
    "newlines": "\n\n\n\nfour\n\n\nthree\n",
    "numbers": "In 1984, 12345.678 km² and ½ of ②",
    "bytes": "\x00\x01\x7f\u0080 ÿ \ufffd €",
    "combining": "e\u0301 vs \u00e9; \u202ertl\u202c; 한국어; 日本語",
    "sentencepiece's own space": "a▁b ▁▁ c",
    "special tokens": "<bos>user<start_of_turn> hello <end_of_turn>\n<b>bold</b> <unk><eos>",
    "almost special": "<bos <start_of_turn <0x41> < b> [PAD3]",
    "empty": "",
    "one letter": "a",
    "repetition": "aaaaaaaaaaaaaaa ababababababab lalalalalala !!!!!!!!!!!",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def metadata(add_space_prefix: bool = False, vocab_size: int = 900) -> dict:
    """The tokenizer.* metadata of a freshly trained SentencePiece BPE with byte fallback, in llama.cpp's form."""
    import sentencepiece

    generator, unseen = random.Random(0), ("emoji", "combining", "bytes")  # which become bytes
    words = [word for name, text in TEXTS.items() if name not in unseen for word in text.split(" ") if "<" not in word]
    sentences = [" ".join(generator.choices(words, k=12)) for _ in range(400)] + ["aaaa " * 9, "abab " * 9]
    symbols = ["<b>", "</b>", *("\n" * n for n in range(1, 4)), *("▁" * n for n in range(2, 7))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=vocab_size, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=add_space_prefix,
        character_coverage=1.0, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", control_symbols=["<start_of_turn>", "<end_of_turn>"], minloglevel=2,
        user_defined_symbols=symbols,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokens, types = [], []
    for i in range(processor.get_piece_size()):
        token = processor.id_to_piece(i)
        kind = (
            BYTE
            if processor.is_byte(i)
            else UNKNOWN
            if processor.is_unknown(i)
            else CONTROL
            if processor.is_control(i)
            else NORMAL
        )
        if token in symbols:
            token, kind = token.replace("▁", " "), USER_DEFINED
        tokens.append(token)
        types.append(kind)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-1000.0 if k == USER_DEFINED else processor.get_score(i) for i, k in enumerate(types)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}<start_of_turn>{{ m['content'] }}<end_of_turn>{% endfor %}",
    }


def encode(metadata: dict, text: str) -> list[int]:
    """The ids that llama.cpp gives for `text` with add_special and parse_special."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    index = {token: i for i, token in enumerate(tokens)}
    special = sorted((i for i, kind in enumerate(types) if kind in (UNKNOWN, CONTROL, USER_DEFINED)),
                     key=lambda i: len(tokens[i].encode()), reverse=True)  # fmt: skip
    fragments: list[str | int] = [text]
    for i in special:
        cut: list[str | int] = []
        for fragment in fragments:
            if isinstance(fragment, int):
                cut.append(fragment)
                continue
            for n, part in enumerate(fragment.split(tokens[i])):
                cut += [i, part] if n else [part]
        fragments = [fragment for fragment in cut if fragment != ""]
    ids = [metadata["tokenizer.ggml.bos_token_id"]] if metadata["tokenizer.ggml.add_bos_token"] else []
    for n, fragment in enumerate(fragments):
        if isinstance(fragment, int):
            ids.append(fragment)
            continue
        after_special = n == 0 or isinstance(fragments[n - 1], int)
        prefix = " " if metadata["tokenizer.ggml.add_space_prefix"] and after_special else ""
        ids += _pieces(metadata, index, (prefix + fragment).replace(" ", "▁"))
    return ids + ([metadata["tokenizer.ggml.eos_token_id"]] if metadata["tokenizer.ggml.add_eos_token"] else [])


def _pieces(metadata: dict, index: dict[str, int], text: str) -> list[int]:
    symbols, scores = list(text), metadata["tokenizer.ggml.scores"]
    while True:
        unions = [(scores[index[left + right]], -n) for n, (left, right) in enumerate(zip(symbols, symbols[1:], strict=False))
                  if left + right in index]  # fmt: skip
        if not unions:
            break
        n = -max(unions)[1]
        symbols[n : n + 2] = [symbols[n] + symbols[n + 1]]
    found = []
    for symbol in symbols:
        found += [index[symbol]] if symbol in index else [index[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found
