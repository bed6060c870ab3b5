"""A judge: any model behind an endpoint that speaks OpenAI's chat completions."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ext.errors import RunError, UserError
from nemo_ext.evaluation.model import Progress

DEFAULT_KEY = "OPENAI_API_KEY"
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # may go away by themselves
LONGEST_WAIT = 60.0  # seconds
PATH = "/chat/completions"


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is. `key_env` names the environment variable that holds its key; None: OPENAI_API_KEY if that is set."""

    url: str
    model: str
    key_env: str | None = None
    temperature: float | None = 0.0
    timeout: float = 120.0  # seconds without a byte
    retries: int = 5
    first_wait: float = 1.0  # seconds, doubled with each retry
    workers: int = 4

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"judge_url={self.url}: give http(s)://HOST[:PORT]/v1")
        if self.key_env and not os.environ.get(self.key_env):
            raise UserError(f"judge_key_env={self.key_env}: the environment has no such variable")
        for name in ("timeout", "workers"):
            if getattr(self, name) <= 0:
                raise UserError(f"judge_{name}={getattr(self, name)} must be more than 0")
        if self.retries < 0:
            raise UserError(f"judge_retries={self.retries} must be 0 or more")

    @property
    def address(self) -> str:
        """The address that requests go to."""
        base = self.url.rstrip("/")
        return base if base.endswith(PATH) else base + PATH


class Judge:
    """Asks an endpoint. Every reply is kept in a file, so that a request is made once, also by a command that is run again; with
    `replies` None nothing is kept."""

    def __init__(self, endpoint: Endpoint, replies: Path | None) -> None:
        self.endpoint = endpoint
        self._file = replies
        self._lock = threading.Lock()
        self._stopping = threading.Event()  # set by the first error, so that other threads do not go on trying
        self._replies: dict[str, str] = {}
        if replies is not None and replies.exists():
            for line in replies.read_text().splitlines():
                try:
                    kept = json.loads(line)
                    self._replies[kept["key"]] = kept["reply"]
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a kill cut off

    def ask_all(self, questions: list[list[dict[str, str]]], progress: Progress | None = None) -> list[str]:
        """The reply to each list of messages, `workers` at a time. What was answered before an error is kept."""
        replies = [""] * len(questions)
        with ThreadPoolExecutor(self.endpoint.workers) as pool:
            jobs = {pool.submit(self.ask, messages): number for number, messages in enumerate(questions)}
            try:
                for done, job in enumerate(as_completed(jobs), 1):
                    replies[jobs[job]] = job.result()
                    if progress:
                        progress(done)
            except BaseException:
                self._stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return replies

    def ask(self, messages: list[dict[str, str]]) -> str:
        """The reply to `messages`. Raises UserError if the endpoint refuses it, RunError if that stays out of reach."""
        body: dict[str, Any] = {"model": self.endpoint.model, "messages": messages}
        if self.endpoint.temperature is not None:
            body["temperature"] = self.endpoint.temperature
        key = hashlib.sha256(json.dumps([self.endpoint.address, body], sort_keys=True).encode()).hexdigest()
        if key in self._replies:
            return self._replies[key]
        reply = self._post(body)
        if self._file is None:
            return reply
        line = json.dumps({"key": key, "reply": reply}, ensure_ascii=False) + "\n"
        with self._lock:
            self._replies[key] = reply
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(line)
        return reply

    def _post(self, body: dict[str, Any]) -> str:
        end = self.endpoint
        headers = {"Content-Type": "application/json"}
        if secret := os.environ.get(end.key_env or DEFAULT_KEY):
            headers["Authorization"] = f"Bearer {secret}"
        trouble = ""
        for attempt in range(end.retries + 1):
            request = urllib.request.Request(end.address, json.dumps(body).encode(), headers, method="POST")
            wait = min(LONGEST_WAIT, end.first_wait * 2**attempt)
            try:
                with urllib.request.urlopen(request, timeout=end.timeout) as response:
                    return self._content(response.read())
            except urllib.error.HTTPError as error:
                trouble = f"{error.code} {error.reason}: {_reason(error)}"
                if error.code not in PASSING:
                    if error.code in (401, 403):
                        trouble += f"; the key comes from the environment's {end.key_env or DEFAULT_KEY}"
                    raise UserError(f"the judge at {end.address} refuses: {trouble}") from None
                wait = max(wait, _retry_after(error))
            except TimeoutError:
                trouble = f"no reply within judge_timeout={end.timeout:g} seconds"
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError) as error:
                reason = getattr(error, "reason", error)
                timed_out = isinstance(reason, TimeoutError)
                trouble = f"no reply within judge_timeout={end.timeout:g} seconds" if timed_out else str(reason) or repr(reason)
            if attempt < end.retries and self._stopping.wait(wait):
                break
        raise RunError(
            f"the judge at {end.address} did not answer in {end.retries + 1} attempts: {trouble}; "
            "its earlier replies are kept, the same command goes on"
        )

    def _content(self, data: bytes) -> str:
        try:
            content = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            content = None
        if not isinstance(content, str):
            shown = data[:120].decode(errors="replace")
            raise RunError(f"the judge at {self.endpoint.address} gave no chat completion: {shown}") from None
        return content


def _reason(error: urllib.error.HTTPError) -> str:
    """What the endpoint says about an error, in one line."""
    text = error.read(2000).decode(errors="replace")
    try:
        detail = json.loads(text)
        detail = detail.get("error", detail.get("detail", detail))
        text = detail.get("message", str(detail)) if isinstance(detail, dict) else str(detail)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:300] or "no reason given"


def _retry_after(error: urllib.error.HTTPError) -> float:
    try:
        return min(LONGEST_WAIT, float(error.headers.get("Retry-After", 0)))
    except ValueError:
        return 0.0  # a date
