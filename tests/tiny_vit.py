"""Tiny timm models for the tests of viops.patch, and what they are to compute once patched."""

import math
from collections.abc import Iterator

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

LAYERS = (1, 2)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def make_model(cls: type = VisionTransformer, **options) -> VisionTransformer:
    """A tiny model, 16 patches, whose class token attends to them unevenly."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4}
    model = cls(**{**sizes, "num_classes": 5, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def make_images(batch: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def matrix_attention(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """timm's attention through the whole matrix: out [B, N, C] and the class token's row [B, N]."""
    batch, num_tokens, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, num_tokens, 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    matrix = (attn.q_norm(q) @ attn.k_norm(k).mT * attn.head_dim**-0.5).softmax(dim=-1)
    out = (matrix @ v).transpose(1, 2).reshape(batch, num_tokens, -1)
    if hasattr(attn, "norm"):  # older timm has neither this nor the gate
        out = attn.norm(out)
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out)), matrix[:, :, 0].mean(dim=1)


def plain_reorganize(x: Tensor, row: Tensor, rate: float, num_prefix: int, fuse: bool) -> Tensor:
    """Image by image: the kept patches by falling score, then the weighted sum of the others."""
    num_patches = x.shape[1] - num_prefix
    keep = math.ceil(rate * num_patches)
    if keep == num_patches:
        return x
    images = []
    for tokens, scores in zip(x, row[:, num_prefix:], strict=True):
        order = scores.argsort(descending=True)
        patches = tokens[num_prefix:]
        parts = [tokens[:num_prefix], patches[order[:keep]]]
        if fuse:
            parts.append((scores[order[keep:], None] * patches[order[keep:]]).sum(0, keepdim=True))
        images.append(torch.cat(parts))
    return torch.stack(images)


def plain_features(
    model: VisionTransformer, x: Tensor, rates: dict[int, float], fuse: bool = True
) -> Tensor:
    """What a patched model's forward_features is to give, from an unpatched model's parts."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    for i, block in enumerate(model.blocks):
        out, row = matrix_attention(block.attn, block.norm1(x))
        x = x + block.drop_path1(block.ls1(out))
        x = plain_reorganize(x, row, rates.get(i, 1.0), model.num_prefix_tokens, fuse)
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return model.norm(x)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models as tiny as these lose time to a second thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
