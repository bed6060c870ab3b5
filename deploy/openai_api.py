"""OpenAI's chat/completions and completions: what may be asked, as engine requests, and the JSON of the answers.

After OpenAI's API reference; `top_k`, `min_p`, `repetition_penalty`, `ignore_eos`, `bad_words` and what is said of beams are
common additions. A field that is not served is refused by name. Knows neither HTTP nor torch.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deploy.engine.request import MAX_LOGPROBS, Logprob, Refused, Request, Sampling
from deploy.tools import calls_schema
from nemo_ext.tool_calls import ToolCall

MAX_STOP = 16
MAX_WORDS = 64
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
ANY_OBJECT = '{"type":"object"}'


class Model(BaseModel):
    """Unknown fields and numbers that are none (NaN, infinity) are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


Words = Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=MAX_WORDS)]


class StreamOptions(Model):
    include_usage: bool = False


class Generation(Model):
    """What both endpoints take."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    num_beams: int = Field(1, ge=1, le=1024)
    num_beam_groups: int = Field(1, ge=1, le=1024)
    diversity_penalty: float = Field(0.0, ge=0, le=100)
    length_penalty: float = Field(1.0, ge=-10, le=10)
    bad_words: Words = []
    force_words: Words = []
    n: int = Field(1, ge=1, le=1024)
    max_tokens: int | None = Field(None, ge=1)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOP)] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None

    def request(self, prompt: tuple[int, ...], room: int, adapter: str | None, timeout: float, **more: Any) -> Request:
        """The engine's request; `room` is the number of new tokens where the client says none."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        sampling = Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            num_beams=self.num_beams,
            beam_groups=self.num_beam_groups,
            diversity_penalty=self.diversity_penalty,
            length_penalty=self.length_penalty,
        )
        wanted = more.pop("max_tokens", None) or self.max_tokens or max(1, room)
        return Request(
            prompt, wanted, sampling, self.n, stop, adapter=adapter, ignore_eos=self.ignore_eos, timeout=timeout, **more
        )


class CompletionRequest(Generation):
    """/v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: Literal[False] = False
    best_of: None = None
    suffix: None = None
    logit_bias: None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or more, each as text or ids. Raises Refused where there is none."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        if not self.prompt:
            raise Refused("the prompt is empty")
        return list(self.prompt)  # type: ignore[arg-type]


class Function(Model):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Model):
    type: Literal["function"]
    function: Function


class FunctionName(Model):
    name: str


class NamedTool(Model):
    type: Literal["function"]
    function: FunctionName


class CalledFunction(Model):
    name: str
    arguments: str


class AssistantCall(Model):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ImageUrl(Model):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class Part(Model):
    type: str
    text: str | None = None
    image_url: ImageUrl | None = None
    input_audio: Any = None
    file: Any = None

    @property
    def source(self) -> str:
        """The URL of an image, a sound in base64. Raises Refused for other content."""
        if self.type == "image_url":
            if self.image_url is None:
                raise Refused('content of type image_url needs image_url: {"url": "data:image/png;base64,..."}')
            return self.image_url.url
        if self.type == "input_audio":
            data = self.input_audio.get("data") if isinstance(self.input_audio, dict) else None
            if not isinstance(data, str):
                raise Refused('content of type input_audio needs input_audio: {"data": "<base64>", "format": "wav"}')
            return data
        raise Refused(f"content of type {self.type} is not served", "unsupported_value")


class Message(Model):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[AssistantCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None

    @property
    def media(self) -> list[tuple[str, str]]:
        """Of its images ("image_url", URL) and sounds ("input_audio", base64), in order. Raises Refused for other content."""
        parts = self.content if isinstance(self.content, list) else []
        return [(part.type, part.source) for part in parts if part.type != "text"]

    def for_template(self, parts: bool = False) -> dict[str, Any]:
        """The message as chat templates read it: content as text, or as `parts` of text, images and sounds; arguments as
        objects."""
        content: Any = self.content
        if parts and (content or not self.tool_calls):
            given = content if isinstance(content, list) else [Part(type="text", text=content or "")]
            kinds = {"image_url": "image", "input_audio": "audio"}
            content = [{"type": "text", "text": p.text or ""} if p.type == "text" else {"type": kinds[p.type]} for p in given]
        elif isinstance(content, list):
            content = "".join(part.text or "" for part in content)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content or ""}
        if self.name:
            message["name"] = self.name
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "id": call.id, "function": {"name": call.function.name, "arguments": _arguments(call)}}
                for call in self.tool_calls
            ]
        return message


class JsonSchema(Model):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Generation):
    """/v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    logit_bias: None = None

    @property
    def called_tools(self) -> list[dict[str, Any]]:
        """The tools that the template shows the model. Raises Refused for a choice that is none."""
        tools = [] if self.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        if self.tool_choice in (None, "auto", "none"):
            return tools
        if isinstance(self.tool_choice, str) and self.tool_choice != "required":
            raise Refused(f"tool_choice={self.tool_choice} is none of auto, none, required, or a function")
        if not tools:
            raise Refused("tool_choice needs tools")
        return tools

    @property
    def schema_text(self) -> str | None:
        """The JSON schema that the answer follows; None: any text. Raises Refused."""
        forced = self.tool_choice not in (None, "auto", "none")
        wanted = self.response_format is not None and self.response_format.type != "text"
        if wanted and self.called_tools:
            raise Refused("response_format and tools do not go together", "unsupported_value")
        if forced:
            name = None if self.tool_choice == "required" else self._named()
            return json.dumps(calls_schema(self.called_tools, name, self.parallel_tool_calls))
        if not wanted:
            return None
        if self.response_format.type == "json_object":
            return ANY_OBJECT
        if self.response_format.json_schema is None:
            raise Refused("response_format of type json_schema needs json_schema")
        return json.dumps(self.response_format.json_schema.schema_)

    def _named(self) -> str:
        """The function that tool_choice names. Raises Refused."""
        try:
            return NamedTool.model_validate(self.tool_choice).function.name
        except ValidationError:
            raise Refused('tool_choice must be auto, none, required, or {"type": "function", "function": {"name": …}}') from None

    @property
    def wanted_logprobs(self) -> int | None:
        """How many likeliest tokens are wanted beside each chosen one; None: no logprobs. Raises Refused."""
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused("top_logprobs goes with logprobs=true")
        return (self.top_logprobs or 0) if self.logprobs else None


