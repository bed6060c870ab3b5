"""Records with images and sounds, as one conversation whose texts hold a marker for each.

LLaVA       {"image": "a.jpg" | ["a.jpg", ...], "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}
ShareGPT    the same with "images"; or {"messages": [...], "images": [...]}
OpenAI      content in parts {"type": "image_url", "image_url": {"url"}}, {"type": "image", "image" | "path" | "url"}, and
            {"type": "input_audio", "input_audio": {"data", "format"}}
captions    {"image", "caption" | "text"}: the image, and its caption as the answer
questions   {"image", "question", "answer"}, and the other fields of the conversations' formats

Sounds are "audio" or "audios", and <audio>. An image is a path, a file: or data: URL, bytes, or {"bytes", "path"}. All else of a
conversation is as in `nemo_ext.data.chat.formats`; conversations without media may stand between the others.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import re
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ext.data.chat import formats
from nemo_ext.data.multimodal.media import Location, Media
from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import AUDIO, VISION

MARKERS = {VISION: "<image>", AUDIO: "<audio>"}
FIELDS = {VISION: ("images", "image"), AUDIO: ("audios", "audio")}
NAMES = {VISION: ("image", "images"), AUDIO: ("sound", "sounds")}
PARTS = {
    "image_url": VISION, "image": VISION, "input_image": VISION, "input_audio": AUDIO, "audio_url": AUDIO, "audio": AUDIO,
}  # fmt: skip
VALUES = ("image", "image_url", "audio", "audio_url", "url", "path", "bytes")  # of a part
CAPTIONS = ("caption", "text")
UNMARKED = ("completion", "alpaca")  # formats whose texts need not say where the media stand: before the first question
MEDIA_COLUMNS = tuple(name for names in FIELDS.values() for name in names)  # what `columns` may rename, too

_MARKER = re.compile("|".join(map(re.escape, MARKERS.values())))
_BY_MARKER = {marker: modality for modality, marker in MARKERS.items()}


@dataclass(frozen=True)
class Conversation(formats.Conversation):
    """A conversation and its media in the order of the markers in its messages."""

    media: tuple[Media, ...] = ()

    def canonical(self) -> str:
        """Conversations about the same media are the same to the split: none of them is held out while another is trained on."""
        return json.dumps([m.digest for m in self.media]) if self.media else super().canonical()

    def features(self) -> dict[str, int]:
        kinds = {modality: sum(m.modality == modality for m in self.media) for modality in MARKERS}
        named = {f"with {NAMES[modality][1]}": int(count > 0) for modality, count in kinds.items()}
        return {**super().features(), **named, **{NAMES[modality][1]: count for modality, count in kinds.items()}}


@dataclass(frozen=True)
class Found:
    """Bytes that were read with the record, and where they are; None where they are nowhere else."""

    data: bytes
    location: Location | None = None


def parse(
    record: Mapping[str, Any],
    place: object,
    columns: Mapping[str, str],
    media: Callable[[str, Any], Media],
) -> Conversation:
    """A record as a conversation. `media(modality, value)` finds an image or a sound that a record names.

    Raises UserError, with `place`, for what `formats.parse` refuses and where media and markers differ in number.
    """
    record, values = _values(record, place, columns)
    plain = formats.parse(record, place, _of_text(columns))
    if plain.format in UNMARKED and not any(_MARKER.search(message.content) for message in plain.messages):
        plain = _marked(plain, values)
    named = {modality: list(each) for modality, each in values.items()}
    for message in plain.messages:
        message.content.encode()  # half of a surrogate pair: refused here, as `canonical` may not look at the text
    marked = {modality: 0 for modality in MARKERS}
    order = [_BY_MARKER[marker] for message in plain.messages for marker in _MARKER.findall(message.content)]
    for modality in order:
        marked[modality] += 1
    for modality, marker in MARKERS.items():
        if marked[modality] != len(named[modality]):
            counted = f"{len(named[modality])} {NAMES[modality][len(named[modality]) != 1]}"
            raise UserError(f"{place}: {counted} for {marked[modality]} {marker} in the text: one for each is needed")
    found = []
    for modality in order:
        try:
            found.append(media(modality, named[modality].pop(0)))
        except UserError as error:
            number = len(found) + 1
            raise UserError(f"{place}: {NAMES[modality][0]} {number}: {error}") from None
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    return Conversation(**fields, media=tuple(found))


def check_columns(columns: Mapping[str, str]) -> None:
    """Refuse names that `columns` does not know. Raises UserError."""
    for name in columns:
        if name not in (*formats.ROLE_COLUMNS, *MEDIA_COLUMNS):
            raise UserError(f"columns={name}: unknown: give {', '.join((*formats.ROLE_COLUMNS, *MEDIA_COLUMNS))}")
    formats.check_columns(_of_text(columns))


def payload(value: Any, folder: Path) -> Found | Path:
    """The bytes that a value holds, or the file that it names, below `folder`. Raises UserError for what is neither."""
    if isinstance(value, Found):
        return value
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return payload(value["bytes"], folder)
        if isinstance(value.get("data"), str):  # {"data": base64, "format"}
            return Found(_base64(value["data"]))
        value = next((value[name] for name in ("url", "path", "file") if value.get(name)), None)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return Found(bytes(value))
    if not isinstance(value, str) or not value:
        raise UserError(f"neither a path nor bytes, but {_kind(value)}")
    scheme, separator, rest = value.partition(":")
    if separator and scheme == "data":
        head, comma, content = rest.partition(",")
        if not comma:
            raise UserError("a data: URL without a comma before its data")
        return Found(_base64(content) if head.endswith(";base64") else urllib.parse.unquote_to_bytes(content))
    if separator and scheme == "file":
        value = urllib.parse.unquote(urllib.parse.urlsplit(value).path)
    elif separator and rest.startswith("//"):
        raise UserError(f"{value[:80]}: only local files are read: download it first")
    return folder / Path(value).expanduser()


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _of_text(columns: Mapping[str, str]) -> dict[str, str]:
    return {name: field for name, field in columns.items() if name not in MEDIA_COLUMNS}


def _values(record: Mapping[str, Any], place: object, columns: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The record as texts alone, and its media: from fields of their own, or else out of the parts of turns."""
    record = dict(record)
    values: dict[str, list[Any]] = {}
    for modality, names in FIELDS.items():
        names = tuple(columns.get(name, name) for name in names)
        field = next((record[name] for name in names if _there(record.get(name))), None)
        for name in names:
            record.pop(name, None)
        values[modality] = [] if field is None else list(field) if isinstance(field, (list, tuple)) else [field]
    beside = {modality: bool(each) for modality, each in values.items()}
    for name, turns in record.items():
        if isinstance(turns, (list, tuple)) and any(isinstance(turn, Mapping) for turn in turns):
            record[name] = [_texts(turn, place, values, beside) if isinstance(turn, Mapping) else turn for turn in turns]
    if any(values.values()) and formats.detect(record, _of_text(columns)) is None:
        record = _caption(record, values) or record
    return record, values


