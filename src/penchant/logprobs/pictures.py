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
        index, mask, packed_index = padded_layout(batch)
        pad = self.processor.tokenizer.pad_token_id
        ids = torch.where(mask.bool(), batch.input_ids[index], pad if pad is not None else 0)
        pictured = [i for i, p in enumerate(batch.pictures) if p is not None]
        plain = [i for i in range(len(ids)) if i not in set(pictured)]
        rows: dict[int, Tensor] = {}
        for group in filter(None, (pictured, plain)):
            longest = max(batch.segments[i].length for i in group)
            members = torch.tensor(group, device=ids.device)
            options = self._image_inputs(batch, group, longest) if group is pictured else {}
            options |= without_cache(backbone)
            out = backbone(input_ids=ids[members, :longest], attention_mask=mask[members, :longest], **options)
            hidden = out.last_hidden_state
            hidden = nn.functional.pad(hidden, (0, 0, 0, ids.shape[1] - longest))
            rows |= dict(zip(group, hidden, strict=True))
        return torch.stack([rows[i] for i in range(len(ids))]).flatten(0, 1).index_select(0, packed_index)

    def _image_inputs(self, batch: PackedBatch, indices: list[int], longest: int) -> dict[str, Any]:
        """The model's image inputs, built once per batch for policy and reference."""
        if "pictures" not in batch.cache:
            batch.cache["pictures"] = self._process(batch, indices, longest)
        inputs: Any = batch.cache["pictures"]
        dtype = next(self.model.parameters()).dtype
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}

    def _process(self, batch: PackedBatch, indices: list[int], longest: int) -> dict[str, Tensor]:
        prompts = [batch.pictures[i] for i in indices]
        inputs = dict(inputs_of(self.processor, [p for p in prompts if p is not None]))
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        batch_ids = batch.input_ids.cpu()
        offsets = []
        for row, i in enumerate(indices):
            segment, unpadded = batch.segments[i], ids[row][mask[row].bool()]
            offset = segment.prompt_len - len(unpadded)  # 1 for a BOS that the template omits
            if offset < 0 or not torch.equal(
                batch_ids[segment.start + offset : segment.start + segment.prompt_len], unpadded
            ):
                prompt = prompts[row]
                where = "model.path" if prompt is None else prompt.images[0].path
                what = "the processor now gives different tokens for it than when the rows were read"
                raise DataError(where, what, "start anew")
            offsets.append(offset)
        for name, value in inputs.items():
            if value.shape == ids.shape and not value.is_floating_point():  # token types: 0, text, for completions
                padded = value.new_zeros(len(indices), longest)
                for row, offset in enumerate(offsets):
                    unpadded = value[row][mask[row].bool()]
                    padded[row, offset : offset + len(unpadded)] = unpadded
                inputs[name] = padded
        return {name: moved(value, batch.input_ids.device) for name, value in inputs.items()}
