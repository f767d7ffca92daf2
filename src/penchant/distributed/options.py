"""The `launch` section of a config."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from penchant.base.section import Section


class LaunchConfig(Section):
    """How many processes train together (docs/many_gpus.md). It changes figures only by rounding."""

    processes: Annotated[int, Field(ge=1, le=65536)] | Literal["auto"] = Field(
        "auto", description="processes that penchant train starts on this machine; auto: those of torchrun, or this one"
    )
    replicas: int = Field(
        1, ge=1, description="groups of processes that each hold the whole model; its shards lie within a group (HSDP)"
    )
    context: int = Field(
        1,
        ge=1,
        description="processes that share each pass, for long prompts: each has part of the tokens and of the heads",
    )
    restarts: int = Field(
        0, ge=0, le=1000, description="how often the processes are started again when one of them crashes"
    )
    reshard: bool = Field(True, description="free a layer's gathered weights after its forward pass")
    offload: bool = Field(
        False,
        description="keep shards, their gradients and the optimizer in the host's memory; GPUs hold only gathered layers",
    )
    background: bool | Literal["auto"] = Field(
        "auto", description="write checkpoints while training goes on, from copies in the host's memory; auto: on GPUs"
    )
    timeout: float = Field(
        600.0, ge=1, le=31_536_000, description="seconds that a process waits for the others before it gives up"
    )
