"""A random Llama with a byte tokenizer, its engine, and a server over it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import httpx
import pytest

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if tools %}<|tools|>{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=256, bos_token_id=257, eos_token_id=256, pad_token_id=256)  # fmt: skip
SPREAD = 0.4  # of the weights: enough that greedy answers do not repeat one token


def tokenizer():
    """One token a byte, and three special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["<|end|>", "<|start|>", "<|assistant|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=built, eos_token="<|end|>", bos_token="<|start|>", chat_template=TEMPLATE, model_max_length=256
    )


def save_model(folder: Path, config=None, seed: int = 0) -> Path:
    """Write a random model with the tokenizer into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(vocab_size=260, **SIZES))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, SPREAD if "embed" not in name else 1.0)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def transformers_imports() -> None:
    """What deploy/serve.py does before transformers is imported."""
    from nemo_ext.platform import cpu_torch, hardware

    if not hardware.has_cuda():
        cpu_torch.declare_torchvision_ops()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, transformers_imports) -> Path:
    """The folder of the random Llama."""
    return save_model(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="session")
def reference(tiny):
    """The same model in transformers, on the CPU."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def engine(tiny):
    """An engine with few rows and short chunks, so that requests wait, and prompts are read in pieces."""
    from deploy.engine.engine import Engine

    engine = Engine(tiny, rows=4, prefill_tokens=24, max_waiting=32, dtype="float32")
    yield engine
    engine.close()


class Answers:
    """Collects the outputs of one request."""

    def __init__(self, engine, request) -> None:
        self.outputs: list = []
        self._left, self._done = request.n, threading.Event()
        self.number = engine.submit(request, self._take)

    def _take(self, output) -> None:
        self.outputs.append(output)
        if output.finish is not None:
            self._left -= 1
            if not self._left:
                self._done.set()

    def wait(self, seconds: float = 60.0) -> Answers:
        """Until all answers have ended."""
        assert self._done.wait(seconds), "no answer"
        return self

    def ids(self, index: int = 0) -> list[int]:
        return [id for output in self.outputs if output.index == index for id in output.ids]

    def text(self, index: int = 0) -> str:
        return "".join(output.text for output in self.outputs if output.index == index)

    def finish(self, index: int = 0) -> str:
        return next(output.finish for output in self.outputs if output.index == index and output.finish)


def ask_with_media(engine, kind: str, sources: list[tuple[str, str]], text: str, new: int) -> Answers:
    """A greedy answer of at most `new` tokens to `text` after media: `kind` as chat templates call them (image or audio), and
    `sources` as the API does."""
    from deploy.engine.request import Request, Sampling

    parts = [*[{"type": kind}] * len(sources), {"type": "text", "text": text}]
    messages, media = [{"role": "user", "content": parts if sources else text}], ()
    if sources:
        prompt, media = engine.prompts.chat_with_media(messages, sources)
    else:
        prompt = engine.prompts.chat(messages)
    return Answers(engine, Request(prompt, new, Sampling(temperature=0), media=media))


@pytest.fixture(scope="session")
def ask(engine):
    """Submit a request to the shared engine."""
    return lambda request: Answers(engine, request)


@pytest.fixture
def baseline(engine):
    """Afterwards the engine is as empty as before."""
    yield
    deadline = time.monotonic() + 60
    while (stats := engine.stats()).running or stats.waiting:
        assert time.monotonic() < deadline, stats
        time.sleep(0.01)
    assert engine.stats().cached_tokens == 0


class Served:
    """A server in a thread of this process."""

    def __init__(self, service, keys=None) -> None:
        from deploy.listening import Server, bind
        from deploy.server import create_app

        self.service = service
        self._socket = bind("127.0.0.1", 0)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = Server(create_app(service, keys), service)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        self.client = httpx.Client(base_url=self.url, timeout=60)
        while not self.server.started:
            time.sleep(0.01)

    def post(self, path: str, **body) -> httpx.Response:
        return self.client.post(path, json={"model": self.service.name, **body})

    def chat(self, text: str = "hi", **body) -> httpx.Response:
        return self.post("/v1/chat/completions", messages=[{"role": "user", "content": text}], **body)

    def complete(self, prompt="hi", **body) -> httpx.Response:
        return self.post("/v1/completions", prompt=prompt, **body)

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self._thread.join(10)
        self._socket.close()


@pytest.fixture(scope="session")
def served(engine):
    """A server over the shared engine."""
    from deploy.limits import Limits
    from deploy.server import Service

    served = Served(Service(engine, "tiny", Limits(body_bytes=20_000, max_tokens=200, request_seconds=30)))
    yield served
    served.close()
