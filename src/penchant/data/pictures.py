"""Pictures of rows: find them in a row, resolve them to files, and mark their places in the prompt's text.

Used only with `model.vision` on. A mark names its picture by the start of its SHA-256, so that equal questions about different
pictures are different prompts wherever prompts are compared, split or counted.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from penchant.base.files import atomic_path, cache_folder
from penchant.base.text import counted
from penchant.data.layouts.fields import RowError, is_nonempty
from penchant.errors import ConfigError, DataError
from penchant.types import Message, Picture, Prompt, PromptTree

MARK = re.compile(r"<image:([0-9a-f]{16})>")
BARE = "<image>"  # LLaMA-Factory's placeholder in a row's text
COLUMNS = ("images", "image")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MOST_BYTES, MOST_PIXELS = 64 << 20, 100_000_000
_DATA_URI = re.compile(r"data:[\w/+.-]*;base64,")
_HOW = 'give paths, data URIs, {"path": ...} or {"bytes": ...}'


def mark_of(picture: Picture) -> str:
    """The mark that stands for a picture in a prompt's text."""
    return f"<image:{picture.sha256[:16]}>"


@dataclass(frozen=True, slots=True)
class Pictures:
    """Finds the pictures of one source's rows.

    Args:
        folder: holds them; paths are relative to it.
    """

    folder: Path

    def extract(self, row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ExtractedPictures]:
        """Take the pictures out of a row: the row with marks in their places, and the pictures.

        Raises:
            RowError: a picture is missing, or is not a picture.
        """
        listed: list[Picture] = []
        for name in COLUMNS:
            if is_nonempty(row.get(name)):
                cell = row[name]
                values = cell if isinstance(cell, Sequence) and not isinstance(cell, (str, bytes)) else [cell]
                listed += [self.picture(value, f'"{name}"[{i}]') for i, value in enumerate(values)]
        by_mark = {mark_of(p): p for p in listed}
        marked_row = {}
        for name, value in row.items():
            if name not in COLUMNS:
                # each column starts again at the first picture: a whole conversation repeats the prompt
                bare = iter(listed)
                marked_row[name] = self._mark(value, f'"{name}"', listed, bare, by_mark)
        return marked_row, ExtractedPictures(tuple(listed), by_mark)

    def text(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Only the row of `extract`; the row as it is if its pictures cannot be used."""
        try:
            return self.extract(row)[0]
        except RowError:
            return row

    def _mark(
        self, value: Any, what: str, listed: Sequence[Picture], unplaced: Any, by_mark: dict[str, Picture]
    ) -> Any:
        """A column's value with marks in place of pictures, also within messages and their parts."""
        if isinstance(value, str):
            if not listed or BARE not in value:
                return value
            first, *others = value.split(BARE)
            return first + "".join(_next_mark(unplaced, what) + text for text in others)
        if isinstance(value, Mapping):
            contents = ("content", "value")
            return {
                k: self._parts(v, f"{what}.{k}", unplaced, by_mark)
                if k in contents and _is_parts(v)
                else self._mark(v, what, listed, unplaced, by_mark)
                if k in contents
                else v
                for k, v in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._mark(v, f"{what}[{i}]", listed, unplaced, by_mark) for i, v in enumerate(value)]
        return value

    def _parts(self, parts: Sequence[Any], what: str, unplaced: Any, by_mark: dict[str, Picture]) -> Any:
        """The text of a content given as a list of parts, with marks in place of pictures; as it is if there are none."""
        kinds = [p.get("type") if isinstance(p, Mapping) else None for p in parts]
        if not {"image", "image_url"} & set(kinds):
            return parts
        texts: list[str] = []
        for i, (part, kind) in enumerate(zip(parts, kinds, strict=True)):
            if kind in ("image", "image_url"):
                names = ("image", "image_url", "url", "path", "bytes", "base64")
                value = next((part[n] for n in names if is_nonempty(part.get(n))), None)
                if value is None:
                    texts.append(_next_mark(unplaced, what))
                else:
                    picture = self.picture(value, f"{what}[{i}]", encoded="base64" in part and value is part["base64"])
                    by_mark[mark_of(picture)] = picture
                    texts.append(mark_of(picture))
            elif isinstance(part.get("text") if isinstance(part, Mapping) else None, str):
                texts.append(part["text"])
            else:
                raise RowError(f"{what} holds a part of type {kind}", "text and pictures are read; drop the row")
        return "".join(texts)

    def picture(self, value: Any, what: str, *, encoded: bool = False) -> Picture:
        """Resolve a value to a picture file; a picture inside the row is written to the cache folder.

        Args:
            what: names the value in error messages; encoded: it is base64.

        Raises:
            RowError: there is no such file, or it is not a picture.
        """
        if isinstance(value, Mapping):
            names = ("bytes", "path", "url", "image", "base64")
            key = next((n for n in names if is_nonempty(value.get(n))), None)
            if key is None or isinstance(value[key], Mapping):
                raise RowError(f"{what} names no picture", _HOW)
            return self.picture(value[key], what, encoded=key == "base64")
        if isinstance(value, (bytes, bytearray)):
            return _store(bytes(value), what)
        if not isinstance(value, str):
            kind = {type(None): "null", list: "a list", tuple: "a list", bool: "true or false"}.get(
                type(value), "a number"
            )
            raise RowError(f"{what} is {kind}, not a picture", _HOW)
        uri = _DATA_URI.match(value)
        if encoded or uri is not None:
            try:
                return _store(base64.b64decode(value if uri is None else value[uri.end() :], validate=True), what)
            except ValueError as error:
                raise RowError(f"{what} is not base64", "encode the file's bytes") from error
        if re.match(r"[a-z][a-z0-9+.-]+://", value, re.IGNORECASE):
            what = f"{what} is an address ({value[:60]}), and nothing is fetched"
            raise RowError(what, "download the picture, and give its path")
        return self._load_path(value, what)

    def _load_path(self, value: str, what: str) -> Picture:
        folder = os.path.abspath(self.folder)
        path = os.path.normpath(os.path.join(folder, value))
        if os.path.commonpath([folder, path]) != folder:
            how = "set data.image_dir to the folder that holds the pictures"
            raise RowError(f"{what} is {value[:80]}, which lies outside {folder}", how)
        if not os.path.isfile(path):
            how = "put it there, or set data.image_dir"
            raise RowError(f"{what} is {value[:80]}, and there is no such file in {folder}", how)
        if os.path.getsize(path) > MOST_BYTES:
            raise RowError(f"{what} has more than {MOST_BYTES >> 20} MB", "make it smaller")
        content = Path(path).read_bytes()
        _check_format(content, f"{what} ({value[:80]})")
        return Picture(path, hashlib.sha256(content).hexdigest())


def _is_parts(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _next_mark(pictures: Any, what: str) -> str:
    picture = next(pictures, None)
    if picture is None:
        raise RowError(f"{what} has more places for pictures than the row has pictures", "list one for each in images")
    return mark_of(picture)


@dataclass(frozen=True, slots=True)
class ExtractedPictures:
    """The pictures taken out of a row: those of its pictures column in order, and all of them by mark."""

    listed: tuple[Picture, ...]
    found: Mapping[str, Picture]

    def place_in(self, trees: Sequence[PromptTree]) -> tuple[PromptTree, ...]:
        """The row's trees with their pictures, which precede the first user turn if no text has a place for them.

        Raises:
            RowError: a picture is in or after an answer, or some pictures have a place and others do not.
        """
        if not self.found:
            return tuple(trees)
        texts = [_text(t.prompt) for t in trees]
        if any(MARK.search(c.whole) for t in trees for c in t.completions):
            how = (
                "give it in the prompt; of a conversation learn each answer by itself (data.layout_options.turns=every)"
            )
            raise RowError("a picture is in an answer, or after one that is learned", how)
        listed = list(map(mark_of, self.listed))
        if not any(map(MARK.search, texts)):
            trees = [replace(t, prompt=_prepend_marks(t.prompt, "".join(listed))) for t in trees]
            texts = [_text(t.prompt) for t in trees]
        places: Counter[str] = Counter()  # of each picture: one may be shown several times
        for text in texts:
            places |= Counter(m.group() for m in MARK.finditer(text))
        pictures = Counter(listed) | Counter(self.found.keys())
        if pictures - places or places.keys() - self.found.keys():
            what = f"has {counted(pictures.total(), 'picture')}, and its prompt has places for {places.total()}"
            raise RowError(what, "write one <image> for each where it belongs, or none at all")
        return tuple(
            replace(t, images=tuple(self.found[m.group()] for m in MARK.finditer(text)))
            for t, text in zip(trees, texts, strict=True)
        )


def _text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(m.content for m in prompt)


def _prepend_marks(prompt: Prompt, marks: str) -> Prompt:
    if isinstance(prompt, str):
        return marks + prompt
    index = next((i for i, m in enumerate(prompt) if m.role == "user"), None)
    if index is None:
        return (*prompt, Message("user", marks))
    return (*prompt[:index], replace(prompt[index], content=marks + prompt[index].content), *prompt[index + 1 :])


def pillow() -> Any:
    """Pillow's `Image`; Pillow is an optional dependency.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("model.vision", "pictures need Pillow", "pip install 'penchant[vision]'") from error
    return Image


def _check_format(content: bytes, what: str) -> str:
    """The format of a picture, from its header alone: the pixels are read when it is tokenized."""
    image = pillow()
    try:
        with image.open(io.BytesIO(content), formats=FORMATS) as opened:
            (width, height), kind = opened.size, str(opened.format)
    except Exception as error:  # whatever a decoder raises, also for a decompression bomb
        how = "fix the file, or drop the row"
        raise RowError(f"{what} is not a picture that can be read ({', '.join(FORMATS)})", how) from error
    if width * height > MOST_PIXELS:
        raise RowError(f"{what} has {width:,} x {height:,} pixels (at most {MOST_PIXELS:,})", "make it smaller")
    return kind


def _store(content: bytes, what: str) -> Picture:
    """Write a picture that a row holds itself to a file in the cache."""
    if len(content) > MOST_BYTES:
        raise RowError(f"{what} has more than {MOST_BYTES >> 20} MB", "make it smaller")
    kind, sha256 = _check_format(content, what), hashlib.sha256(content).hexdigest()
    path = cache_folder("pictures") / sha256[:2] / f"{sha256}.{kind.lower()}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return Picture(str(path.absolute()), sha256)


def open_picture(picture: Picture) -> Any:
    """Open a picture in RGB, upright, as transformers' own `load_image` does.

    Raises:
        DataError: its file is missing, broken or has changed.
    """
    image = pillow()
    from PIL import ImageOps

    try:
        content = Path(picture.path).read_bytes()
    except OSError as error:
        raise DataError(picture.path, f"this picture cannot be read ({error.strerror})", "put it back") from error
    if hashlib.sha256(content).hexdigest() != picture.sha256:
        raise DataError(picture.path, "this picture was changed since the rows were read", "put it back, or start over")
    try:
        with image.open(io.BytesIO(content), formats=FORMATS) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # whatever a decoder raises
        what = f"this picture is broken ({str(error)[:100]})"
        raise DataError(picture.path, what, "fix it, or drop its row") from error
