"""The list of what viops has: op families, where they come from, and the backends of each."""

from __future__ import annotations

from dataclasses import dataclass

#: Every backend, in the order in which a call prefers them on a device that several can serve;
#: "torch" is an op of torch's own.
BACKENDS = ("cpu", "cuda", "triton", "torch", "reference")


@dataclass(frozen=True)
class Family:
    """Op family: csrc and python/viops/ops hold a folder of its name, tests and benches a file."""

    name: str
    #: The ops of the family, as they are called in `torch.ops.viops`.
    ops: tuple[str, ...]
    paper: str
    #: Backends that have kernels for these ops.
    backends: tuple[str, ...]
    #: Why each of the others has none.
    lacks: dict[str, str]


FAMILIES = (
    Family(
        name="token_reorganization",
        ops=(
            "class_attention_scores",
            "softmax_attention",
            "reorganize_tokens",
            "restore_tokens",
        ),
        paper="EViT: Liang et al., ICLR 2022, arXiv:2202.07800",
        backends=("cpu", "reference"),
        lacks={
            "cuda": "not written yet",
            "triton": "not written yet",
            "torch": "torch has no such op, but for softmax_attention",
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