def _texts(turn: Mapping[str, Any], place: object, values: dict[str, list[Any]], beside: dict[str, bool]) -> dict[str, Any]:
    """A turn whose parts that are media have become markers, and what they hold is added to `values`."""
    content = turn.get("content")
    if not isinstance(content, (list, tuple)):
        return dict(turn)
    parts = []
    for part in content:
        modality = PARTS.get(str(part.get("type"))) if isinstance(part, Mapping) else None
        if modality is None:
            parts.append(part)
            continue
        parts.append({"type": "text", "text": MARKERS[modality] + "\n"})
        kind = part["type"]
        value = next((part[n] for n in (kind, *VALUES) if _there(part.get(n))), None)
        if value is None and beside[modality]:  # its value is in the record's field
            continue
        if beside[modality]:
            raise UserError(f"{place}: {NAMES[modality][1]} both in the turns and in a field beside them")
        values[modality].append(value)
    return {**turn, "content": parts}


def _marked(plain: formats.Conversation, values: dict[str, list[Any]]) -> formats.Conversation:
    """Markers of all media before the first text of the user."""
    markers = "".join(MARKERS[modality] + "\n" for modality, each in values.items() for _ in each)
    turn = next(k for k, message in enumerate(plain.messages) if message.role == "user")
    message = dataclasses.replace(plain.messages[turn], content=markers + plain.messages[turn].content)
    return dataclasses.replace(plain, messages=(*plain.messages[:turn], message, *plain.messages[turn + 1 :]))


def _caption(record: dict[str, Any], values: dict[str, list[Any]]) -> dict[str, Any] | None:
    """An image with a caption as a conversation: what is seen, then what it is."""
    caption = next((record[name] for name in CAPTIONS if isinstance(record.get(name), str)), None)
    if caption is None:
        return None
    markers = "".join(MARKERS[modality] for modality, each in values.items() for _ in each)
    return {"messages": [{"role": "user", "content": markers}, {"role": "assistant", "content": caption}]}


def _there(value: Any) -> bool:
    return value is not None and not (isinstance(value, (str, bytes, list, tuple)) and len(value) == 0)


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError("a data: URL whose data is not base64") from None


def _kind(value: Any) -> str:
    return "nothing" if value is None or value == "" else f"a {type(value).__name__}"