class Answer:
    """The JSON of one response, whole or as chunks."""

    def __init__(self, chat: bool, model: str) -> None:
        self.chat, self.model = chat, model
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._offsets: dict[int, int] = {}  # characters of each completion so far, for its logprobs

    def chunk(
        self,
        index: int,
        text: str,
        logprobs: Sequence[Logprob] | None,
        finish: str | None,
        first: bool = False,
        calls: Sequence[ToolCall] = (),
    ) -> dict[str, Any]:
        """One event of a stream. The first of an answer says who speaks."""
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            if text or (first and not calls):
                delta["content"] = text
            if calls:
                delta["tool_calls"] = [{"index": i, **_call(call)} for i, call in enumerate(calls)]
            choice = {"index": index, "delta": delta, "logprobs": self._logprobs(index, logprobs), "finish_reason": finish}
        else:
            choice = {"index": index, "text": text, "logprobs": self._logprobs(index, logprobs), "finish_reason": finish}
        return self._body(".chunk", [choice])

    def usage_chunk(self, prompt: int, generated: int) -> dict[str, Any]:
        """The last event of a stream that was asked for its usage."""
        return {**self._body(".chunk", []), "usage": usage(prompt, generated)}

    def choice(
        self, index: int, text: str, logprobs: Sequence[Logprob] | None, finish: str, calls: Sequence[ToolCall] = ()
    ) -> dict[str, Any]:
        """One answer of a whole response."""
        written = self._logprobs(index, logprobs)
        if not self.chat:
            return {"index": index, "text": text, "logprobs": written, "finish_reason": finish}
        message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text}
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        return {"index": index, "message": message, "logprobs": written, "finish_reason": finish}

    def whole(self, choices: list[dict[str, Any]], prompt: int, generated: int) -> dict[str, Any]:
        """The response of a request that is not streamed."""
        return {**self._body("", choices), "usage": usage(prompt, generated)}

    def _body(self, suffix: str, choices: list) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _logprobs(self, index: int, logprobs: Sequence[Logprob] | None) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        if self.chat:
            return {
                "content": [
                    {**_token(each.text, each.logprob), "top_logprobs": [_token(text, value) for text, value in each.top]}
                    for each in logprobs
                ]
            }
        offsets = []
        for each in logprobs:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(each.text)
        return {
            "tokens": [each.text for each in logprobs],
            "token_logprobs": [each.logprob for each in logprobs],
            "top_logprobs": [dict(each.top) for each in logprobs],
            "text_offset": offsets,
        }


def usage(prompt: int, generated: int) -> dict[str, int]:
    """Token counts of a response."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def error(message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of an error. What it quotes of a request may hold what UTF-8 cannot."""
    message, param = _writable(message), _writable(param) if param else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _writable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _token(text: str, value: float) -> dict[str, Any]:
    return {"token": text, "logprob": value, "bytes": list(text.encode())}


def _arguments(call: AssistantCall) -> Any:
    try:
        return json.loads(call.function.arguments)
    except ValueError:
        return call.function.arguments
