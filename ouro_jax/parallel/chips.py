"""What one accelerator can do at most, from the vendors' data sheets; one table for all.

Sources: cloud.google.com/tpu/docs (pages v4, v5e, v5p, v6e, tpu7x) for peak, HBM and ICI (half of
the bidirectional figure) and for DCN (NICs of a pod divided by its chips); v4's DCN from Google's
"How to scale your model". A TPU's `hbm_bytes` is what its compiler grants a program, as its
refusals say: 15.75 of v5e's 16 GiB. nvidia.com for H100 SXM and H200 SXM: NVLink one way, one
400 Gb/s NIC per GPU; memory as nvidia-smi reports it.
"""

import dataclasses
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device. FLOP/s are dense bfloat16; rates are bytes/s, links one way and together.

    `kind` is the generation, as in the topology `v5e:16x16`; of TPU7x's two devices per chip each
    has half. `ici_bandwidth` is that of all links to the neighbours (NVLink on GPUs),
    `dcn_bandwidth` this chip's share of its host's network.
    """

    name: str
    kind: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float


CHIPS = {
    chip.kind: chip
    for chip in (
        Chip("TPU v4", "v4", 275e12, int(30.75 * GIB), 1200e9, 300e9, 6.25e9),
        Chip("TPU v5e", "v5e", 197e12, int(15.75 * GIB), 819e9, 200e9, 3.125e9),
        Chip("TPU v5p", "v5p", 459e12, int(95.74 * GIB), 2765e9, 600e9, 6.25e9),
        Chip("TPU v6e", "v6e", 918e12, int(31.25 * GIB), 1638e9, 400e9, 12.5e9),
        Chip("TPU7x", "tpu7x", 1153.5e12, int(94.75 * GIB), 3690e9, 300e9, 6.25e9),
        Chip("NVIDIA H100", "h100", 989e12, 81_559 * 2**20, 3350e9, 450e9, 50e9),
        Chip("NVIDIA H200", "h200", 989e12, 143_771 * 2**20, 4800e9, 450e9, 50e9),
    )
}
_DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def chip_of(device: Any) -> Chip | None:
    """The chip of a JAX device, also of one that only a topology describes; None if unknown."""
    kind = _DEVICE_KINDS.get(device.device_kind)
    return CHIPS[kind] if kind else None
