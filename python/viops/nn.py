"""The modules of all op families."""

from .ops.batch_channel_norm.module import (
    BatchChannelNorm1d,
    BatchChannelNorm2d,
    BatchChannelNorm3d,
    SyncBatchChannelNorm,
    convert_sync_batch_channel_norm,
)
from .ops.decayed_attention.module import ManhattanSelfAttention, RelativePosition2d
from .ops.integer_conv.module import Int16Conv2d, Int16Linear
from .ops.mix_shift.module import ConvNeXtBlock, MixShiftBlock
from .ops.reversible_columns.module import ReversibleBlocks, ReversibleColumn, ReversibleColumns
from .ops.token_reorganization.module import ClassAttention, TokenReorganization
from .ops.weight_standardization.module import (
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSConvTranspose1d,
    WSConvTranspose2d,
    WSConvTranspose3d,
    WSLinear,
)

__all__ = [
    "BatchChannelNorm1d",
    "BatchChannelNorm2d",
    "BatchChannelNorm3d",
    "ClassAttention",
    "ConvNeXtBlock",
    "Int16Conv2d",
    "Int16Linear",
    "ManhattanSelfAttention",
    "MixShiftBlock",
    "RelativePosition2d",
    "ReversibleBlocks",
    "ReversibleColumn",
    "ReversibleColumns",
    "SyncBatchChannelNorm",
    "TokenReorganization",
    "WSConv1d",
    "WSConv2d",
    "WSConv3d",
    "WSConvTranspose1d",
    "WSConvTranspose2d",
    "WSConvTranspose3d",
    "WSLinear",
    "convert_sync_batch_channel_norm",
]
