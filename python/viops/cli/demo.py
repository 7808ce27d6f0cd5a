"""`python -m viops demo`: token reorganization on a small ViT that it trains, then on DeiT-S."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import viops

from . import bench, demo_digits
from .console import UserError, print_heading, print_table, require, require_timm
from .demo_digits import Digits
from .demo_picture import digits_as_ink, save_digits, save_photographs
from .measure import best_seconds, peak_bytes

KEEP_RATE = 0.7
DIGIT_LAYERS = (1, 2, 4)
DEIT_LAYERS = (3, 6, 9)
DEIT_BATCH = 8
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", type=Path, help="a picture instead of the two photographs")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_out"), help="where pictures go (%(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--pretrained", action="store_true", help="load timm's weights of DeiT-S (needs a network)"
    )
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)  # for the tests


def run(args: argparse.Namespace) -> int:
    """Runs the five parts; 0, or what bench ended with."""
    start = time.perf_counter()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; --device cpu runs everywhere")
    for package in ("sklearn", "PIL", "matplotlib", "tqdm", "pytest_benchmark"):
        require(package)
    photographs = _load_photographs(args.image)
    _make_folder(args.out)
    require_timm()

    print_heading("1. A small ViT learns scikit-learn's digits")
    digits = demo_digits.load_digits(args.device)
    model = demo_digits.build_vit(args.device)
    demo_digits.train(model, digits, 14, 1.5e-3, "training", args.quick)

    print_heading(f"2. The same model with viops.patch.evit, keep rate {KEEP_RATE}")
    _patch_and_compare(model, digits, args.device, args.quick)

    print_heading("3. What it keeps")
    _draw_digits(model, digits, args.out / "digits.png")

    print_heading(f"4. DeiT-S/16 at 224, keep rate {KEEP_RATE} at blocks {DEIT_LAYERS}")
    _run_deit(photographs, args)

    status = 0
    if not args.quick:
        print_heading("5. python -m viops bench --op token_reorganization --quick")
        status = _run_bench(args.device)
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Pictures are in {args.out}.")
    return status


def _make_folder(folder: Path) -> None:
    """Creates the folder and makes sure, before any work, that files can be written there."""
    probe = folder / ".viops-demo"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}; give a folder to write to") from error


def _load_photographs(path: Path | None) -> Tensor:
    """The picture at the path, or scikit-learn's two photographs: [n, 3, 224, 224] in 0..1."""
    image_module, numpy = require("PIL.Image"), require("numpy")
    if path is None:
        datasets = require("sklearn.datasets")
        names = ("china.jpg", "flower.jpg")
        images = [image_module.fromarray(datasets.load_sample_image(name)) for name in names]
    else:
        try:
            images = [image_module.open(path).convert("RGB")]
        except (OSError, ValueError, image_module.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--image {path}: {reason}; give a JPEG, PNG or the like") from error
    arrays = [numpy.array(_fit(image)) for image in images]  # each [224, 224, 3], uint8
    return torch.stack([torch.from_numpy(array).permute(2, 0, 1) for array in arrays]) / 255


def _fit(image, size: int = 224):  # type: ignore[no-untyped-def]
    """The middle square of a PIL image, resized as for ImageNet models."""
    bicubic = require("PIL.Image").Resampling.BICUBIC
    return require("PIL.ImageOps").fit(image, (size, size), bicubic)


def _patch_and_compare(model: nn.Module, digits: Digits, device: str, quick: bool) -> None:
    """Patches the model in place, fine-tunes it for an epoch and prints it beside the original."""
    original = copy.deepcopy(model)
    viops.patch.evit(model, keep_rate=KEEP_RATE, layers=DIGIT_LAYERS)
    patched_accuracy = demo_digits.accuracy(model, digits)
    print(f"  Patched at blocks {DIGIT_LAYERS}: test accuracy {patched_accuracy:.1%} untrained.")
    demo_digits.train(model, digits, 1, 3e-5, "fine-tuning", quick)

    variants: dict[str, Callable[[Tensor], Tensor]] = {
        "ViT as trained": original,
        "patched, viops": model,
        "patched, plain PyTorch": _on_reference(model),
    }
    images, labels = digits.test_images[:256], digits.test_labels[:256]
    forwards = {name: _inference(variant, images) for name, variant in variants.items()}
    steps = {
        name: _training_step(variant, (original, model), images[:64], labels[:64])
        for name, variant in variants.items()
    }
    seconds = _best_with_bar(forwards, 1 if quick else 20, device)
    step_seconds = _best_with_bar(steps, 1 if quick else 20, device)
    rows = [
        (
            name,
            f"{demo_digits.accuracy(variant, digits):.1%}",
            f"{len(images) / seconds[name]:.0f}",
            f"{64 / step_seconds[name]:.0f}",
            f"{peak_bytes(steps[name], device) / 2**20:.1f} MiB",
        )
        for name, variant in variants.items()
    ]
    print_table(("model", "test accuracy", "images/s", "training images/s", "peak memory"), rows)
    measured = "torch.cuda.max_memory_allocated" if device == "cuda" else "torch.profiler"
    print(
        "  images/s: forward, 256 images, and forward with backward, 64 images; best of several, in"
        " turn.\n  Peak memory: what a training step on 64 images allocates at most beyond weights"
        f" and input, by\n  {measured}. Plain PyTorch: the same weights with"
        ' viops.use_backend("reference"), which forms\n  the whole attention matrix.'
    )
    print("  Both patched rows had one more epoch, of fine-tuning, than the ViT as trained.")
    backends = {
        viops.explain(op, images).backend for op in ("class_attention", "reorganize_tokens")
    }
    print(f"  Backend of the ops: {' and '.join(sorted(map(str, backends)))}.")


def _on_reference(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model's forward on plain PyTorch."""

    def forward(images: Tensor) -> Tensor:
        with viops.use_backend("reference"):
            return model(images)

    return forward


def _inference(model: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> object:
        return model(images)

    return run


def _training_step(
    forward: Callable[[Tensor], Tensor],
    models: Sequence[nn.Module],
    images: Tensor,
    labels: Tensor,
) -> Callable[[], object]:
    """Forward and backward; gradients are freed again, so that each run begins alike."""

    def run() -> None:
        F.cross_entropy(forward(images), labels).backward()
        for model in models:
            model.zero_grad(set_to_none=True)

    return run


def _best_with_bar(
    runs: dict[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, float]:
    bar = require("tqdm").tqdm(range(rounds), desc="measuring", unit="round", leave=False)
    return best_seconds(runs, bar, device)


@torch.no_grad()
def _draw_digits(model: nn.Module, digits: Digits, path: Path) -> None:
    """One test image of each class, and what each patched block kept of it."""
    first = [int((digits.test_labels == label).nonzero()[0]) for label in range(10)]
    images = digits.test_images[first]
    _, kept = model(images, return_index=True)
    masks = viops.patch.kept_masks(kept)
    save_digits(path, digits_as_ink(images), masks, DIGIT_LAYERS)

    patches = F.unfold(images, demo_digits.PATCH_SIZE, stride=demo_digits.PATCH_SIZE)  # [B, 16, P]
    ink = patches.mean(dim=1)  # [B, P]
    shares = [f"{(ink * mask).sum().item() / ink.sum().item():.0%}" for mask in masks]
    print(
        "  This ViT starts from an initialisation in which its class token looks for ink, so the"
        " picture shows\n  the mechanism on a model made to look at strokes."
    )
    print(f"  Of the ink, {', '.join(shares)} is in patches kept after blocks {DIGIT_LAYERS}.")
    print(f"  {path}")


def _run_deit(photographs: Tensor, args: argparse.Namespace) -> None:
    """Times DeiT-S with and without the patch, and draws what it keeps of the photographs."""
    model, weights = _create_deit(args.pretrained)
    model = model.to(args.device).eval()
    patched = viops.patch.evit(copy.deepcopy(model), keep_rate=KEEP_RATE, layers=DEIT_LAYERS)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (_IMAGENET_MEAN, _IMAGENET_STD))
    images = ((photographs - mean) / std).to(args.device)  # [n, 3, 224, 224]
    batch = images.repeat(-(-DEIT_BATCH // len(images)), 1, 1, 1)[:DEIT_BATCH]

    runs = {"DeiT-S": _inference(model, batch), "DeiT-S patched": _inference(patched, batch)}
    seconds = _best_with_bar(runs, 1 if args.quick else 6, args.device)
    rates = {name: DEIT_BATCH / taken for name, taken in seconds.items()}
    rows = [(name, f"{rate:.1f}", f"{rate / rates['DeiT-S']:.2f}") for name, rate in rates.items()]
    print_table(("model", "images/s", "ratio"), rows)
    print(f"  Batch {DEIT_BATCH}, float32, {weights}.")

    with torch.no_grad():
        _, kept = patched(images, return_index=True)
    path = args.out / "photographs.png"
    heading = f"Patches that DeiT-S/16 keeps (bright) and fuses (dim); {weights}"
    save_photographs(path, photographs, viops.patch.kept_masks(kept), DEIT_LAYERS, heading)
    print(f"  {path}")


def _create_deit(pretrained: bool) -> tuple[nn.Module, str]:
    """timm's DeiT-S and what its weights are."""
    timm = require_timm()
    name = "deit_small_patch16_224"
    if pretrained:
        try:
            return timm.create_model(name, pretrained=True), "timm's weights"
        except Exception as error:  # each way to fetch weights fails in exceptions of its own
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            print(
                f"  --pretrained: no weights ({type(error).__name__}: {reason}); going on without"
            )
    torch.manual_seed(0)
    return timm.create_model(name), "random weights, so which patches stay means nothing"


def _run_bench(device: str) -> int:
    """The same as the command that the heading names; its exit status."""
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    words = ["--op", "token_reorganization", "--quick", "--device", device]
    return bench.run(parser.parse_args(words))
