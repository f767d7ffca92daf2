"""Rows with pictures to token trees: the chat template gets a part per picture, and the model's processor tokenizes the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from penchant.data.layouts import RowError
from penchant.data.pictures import MARK, open_picture
from penchant.data.templates import Rendered, chat, cut_after_end
from penchant.data.tokenize import CausalTokenization, Encoded, Ids
from penchant.errors import ConfigError, DataError
from penchant.types import Picture, PicturedPrompt, PromptTree, TokenTree


class _Rendered(Rendered):
    """`Rendered` with the row's pictures."""

    images: tuple[Picture, ...] = ()


class _Encoded(Encoded):
    """`Encoded` with the prompt for the model's processor."""

    pictures: PicturedPrompt | None = None


class PicturedTokenization(CausalTokenization):
    """Prompts with pictures and completions for a vision-language model.

    A prompt's ids are those of the model's processor for its text and pictures, with all tokens of each picture. Completions are
    encoded as usual. Prompts with pictures are never cut.

    Args:
        processor: the model's; the others: see `CausalTokenization`.

    Raises:
        ConfigError: its tokenizer has no chat template, or `template` is ``plain``.
    """

    def __init__(self, processor: Any, kind: str, **how: Any) -> None:
        super().__init__(processor.tokenizer, kind, **how)
        self.processor, self._writer = processor, _PartsTokenizer(processor.tokenizer)
        image_token_ids = *(processor.image_token_ids or ()), getattr(processor, "image_token_id", None)
        self._pictured = frozenset(i for i in image_token_ids if isinstance(i, int))
        if self.template != "chat":
            what = "pictures need a chat template, and " + (
                "plain text is asked for" if how.get("template") == "plain" else "there is none"
            )
            raise ConfigError("data.template", what, "take a model whose processor has one, and data.template=auto")

    def render(self, tree: PromptTree) -> list[Rendered]:
        if not tree.images:
            return super().render(tree)
        if any(c.more for c in tree.completions):
            what = "several answers of a conversation with pictures are learned at once"
            raise RowError(what, "set data.layout_options.turns=every")
        rendered = chat(tree, self._writer, self.options, strict=self.strict)
        completions = tuple(cut_after_end(c, self.end_texts) for c in rendered.completions)
        with_images = _Rendered(rendered.prompt, completions, rendered.moved)
        with_images.images = tree.images
        return [with_images]

    def encode(self, rendered: Sequence[Rendered | RowError]) -> list[Encoded | RowError]:
        encoded = super().encode(rendered)
        return [
            self._with_pictures(r, e) if isinstance(r, _Rendered) and isinstance(e, Encoded) else e
            for r, e in zip(rendered, encoded, strict=True)
        ]

    def _with_pictures(self, rendered: _Rendered, encoded: Encoded) -> Encoded | RowError:
        pictures = PicturedPrompt(rendered.prompt, rendered.images)
        try:
            ids = inputs_of(self.processor, [pictures])["input_ids"][0].tolist()
        except DataError as error:
            return RowError(f"the picture {error.where} cannot be used: {error.what}", error.how)
        except Exception as error:  # whatever a processor raises: a placeholder too many in the text, a side too long
            return RowError(f"the model's processor refuses it ({str(error)[:200]})", "fix the row, or drop it")
        with_pictures = _Encoded(ids, encoded.completions)
        with_pictures.pictures = pictures
        return with_pictures

    def fit_row(
        self, source: str, prompt: Ids, completions: list[Ids], turns: Sequence[Sequence[int]] = ()
    ) -> list[TokenTree]:
        if any(not self._pictured.isdisjoint(c) for c in completions):
            raise RowError("an answer holds a token that stands for a picture", "take it out, or drop the row")
        return super().fit_row(source, prompt, completions, turns)

    def _cut(
        self, prompt: Ids, completions: list[Ids], longest_completion: int
    ) -> tuple[Ids, list[Ids], tuple[bool, ...]]:
        image_tokens = sum(i in self._pictured for i in prompt)
        if image_tokens:
            what = f"{len(prompt) + longest_completion} tokens, {image_tokens} of them of pictures, are more than max_length {self.max_length}"
            raise RowError(what, "raise data.max_length, or have smaller pictures (model.image_options)")
        return super()._cut(prompt, completions, longest_completion)

    def _tokenize_row(self, tree: PromptTree, of_row: Sequence[Encoded | RowError]) -> list[TokenTree]:
        encoded = [e for e in of_row if isinstance(e, Encoded)]
        if not tree.images and any(not self._pictured.isdisjoint(e.prompt) for e in encoded):
            of_row = [
                RowError(
                    "its prompt holds a token that stands for a picture, and it has none",
                    "give the picture, or drop the row",
                )
            ]
        trees = super()._tokenize_row(tree, of_row)
        pictures = next((e.pictures for e in encoded if isinstance(e, _Encoded)), None)
        return trees if pictures is None else [replace(t, pictures=pictures) for t in trees]


class _PartsTokenizer:
    """A tokenizer whose chat template gets an image part for each picture mark."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, turns: Sequence[Mapping[str, Any]], **how: Any) -> Any:
        return self._tokenizer.apply_chat_template([_as_parts(turn) for turn in turns], **how)


def _as_parts(turn: Mapping[str, Any]) -> dict[str, Any]:
    content = turn.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    if not any(MARK.search(p.get("text", "")) for p in parts):
        return dict(turn)
    expanded: list[dict[str, Any]] = []
    for part in parts:
        for i, text in enumerate(MARK.split(part.get("text", ""))):  # texts and the marks' hashes alternate
            if i % 2:
                expanded.append({"type": "image"})
            elif text:
                expanded.append({"type": "text", "text": text})
    return {**turn, "content": expanded}


def inputs_of(processor: Any, prompts: Sequence[PicturedPrompt]) -> Any:
    """The processor's inputs for prompts with pictures, padded on the right."""
    return processor(
        text=[p.text for p in prompts],
        images=[[open_picture(image) for image in p.images] for p in prompts],
        return_tensors="pt",
        padding=True,
        padding_side="right",
        add_special_tokens=False,
    )
