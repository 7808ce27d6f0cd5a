"""The list of what viops has: op families, where they come from, and the backends of each op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: Every backend, in the order in which a call prefers them on a device that several can serve;
#: "torch" is an op of torch's own.
BACKENDS = ("cpu", "cuda", "triton", "torch", "reference")


@dataclass(frozen=True)
class Family:
    """Op family: csrc and python/viops/ops hold a folder of its name, tests and benches a file."""

    name: str
    paper: str
    #: The ops of the family, as they are called in `torch.ops.viops`, each with the backends that
    #: have no kernel for it and why; all others have one.
    ops: Mapping[str, Mapping[str, str]]

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that have kernels for any of the ops."""
        return tuple(
            name for name in BACKENDS if any(name not in lacks for lacks in self.ops.values())
        )


_NO_SUCH_OP = "torch has no such op"
_SDPA_ON_GPU = "on a GPU torch's scaled_dot_product_attention runs"

FAMILIES = (
    Family(
        name="token_reorganization",
        paper="EViT: Liang et al., ICLR 2022, arXiv:2202.07800",
        ops={
            "class_attention_scores": {
                "cuda": "it is written in Triton",
                "torch": _NO_SUCH_OP,
            },
            "softmax_attention": {
                "cuda": _SDPA_ON_GPU,
                "triton": _SDPA_ON_GPU,
                "torch": "no kernel of viops: softmax_attention calls torch's own op by itself",
            },
            "reorganize_tokens": {
                "triton": "it needs an exact sort within a block, which is CUDA's part",
                "torch": _NO_SUCH_OP,
            },
            "restore_tokens": {
                "triton": "it is CUDA's part, as reorganize_tokens is",
                "torch": _NO_SUCH_OP,
            },
        },
    ),
    Family(
        name="decayed_attention",
        paper="RMT: Fan et al., CVPR 2024, arXiv:2309.11523",
        ops={
            "decayed_attention": {
                "cuda": "it is written in Triton",
                "torch": _NO_SUCH_OP,
            },
        },
    ),
    Family(
        name="mix_shift",
        paper="MS-MLP: Zheng et al., arXiv:2202.06510",
        ops={
            "mix_shift": {
                "triton": "it is written in CUDA",
                "torch": _NO_SUCH_OP,
            },
        },
    ),
    Family(
        name="reversible_columns",
        paper="RevCol: Cai et al., ICLR 2023, arXiv:2212.11696, section 3.1",
        ops={
            name: {
                "cuda": "it is written in Triton",
                "torch": _NO_SUCH_OP,
            }
            for name in ("reversible_step", "reversible_step_backward")
        },
    ),
    Family(
        name="weight_standardization",
        paper="Weight Standardization: Qiao et al., arXiv:1903.10520, section 3",
        ops={
            "standardize_weight": {
                "cuda": "it is written in Triton",
                "torch": _NO_SUCH_OP,
            },
        },
    ),
    Family(
        name="batch_channel_norm",
        paper="Batch-Channel Normalization: Qiao et al., arXiv:1903.10520, section 4",
        ops={
            "batch_channel_norm": {
                "triton": "it is written in CUDA",
                "torch": _NO_SUCH_OP,
            },
        },
    ),
    Family(
        name="integer_conv",
        paper="INT16 training: Das et al., ICLR 2018, arXiv:1802.00930",
        ops={
            "quantize_dfp": {
                "triton": "it is written in CUDA",
                "torch": _NO_SUCH_OP,
            },
            "integer_conv2d": {
                "triton": "it is written in CUDA",
                "torch": _NO_SUCH_OP,
            },
        },
    ),
)


def family_of(op: str) -> Family:
    """The family that has the op of this name."""
    for family in FAMILIES:
        if op in family.ops:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.ops)
    raise ValueError(f"op: {op!r} is not an op of viops; there are: {known}")


def lacks_of(op: str) -> Mapping[str, str]:
    """The backends without a kernel for the op, and why."""
    return family_of(op).ops[op]


def backends_of(op: str) -> tuple[str, ...]:
    """The backends that have a kernel for the op."""
    return tuple(name for name in BACKENDS if name not in lacks_of(op))
