"""Log-probs of completions of prompts with images: the model's own forward over padded rows, with its processor's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from penchant.base.machine import moved
from penchant.data.tokenize_pictures import inputs_of
from penchant.errors import DataError
from penchant.logprobs import Scorer, padded_layout
from penchant.models.load import without_cache
from penchant.types import PackedBatch


@dataclass(slots=True)
class PicturedScorer(Scorer):
    """Scores a vision-language model on padded rows, one per completion with its prompt; the model assigns positions itself.

    Args:
        processor: the model's; images are read from their files when a pass needs them.
    """

    processor: Any = None

    def on(self, model: nn.Module) -> Scorer:
        return PicturedScorer(model, self.packing, processor=self.processor, **self.how)

    def _padded_hidden(self, backbone: nn.Module, batch: PackedBatch) -> Tensor:
        index, mask, back = padded_layout(batch)
        pad = self.processor.tokenizer.pad_token_id
        ids = torch.where(mask.bool(), batch.input_ids[index], pad if pad is not None else 0)
        pictured = [i for i, p in enumerate(batch.pictures) if p is not None]
        plain = [i for i in range(len(ids)) if i not in set(pictured)]
        rows: dict[int, Tensor] = {}
        for some in filter(None, (pictured, plain)):
            longest = max(batch.segments[i].length for i in some)
            at = torch.tensor(some, device=ids.device)
            more = self._seen(batch, some, longest) if some is pictured else {}
            more |= without_cache(backbone)
            out = backbone(input_ids=ids[at, :longest], attention_mask=mask[at, :longest], **more)
            hidden = out.last_hidden_state
            hidden = nn.functional.pad(hidden, (0, 0, 0, ids.shape[1] - longest))
            rows |= dict(zip(some, hidden, strict=True))
        return torch.stack([rows[i] for i in range(len(ids))]).flatten(0, 1).index_select(0, back)

    def _seen(self, batch: PackedBatch, some: list[int], longest: int) -> dict[str, Any]:
        """The model's image inputs, built once per batch for policy and reference."""
        if "pictures" not in batch.cache:
            batch.cache["pictures"] = self._read(batch, some, longest)
        seen: Any = batch.cache["pictures"]
        dtype = next(self.model.parameters()).dtype
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in seen.items()}

    def _read(self, batch: PackedBatch, some: list[int], longest: int) -> dict[str, Tensor]:
        prompts = [batch.pictures[i] for i in some]
        found = dict(inputs_of(self.processor, [p for p in prompts if p is not None]))
        ids, real = found.pop("input_ids"), found.pop("attention_mask")
        held = batch.input_ids.cpu()
        offsets = []
        for row, i in enumerate(some):
            segment, own = batch.segments[i], ids[row][real[row].bool()]
            before = segment.prompt_len - len(own)  # 1 for a BOS that the template omits
            if before < 0 or not torch.equal(held[segment.start + before : segment.start + segment.prompt_len], own):
                prompt = prompts[row]
                where = "model.path" if prompt is None else prompt.images[0].path
                what = "the processor now gives different tokens for it than when the rows were read"
                raise DataError(where, what, "start anew")
            offsets.append(before)
        for name, value in found.items():
            if value.shape == ids.shape and not value.is_floating_point():  # token types: 0, text, for completions
                whole = value.new_zeros(len(some), longest)
                for row, before in enumerate(offsets):
                    own = value[row][real[row].bool()]
                    whole[row, before : before + len(own)] = own
                found[name] = whole
        return {name: moved(value, batch.input_ids.device) for name, value in found.items()}
