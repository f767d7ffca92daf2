"""The `reward` section of a config."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_serializer, model_validator

from penchant.schema import Section

BUILT_IN = ("sentiment", "words")


class RewardConfig(Section):
    """What judges completions: a weighted sum of built-in rewards, Python functions and reward models.

    Written short: ``reward: words``, ``reward: {words: -0.01, runs/reward: 1.0}``, ``reward: {runs/reward: 1.0, device: cpu}``;
    it is kept in the form in which it was written.
    """

    terms: dict[str, float] = Field(description="name, path.py:function or a reward model's folder: its weight")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="of reward models; auto: the policy's")
    single: bool = Field(False, description="written as one name")

    @model_validator(mode="before")
    @classmethod
    def _from_shorthand(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"terms": {value: 1.0}, "single": True}
        if isinstance(value, dict) and "terms" not in value:
            terms = {name: weight for name, weight in value.items() if name != "device"}
            bad = [n for n, w in terms.items() if isinstance(w, bool) or not isinstance(w, (int, float))]
            if bad:
                raise ValueError(f"{bad[0]} is {terms[bad[0]]!r}; give each reward a number as its weight")
            return {"terms": {n: float(w) for n, w in terms.items()}} | (
                {"device": value["device"]} if "device" in value else {}
            )
        return value

    @model_serializer
    def _to_shorthand(self) -> Any:
        if self.single and self.device == "auto":
            return next(iter(self.terms))
        return dict(self.terms) | ({"device": self.device} if self.device != "auto" else {})
