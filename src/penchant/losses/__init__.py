"""The loss registry. To add a loss: one file with its function, params and SPEC, and one line here."""

from __future__ import annotations

from penchant.losses import (
    alpha_po,
    aot,
    apo,
    bco,
    cal_dpo,
    chi_po,
    cpo,
    discopop,
    dpo,
    dpo_shift,
    dpop,
    exo,
    f_dpo,
    hinge,
    ipo,
    kto,
    ld_dpo,
    nca,
    odpo,
    orpo,
    pmpo,
    r_dpo,
    rdpo,
    rebel,
    rpo,
    sft,
    simpo,
    slic,
    sppo,
    wpo,
)
from penchant.losses.registry import LossParams, LossSpec

LOSSES: dict[str, LossSpec] = {
    spec.name: spec
    for spec in (
        sft.SPEC,
        # pairs, with a reference
        dpo.SPEC,
        dpo_shift.SPEC,
        rdpo.SPEC,
        ipo.SPEC,
        hinge.SPEC,
        dpop.SPEC,
        rpo.SPEC,
        r_dpo.SPEC,
        ld_dpo.SPEC,
        wpo.SPEC,
        apo.ZERO,
        apo.DOWN,
        sppo.SPEC,
        exo.SPEC,
        nca.SPEC,
        aot.PAIRED,
        aot.UNPAIRED,
        discopop.SPEC,
        cal_dpo.SPEC,
        f_dpo.SPEC,
        chi_po.SPEC,
        rebel.SPEC,
        odpo.SPEC,
        # pairs, without a reference
        simpo.SPEC,
        alpha_po.SPEC,
        orpo.SPEC,
        cpo.SPEC,
        slic.SPEC,
        # single answers with labels
        kto.SPEC,
        bco.SPEC,
        pmpo.SPEC,
    )
}

__all__ = ["LOSSES", "LossParams", "LossSpec"]
