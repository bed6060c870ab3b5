import io
import json

import pytest
from chat_samples import THINKING, turns

from nemo_ext.data.chat.preview import PARTLY, TRAINED, coloured, examples, show
from nemo_ext.data.chat.render import Renderer, Settings
from nemo_ext.data.sources import RECORDS, parse
from nemo_ext.errors import UserError


@pytest.fixture()
def chat(tmp_path):
    messages = turns("Hi", "Hello!", "Bye", "<think>So soon.</think>Now", system="Be brief.")
    messages[2]["weight"] = 0.5
    rows = [{"messages": messages}, {"question": "2+2?", "answer": "4"}, {"instruction": "x", "output": "y"}]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    return parse(str(tmp_path / "chat.json"), RECORDS)


def test_trained_text_is_coloured(bare, chat):
    tokenizer = Renderer(bare, Settings(256)).tokenizer
    first, second = examples(chat, bare, Settings(256), count=2)
    assert first.title().startswith(f"{chat[0].name}, record 1: format messages with reasoning, system prompt; template chatml; ")
    assert "format completion; template chatml" in second.title()
    text = coloured(first, tokenizer)
    by_style = {
        style: "".join(text.plain[s.start : s.end] for s in text.spans if s.style == style) for style in (TRAINED, PARTLY)
    }
    assert by_style == {PARTLY: "Hello!<|im_end|>", TRAINED: "<think>\nSo soon.\n</think>\n\nNow<|im_end|>"}
    assert text.plain.partition("\n")[2] == first.samples[0].text.join(["", "\n"])


def test_it_prints(tmp_path, bare, chat):
    from rich.console import Console

    (tmp_path / "thinking").write_text(THINKING)
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    show(chat, bare, Settings(256, template=str(tmp_path / "thinking")), count=1, console=console)
    printed = console.file.getvalue()
    assert "sample 1 of 2" in printed and "\x1b[32m" in printed
    assert "dropped: overlong" in next(examples(chat, bare, Settings(4))).title()
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(UserError, match="no conversations in it"):
        show(parse(str(tmp_path / "empty.json"), RECORDS), bare, Settings(256))
