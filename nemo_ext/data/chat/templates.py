"""Chat templates for tokenizers that have none, by name.

Written for this project. `{end}` is what ends a turn: the template's own token where the vocabulary has it, else the tokenizer's
end-of-sequence token, so that a base model learns to stop with a single token it knows.
"""

from __future__ import annotations

DEFAULT = "chatml"

_TOOLS = (
    "{%- if tools %}{{ '\\n\\nFunctions you may call:' }}{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{%- endfor %}"
    '{{ \'\\nTo call one, write <tool_call>{"name": name, "arguments": {...}}</tool_call>.\' }}{%- endif %}'
)
_CALLS = (
    "{%- for call in message.tool_calls or [] %}{{ '<tool_call>' + ({'name': call.function.name, 'arguments': "
    "call.function.arguments} | tojson) + '</tool_call>' }}{%- endfor %}"
)


def _template(head: str, foot: str, prompt: str) -> str:
    """A template of turns `head`, content, calls, `foot`; tools are told in the system turn, added where missing."""
    system = f"{{%- set role = 'system' %}}{head}"
    return (
        "{start}"
        f"{{%- if tools and messages[0].role != 'system' %}}{system}{{{{ 'You are a helpful assistant.' }}}}{_TOOLS}{foot}"
        "{%- endif %}"
        f"{{%- for message in messages %}}{{%- set role = message.role %}}{head}{{{{ message.content or '' }}}}"
        f"{{%- if loop.first and role == 'system' %}}{_TOOLS}{{%- endif %}}{_CALLS}{foot}{{%- endfor %}}"
        f"{{%- if add_generation_prompt %}}{{%- set role = 'assistant' %}}{prompt}{{%- endif %}}"
    )


# name: (template, its own end-of-turn token or None for the tokenizer's eos)
_CHATML = "{{ '<|im_start|>' + role + '\\n' }}"
_LLAMA3 = "{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}"
_ZEPHYR = "{{ '<|' + role + '|>\\n' }}"
_ALPACA_NAMES = "{'user': 'Instruction', 'assistant': 'Response', 'tool': 'Result'}"
_ALPACA = f"{{{{ '' if role == 'system' else '### ' + {_ALPACA_NAMES}[role] + ':\\n' }}}}"
_ALPACA_FOOT = "{{ '{end}\\n\\n' if role == 'assistant' else '\\n\\n' }}"

TEMPLATES: dict[str, tuple[str, str | None]] = {
    "chatml": (_template(_CHATML, "{{ '{end}\\n' }}", _CHATML), "<|im_end|>"),
    "llama3": (_template(_LLAMA3, "{{ '{end}' }}", _LLAMA3), "<|eot_id|>"),
    "zephyr": (_template(_ZEPHYR, "{{ '{end}\\n' }}", _ZEPHYR), None),
    "alpaca": (_template(_ALPACA, _ALPACA_FOOT, _ALPACA), None),
    "plain": (_template("", "{{ '{end}' if role == 'assistant' else '\\n' }}", ""), None),  # LLaVA's for captions: no roles
}


def named(name: str, *, bos: str | None, eos: str, vocabulary: dict[str, int]) -> str:
    """The template `name` (of TEMPLATES) for a tokenizer: `bos` is the text it begins with, None where it begins with none."""
    template, end = TEMPLATES[name]
    end = end if end is not None and end in vocabulary else eos
    return template.replace("{start}", bos or "").replace("{end}", end)
