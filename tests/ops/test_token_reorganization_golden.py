"""Token reorganization reproduces the official EViT code.

tests/golden/evit.npz holds what github.com/youweiliang/evit computes, in float64 and rounded to
float32, with the weights and images that `draw` below makes: for a model with fused token (keys
``fuse_*``) and one without (``drop_*``), the class token, the last and every fourth token of each
block's output, the kept indices of the three shrinking blocks, the logits, and gradients of
sum(logits * weight).
"""

from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import viops
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "evit.npz"
SEED = 4
DEPTH, DIM, NUM_HEADS, PATCH_SIZE, IMAGE_SIZE, NUM_CLASSES = 6, 64, 4, 8, 64, 10
LAYERS = (1, 3, 5)
KEEPS = {True: (45, 33, 24), False: (45, 32, 23)}  # ceil(0.7 * tokens), by whether tokens are fused
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
FUSE = pytest.mark.parametrize("fuse", [True, False], ids=["fuse", "drop"])


def _gain(name: str) -> float:
    if "qkv" in name:
        return 1.5
    return 0.5 if name.startswith("blocks") and ("proj" in name or "fc2" in name) else 1.0


class Drawn(NamedTuple):
    state_dict: dict[str, Tensor]
    images: Tensor  # [2, 3, 64, 64]
    weight: Tensor  # [2, 10], of the logits in the loss


def draw(shapes: dict[str, tuple[int, ...]], seed: int = SEED) -> Drawn:
    """Weights with which attention is far from uniform, the same with every version of numpy."""
    random = np.random.RandomState(seed)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape)

    state_dict = {}
    for name in sorted(shapes):
        value = normal(*shapes[name])
        if "norm" in name and name.endswith("weight"):
            value = 1 + 0.1 * value
        elif name.endswith("bias"):
            value = 0.1 * value
        elif name in ("cls_token", "pos_embed"):
            value = 0.5 * value
        else:
            value = value / np.sqrt(np.prod(shapes[name][1:])) * _gain(name)
        state_dict[name] = torch.from_numpy(value.astype(np.float32))
    images = torch.from_numpy(normal(2, 3, IMAGE_SIZE, IMAGE_SIZE).astype(np.float32))
    weight = torch.from_numpy(normal(2, NUM_CLASSES).astype(np.float32))
    return Drawn(state_dict, images, weight)


def timm_model() -> tuple[VisionTransformer, Drawn]:
    model = VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=NUM_HEADS,
        num_classes=NUM_CLASSES,
    )
    drawn = draw({name: tuple(value.shape) for name, value in model.state_dict().items()})
    model.load_state_dict(drawn.state_dict)
    return model.eval(), drawn


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def stored_rows(tokens: Tensor) -> Tensor:
    """The tokens of tokens [B, N, C] that the golden file has."""
    num_tokens = tokens.shape[1]
    return tokens[:, sorted({0, num_tokens - 1, *range(1, num_tokens, 4)})]


def check_outputs(
    golden: dict[str, Tensor],
    fuse: bool,
    blocks: list[Tensor],
    indices: list[Tensor],
    logits: Tensor,
) -> None:
    prefix = "fuse" if fuse else "drop"
    assert len(blocks) == DEPTH
    for layer, index in zip(LAYERS, indices, strict=True):
        torch.testing.assert_close(index, golden[f"{prefix}_index{layer}"].long(), rtol=0, atol=0)
    for i, tokens in enumerate(blocks):
        torch.testing.assert_close(stored_rows(tokens), golden[f"{prefix}_block{i}"], **TOLERANCE)
    torch.testing.assert_close(logits, golden[f"{prefix}_logits"], **TOLERANCE)


@FUSE
@pytest.mark.parametrize("backend", ["default", "reference"])
def test_functional_api_gives_the_official_blocks(golden, fuse, backend):
    _, drawn = timm_model()
    with viops.use_backend(backend) if backend != "default" else nullcontext():
        check_outputs(golden, fuse, *functional_forward(drawn, fuse))


def functional_forward(drawn: Drawn, fuse: bool) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Block outputs, kept indices and logits, from the functional API alone."""
    weights, images, _ = drawn

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (DIM,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    projection = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    patches = F.conv2d(images, *projection, stride=PATCH_SIZE).flatten(2).transpose(1, 2)
    x = torch.cat([weights["cls_token"].expand(2, -1, -1), patches], dim=1) + weights["pos_embed"]
    blocks, indices = [], []
    for i in range(DEPTH):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")  # [B, N, 3 * C]
        q, k, v = qkv.unflatten(-1, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, N, D]
        out, scores = viops.class_attention(q, k, v)
        x = x + linear(out.transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        if i in LAYERS:
            x, index = viops.reorganize_tokens(x, scores, KEEPS[fuse][len(indices)], fuse=fuse)
            indices.append(index)
        hidden = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
        blocks.append(x)
    return blocks, indices, linear(norm(x, "norm")[:, 0], "head")


@FUSE
def test_patched_model_gives_the_official_outputs_and_gradients(golden, fuse):
    model, (_, images, weight) = timm_model()
    viops.patch.evit(model, keep_rate=0.7, layers=LAYERS, fuse=fuse)
    blocks: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda _, __, out: blocks.append(out[0] if isinstance(out, tuple) else out)
        )
    logits, kept = model(images, return_index=True)
    check_outputs(golden, fuse, blocks, [index for index, _ in kept], logits)

    (logits * weight).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = torch.stack([grads[name].double().norm() for name in sorted(grads)])
    prefix = "fuse" if fuse else "drop"
    torch.testing.assert_close(norms, golden[f"{prefix}_grad_norms"], **TOLERANCE)
    stored = {
        "cls_token": grads["cls_token"],
        "pos_embed": grads["pos_embed"][0, ::8],
        "qkv0": grads["blocks.0.attn.qkv.bias"],
        "qkv3": grads["blocks.3.attn.qkv.weight"][::16],
    }
    for name, grad in stored.items():
        torch.testing.assert_close(grad, golden[f"{prefix}_grad_{name}"], **TOLERANCE)
