"""The rewards `judge`, against a server on this machine, and `model`, against Hugging Face."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from nemo_ext import rewards
from nemo_ext.errors import UserError


@pytest.fixture
def server():
    """An endpoint: `server.rule(text of the request)` gives (status, reply)."""
    state = SimpleNamespace(seen=[], rule=lambda text: (200, "Rating: 10"), url="")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][-1]["content"]
            state.seen.append(text)
            status, reply = state.rule(text)
            if reply is None:  # drip for ever: each byte comes in time, the reply never does
                self.send_response(200)
                self.end_headers()
                try:
                    while not state.closing.wait(0.1):
                        self.wfile.write(b" ")
                        self.wfile.flush()
                except OSError:
                    pass
                return
            data = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    state.closing = threading.Event()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield state
    state.closing.set()
    http.shutdown()
    http.server_close()


def judge(server, **more):
    return rewards.build("judge", judge_url=server.url, judge_model="rules", **{"timeout": 5.0, **more})


def test_ratings_become_values(server):
    def rule(text):
        return 200, {"one": "Rating: 1", "mid": "Good.\nRating: 5.5", "ten": "Rating: 3? No.\nRating: 10", "odd": "I like it",
                     "high": "Rating: 11"}[text.split("<answer>\n")[1].split("\n")[0]]  # fmt: skip

    with judge(server, judge_rubric="Be strict.") as reward:
        reward.check([{"question": "Why?", "answer": "because"}])
        server.rule = rule
        rows = [{"question": [{"role": "user", "content": "Why?"}], "answer": "because"}] * 5
        found = reward.score(["one", "mid", "ten", "odd", "high"], rows)
    assert found.total == [0.0, 0.5, 1.0, 0.0, 0.0]
    assert (found.failures, found.message) == (2, "judge: no line Rating: N in the reply 'I like it'")
    assert all(text in server.seen[-1] for text in ("Be strict.", "<reference>\nbecause\n</reference>", "Why?"))


def test_a_judge_that_fails_now_and_then_is_asked_again(server):
    replies = iter([(503, ""), (200, "Rating: 10")])
    server.rule = lambda text: next(replies)
    with judge(server) as reward:
        assert reward(["x"], [{"question": "?"}]) == [1.0]


def test_a_judge_that_never_ends_costs_bounded_time(server):
    server.rule = lambda text: (200, None)
    with judge(server, timeout=0.3) as reward:
        started = time.monotonic()
        found = reward.score(["x"] * 3, [{"question": "?"}] * 3)
        assert time.monotonic() - started < 20
    assert found.total == [0.0] * 3
    assert (found.failures, found.message) == (3, "judge: no reply in time")


def test_a_judge_that_is_not_there():
    with rewards.build("judge", judge_url="http://127.0.0.1:9/v1", judge_model="x", timeout=0.2) as reward:
        found = reward.score(["x"], [{"question": "?"}])
    assert (found.total, found.failures) == ([0.0], 1)
    assert "did not answer in 3 attempts" in found.message


def test_a_judge_that_refuses_stops_before_training(server):
    server.rule = lambda text: (401, "")
    with judge(server) as reward, pytest.raises(UserError, match="refuses: 401"):
        reward.check([{"question": "?"}])
    with judge(server) as reward, pytest.raises(UserError, match="no `question`"):
        reward.check([{"answer": "?"}])


def test_replies_are_kept(server, tmp_path):
    for _ in range(2):
        with judge(server, judge_replies=tmp_path / "replies.jsonl") as reward:
            assert reward(["x"], [{"question": "?"}]) == [1.0]
    assert len(server.seen) == 1


@pytest.fixture(scope="module", params=[1, 2])
def classifier(request, tmp_path_factory):
    """A tiny random Llama classifier with a tokenizer of bytes, and the number of its labels."""
    from nemo_ext import platform

    platform.activate()
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("classifier")
    alphabet = {sign: number for number, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="!", eos_token="!")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=64, num_labels=request.param, pad_token_id=0)  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder, request.param


def test_reward_model_gives_what_hugging_face_gives(classifier):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, labels = classifier
    answers = ["yes", "no, not at all", "x" * 200, "", *[f"answer {n}" * n for n in range(1, 18)]]
    rows = [{"question": "Why?"}, {"question": [{"role": "user", "content": "How?"}]}, *[{"question": "What?"}] * 19]
    with rewards.build("model", reward_model=f"hf:{folder}") as reward:
        reward.check(rows)
        found = reward.score(answers, rows)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for answer, row, value in zip(answers, rows, found.total, strict=True):
        asked = row["question"] if isinstance(row["question"], str) else row["question"][0]["content"]
        ids = tokenizer(f"user: {asked}\nassistant: {answer}\n", return_tensors="pt").input_ids[:, -64:]
        with torch.inference_mode():
            logits = model(ids.to(model.device)).logits[0].float()
        expected = logits[0] if labels == 1 else logits.softmax(0)[1]
        assert value == pytest.approx(float(expected), abs=1e-5)
    assert found.failures == 0 and len(set(found.total)) > 15


def test_folders_that_are_no_reward_model(tmp_path, classifier):
    with pytest.raises(UserError, match="there is no config.json"):
        rewards.build("model", reward_model=f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    with rewards.build("model", reward_model=str(tmp_path)) as reward, pytest.raises(UserError, match="no sequence classifier"):
        reward.check([{"question": "?"}])


def test_a_language_model_is_no_reward_model(tmp_path, classifier):
    """Its classification head would be random."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    AutoTokenizer.from_pretrained(classifier[0]).save_pretrained(tmp_path)
    config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with rewards.build("model", reward_model=str(tmp_path)) as reward, pytest.raises(UserError, match="lack score.weight"):
        reward.check([{"question": "?"}])
