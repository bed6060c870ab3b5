"""Images in chats: the answers of transformers' generate, whoever else runs, and what is refused."""

import base64
import io
import random

import numpy as np
import pytest
from PIL import Image
from served_models import Answers, Served, ask_with_media, save_model

CLIP = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
            image_size=56, patch_size=14)  # fmt: skip
NEW = 12


def compose(tmp_path_factory, **options):
    """The tiny Llama with a random CLIP."""
    from conversion.multimodal.compose import compose

    folder = tmp_path_factory.mktemp("seeing")
    return compose(save_model(folder / "text"), folder / "llava", encoder=CLIP, **options)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return compose(tmp_path_factory)


@pytest.fixture(scope="module")
def seeing(llava):
    """An engine that reads an image of 16 tokens in pieces."""
    from deploy.engine.engine import Engine

    engine = Engine(llava, rows=3, prefill_tokens=9, dtype="float32", images=2, image_pixels=10_000)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(seeing):
    from deploy.limits import Limits
    from deploy.server import Service

    served = Served(Service(seeing, "llava", Limits(body_bytes=200_000, max_tokens=200, request_seconds=30)))
    yield served
    served.close()


def picture(seed: int, size=(60, 40)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 10, size[0] // 10, 3), np.uint8)
    return Image.fromarray(noise).resize(size)


def url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def content(images, text: str) -> list[dict]:
    return [*({"type": "image_url", "image_url": {"url": url(image)}} for image in images), {"type": "text", "text": text}]


def reference(folder, kind: str = "LlavaForConditionalGeneration"):
    """What transformers answers, greedily: a function of images and text."""
    import torch
    import transformers as tf

    model = getattr(tf, kind).from_pretrained(folder, attn_implementation="eager").eval()
    processor = tf.AutoProcessor.from_pretrained(folder, use_fast=False)

    def answer(images, text: str) -> list[int]:
        parts = [*[{"type": "image"}] * len(images), {"type": "text", "text": text}]
        chat = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        inputs = processor(images=images or None, text=chat, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=256)
        return ids[0, inputs["input_ids"].shape[1] :].tolist()

    return answer


def asked(engine, images, text: str) -> Answers:
    return ask_with_media(engine, "image", [("image_url", url(image)) for image in images], text, NEW)


def test_greedy_answers_are_transformers_in_mixed_batches(llava, seeing):
    answer, chance = reference(llava), random.Random(0)
    counts = enumerate([1, 0, 2, 1, 0, 1])
    chats = [([picture(10 * i + j) for j in range(count)], "what" * chance.randint(1, 6)) for i, count in counts]
    running = [asked(seeing, *chat) for chat in chats]
    for chat, answers in zip(chats, running, strict=True):
        assert answers.wait().ids() == answer(*chat)
    same_text = {tuple(asked(seeing, [picture(seed)], "what").wait().ids()) for seed in range(4)}
    assert len(same_text) == 4  # the pictures decide


def test_tiles_of_llava_next(tmp_path_factory):
    from deploy.engine.engine import Engine
    from nemo_ext.multimodal.description import Tiling

    folder = compose(tmp_path_factory, tiling=Tiling(((56, 112), (112, 56))))
    answer = reference(folder, "LlavaNextForConditionalGeneration")
    engine = Engine(folder, rows=2, prefill_tokens=32, dtype="float32")
    try:
        for seed, size in enumerate(((90, 30), (40, 70))):
            image = picture(seed, size)
            assert asked(engine, [image], "what").wait().ids() == answer([image], "what")
    finally:
        engine.close()


def test_chats_over_http(llava, server, seeing):
    images = [picture(1), picture(2)]
    message = {"role": "user", "content": content(images, "compare")}
    body = server.post("/v1/chat/completions", messages=[message], max_tokens=NEW, temperature=0).json()
    ids = reference(llava)(images, "compare")
    assert body["choices"][0]["message"]["content"] == seeing._tokenizer.decode(ids, skip_special_tokens=True)
    assert body["usage"]["prompt_tokens"] > 2 * 16
    both = server.post("/v1/chat/completions", messages=[message], max_tokens=NEW, n=2, seed=1).json()
    assert len(both["choices"]) == 2


@pytest.mark.parametrize(
    "parts, message",
    [
        ([{"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}], "fetches nothing"),
        ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], "fetches nothing"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,!!"}}], "not base64"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}], "not an image"),
        ([{"type": "image_url"}], "needs image_url"),
        ([{"type": "input_audio", "input_audio": {}}], "needs input_audio"),
        ([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}], "image_url: input_audio is not served"),
        ([{"type": "file", "file": {}}], "content of type file is not served"),
        (content([picture(0, (200, 100))], ""), "200x100 pixels is more than the server's 10,000"),
        (content([picture(i) for i in range(3)], ""), "3 images in one request are more than the server's 2"),
        (content([picture(0)], "and <image>?"), "2 placeholders for 1 images"),
    ],
)
def test_what_is_refused(server, parts, message):
    response = server.post("/v1/chat/completions", messages=[{"role": "user", "content": parts}])
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_limits_of_the_command():
    from deploy.serve import Options, check
    from nemo_ext.errors import UserError

    with pytest.raises(UserError, match="images=0 must be 1 or more"):
        check(Options(model="hf:x", images=0))


def test_other_servers_take_the_limit_too(tmp_path):
    from deploy.backends import BACKENDS, Backend, Wanted, launch
    from nemo_ext.errors import UserError

    def line(name: str, version: str) -> list[str]:
        backend = Backend(**{**vars(BACKENDS[name]), "version": version})
        return launch(backend, Wanted(tmp_path, tmp_path.name, images=4)).arguments

    for version, value in (("0.6.3", "image=4"), ("0.8.5", '{"image": 4}'), ("0.25.1", '{"image": 4}')):
        arguments = line("vllm", version)
        assert arguments[arguments.index("--limit-mm-per-prompt") + 1] == value
    with pytest.raises(UserError, match="images= has no counterpart in trtllm-serve 1.0"):
        line("trtllm", "1.0")


def test_published_templates_take_parts_only(llava, seeing):
    """LLaVA's own templates read every message's content as parts, texts too."""
    from deploy.engine.prompts import Prompts, load_tokenizer
    from deploy.openai_api import Message

    tokenizer = load_tokenizer(llava)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: "
        "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
        "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }} {% endfor %}{% endfor %}"
    )
    prompts = Prompts(tokenizer, 260, seeing.prompts.media)
    assert prompts.parts_only and not seeing.prompts.parts_only
    message = Message(role="user", content="hi")
    assert tokenizer.decode(prompts.chat([message.for_template(parts=prompts.parts_only)])) == "user: hi "
    message = Message(role="user", content=content([picture(0)], "what"))
    ids, pictures = prompts.chat_with_media([message.for_template(parts=True)], message.media)
    assert len(pictures) == 1 and tokenizer.decode(ids) == "user: " + "<image>" * 16 + "\nwhat "
