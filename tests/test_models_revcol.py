"""viops.models.revcol against the official code's outputs, and as models that people use."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product

import model_checks
import pytest
import revcol_golden
import torch
import viops
from reversible_networks import rebuilt_to_the_bit
from torch import Tensor, nn
from viops import models
from viops.models.revcol import CONFIGS, ChannelNorm, Config, Level, RevCol

pytestmark = pytest.mark.filterwarnings("ignore:.*without a kernel of its own:RuntimeWarning")

SIZES = {
    "t": models.revcol_t,
    "s": models.revcol_s,
    "b": models.revcol_b,
    "l": models.revcol_l,
    "xl": models.revcol_xl,
    "h": models.revcol_h,
}
EACH_SIZE = pytest.mark.parametrize("size", SIZES)
EACH_MODEL = pytest.mark.parametrize("name", [*SIZES, *revcol_golden.NARROW])
KINDS = ("plain", "supervised")
EACH_FORMAT = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last]
)
EACH_FORM = pytest.mark.parametrize("reversible", [True, False], ids=["reversible", "stored"])


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return revcol_golden.load()


def build(name: str, kind: str, **options: object) -> RevCol:
    """The golden file's model of this name."""
    options["inter_supv"] = kind == "supervised"
    if name in SIZES:
        return SIZES[name](**options)
    classes = revcol_golden.NUM_CLASSES[name]
    return RevCol(revcol_golden.NARROW[name], num_classes=classes, **options)


def drawn(name: str, kind: str, **options: object) -> RevCol:
    """It with the golden file's parameters, made without values that would be drawn anew."""
    model = model_checks.unfilled(build, name=name, kind=kind, **options)
    model.load_state_dict(revcol_golden.draw_state(model.state_dict()))
    return model.eval()


def tiny(**options: object) -> RevCol:
    """A model with all that the sizes have, and few channels."""
    torch.manual_seed(0)
    config = Config((8, 12, 16, 24), (1, 2, 1, 1), 4, drop_path_rate=0.2, from_last=True)
    model = RevCol(config, **{"num_classes": 5, **options})
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
    return model_checks.perturbed(model)


def all_outputs(model: RevCol, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, those of all classifiers stacked, and decoded images, of which there may be none."""
    if not model.inter_supv:
        return model(images), []
    logits, decoded = model.forward_supervised(images)
    return torch.stack(logits), decoded


# the official models


@pytest.mark.parametrize("kind", KINDS)
@EACH_MODEL
def test_state_dict_is_the_official_ones(golden: dict[str, Tensor], name: str, kind: str) -> None:
    state = model_checks.on_meta(build, name=name, kind=kind).state_dict()
    assert torch.equal(revcol_golden.digest(state), golden[f"{name}_{kind}_keys"])


@pytest.mark.parametrize(
    ("name", "kind"), [*product(["t", *revcol_golden.NARROW], KINDS), ("b", KINDS[0])]
)
def test_outputs_are_the_official_ones(golden: dict[str, Tensor], name: str, kind: str) -> None:
    model, images = drawn(name, kind), revcol_golden.draw_images(*revcol_golden.IMAGES)
    with torch.no_grad():
        logits, decoded = all_outputs(model, images)
        last = model(images)
    expected = golden[f"{name}_{kind}"]
    assert expected.std() > 0.5
    torch.testing.assert_close(logits[..., ::4], expected, **model_checks.LOGITS)
    torch.testing.assert_close(last, logits if kind == "plain" else logits[-1])
    if kind == "supervised":
        expected = golden[f"{name}_images"]
        assert expected.std() > 0.5
        torch.testing.assert_close(revcol_golden.sample(decoded), expected, **model_checks.LOGITS)
        assert {image.shape for image in decoded} == {images.shape}


def gradient_norms(model: RevCol, images: Tensor) -> Tensor:
    """Of the golden file's loss, by rising name; double, and zero where there is no gradient."""
    logits, decoded = all_outputs(model, images)
    outputs = [*logits, *decoded] if model.inter_supv else [logits]
    revcol_golden.supervised_loss(outputs).backward()
    parameters = dict(model.named_parameters())
    return torch.stack([parameters[name].grad.double().norm() for name in sorted(parameters)])


@EACH_FORM
@pytest.mark.parametrize(("name", "kind"), [*product(revcol_golden.NARROW, KINDS), ("t", KINDS[1])])
def test_gradients_are_the_official_ones(
    golden: dict[str, Tensor], name: str, kind: str, reversible: bool
) -> None:
    model = drawn(name, kind, drop_path_rate=0.0, reversible=reversible).train().double()
    norms = gradient_norms(model, revcol_golden.draw_images(*revcol_golden.IMAGES).double())
    expected = golden[f"{name}_{kind}_grads"].double()
    assert (expected == 0).sum() == 4  # the first column's alphas
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["default", "reference"])
@pytest.mark.parametrize(("reversible", "rtol"), [(True, 2e-3), (False, 1e-4)])
def test_gradients_in_float32(
    golden: dict[str, Tensor], reversible: bool, rtol: float, backend: str
) -> None:
    """Alphas are down to 0.15 here: rebuilding divides by them four times."""
    model = drawn("narrow", "supervised", drop_path_rate=0.0, reversible=reversible).train()
    with viops.use_backend(backend) if backend != "default" else nullcontext():
        norms = gradient_norms(model, revcol_golden.draw_images(*revcol_golden.IMAGES))
    expected = golden["narrow_supervised_grads"].double()
    torch.testing.assert_close(norms, expected, rtol=rtol, atol=0)


def test_sizes_are_those_of_the_paper() -> None:
    millions = {"t": 30, "s": 60, "b": 138, "l": 273, "xl": 833, "h": 2157}
    for size, make in SIZES.items():
        assert model_checks.count_parameters(make) // 1e6 == millions[size]


@EACH_SIZE
def test_drop_path_rises_to_its_rate_in_each_column(size: str) -> None:
    model = model_checks.on_meta(SIZES[size])
    last = {"t": 0.1, "s": 0.3, "b": 0.4, "l": 0.5, "xl": 0.5, "h": 0.5}[size]
    columns = [each for each in model.children() if isinstance(each, viops.nn.ReversibleColumn)]
    assert len(columns) == CONFIGS[f"revcol_{size}"].num_columns
    for column in columns:
        model_checks.check_drop_paths(column, sum(model.config.depths), last)


def test_values_that_training_begins_with() -> None:
    torch.manual_seed(0)
    model = RevCol(revcol_golden.NARROW["narrow"], inter_supv=True, head_init_scale=0.001)
    scaled = 0
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            assert (parameter == 1e-6).all()
        elif "alpha" in name:
            assert (parameter == 0.5).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        elif parameter.dim() == 1:
            assert (parameter == 1).all()
        else:
            is_scaled = name.endswith("classifier.1.weight")
            scaled += is_scaled
            std = 0.02 * (0.001 if is_scaled else 1)
            assert parameter.std().item() == pytest.approx(std, rel=0.3), name
    assert scaled == 4


# as models that people use


@EACH_FORM
def test_supervised_training_lowers_the_losses(reversible: bool) -> None:
    options = {"drop_path_rate": 0.1, "drop_rate": 0.1, "reversible": reversible}
    model = tiny(inter_supv=True, **options).train()
    images = torch.randn(8, 3, 1, 1).expand(8, 3, 32, 32)
    labels = torch.arange(8) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        logits, decoded = model.forward_supervised(images)
        classes = torch.stack([nn.functional.cross_entropy(each, labels) for each in logits]).sum()
        pictures = torch.stack([(each - images).square().mean() for each in decoded]).sum()
        optimizer.zero_grad()
        (classes + pictures).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append((classes.item(), pictures.item()))
    for first, last in zip(losses[0], losses[-1], strict=True):
        assert last < 0.7 * first


@pytest.mark.parametrize("inter_supv", [True, False], ids=["supervised", "plain"])
def test_reversible_and_stored_agree(inter_supv: bool) -> None:
    """With dropout and stochastic depth, which draw the same again where levels run again."""
    found = []
    for reversible in (True, False):
        model = tiny(inter_supv=inter_supv, reversible=reversible, drop_rate=0.3).train().double()
        images = torch.randn(4, 3, 64, 32, generator=torch.Generator().manual_seed(1)).double()
        torch.manual_seed(2)
        logits, decoded = all_outputs(model, images)
        loss = logits.square().sum() + sum(each.square().sum() for each in decoded)
        loss.backward()
        found.append((logits, [parameter.grad for parameter in model.parameters()]))
        after = torch.rand(())
        torch.manual_seed(2)
        all_outputs(model, images)
        assert torch.equal(torch.rand(()), after)  # backward has drawn nothing from the generator
        assert not torch.equal(all_outputs(model, images)[0], logits)
    (logits, grads), (expected_logits, expected_grads) = found
    torch.testing.assert_close(logits, expected_logits, rtol=1e-12, atol=1e-12)
    for got, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@EACH_FORMAT
def test_levels_run_again_on_what_they_had(memory_format: torch.memory_format) -> None:
    """To the bit, whatever blocks do otherwise where there are no gradients."""
    model = tiny(drop_path_rate=0.5).train()
    levels = [module for module in model.modules() if isinstance(module, Level)]
    with rebuilt_to_the_bit(levels):
        model(torch.randn(2, 3, 64, 96).to(memory_format=memory_format)).square().sum().backward()


def test_checkpointing_is_the_reversible_form() -> None:
    model = tiny(reversible=False).train()
    images = torch.randn(2, 3, 64, 64)
    runs: list[Tensor] = []
    model.subnet1.level2.register_forward_hook(lambda *_: runs.append(images))
    for enable, count in ((True, 2), (False, 1)):
        runs.clear()
        model.set_grad_checkpointing(enable)
        assert model.reversible == enable
        model(images).sum().backward()
        assert len(runs) == count


def test_any_image_size_that_32_divides_in_any_layout() -> None:
    sizes = ((32, 32), (96, 64), (32, 160))
    model_checks.check_layouts(tiny(in_chans=2), sizes, channels=2)


class Supervised(nn.Module):
    """All outputs as one, whose layout nobody looks at."""

    def __init__(self, model: RevCol) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits, decoded = self.model.forward_supervised(x)
        return torch.stack([each.sum() for each in (*logits, *decoded)])


def test_activations_stay_in_channels_last() -> None:
    """Blocks see and give it, and so do the norms, convolutions and levels between them."""
    blocks, norms = (viops.nn.ConvNeXtBlock, Level), (nn.Conv2d, ChannelNorm)

    def is_chosen(module: nn.Module) -> bool:
        is_depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
        return isinstance(module, blocks + norms) and not is_depthwise

    columns = 4 * (5 + 4) + 4 * 3 * 2
    decoders = 3 * (3 + 3 * 2 + 1)
    model = Supervised(tiny(inter_supv=True))
    model_checks.check_channels_last(model, is_chosen, calls=2 + columns + decoders)


def test_features_and_head() -> None:
    model, features, pooled = model_checks.check_features_and_head(tiny)
    norm = model.cls.classifier[0]
    torch.testing.assert_close(pooled, norm(features.mean(dim=(2, 3))))


def test_classifiers_under_supervision_are_reset_together() -> None:
    model, images = tiny(inter_supv=True), torch.randn(2, 3, 64, 64)
    assert model.get_classifier() is model.cls_blocks[3].classifier[1]
    model.double().reset_classifier(7)
    logits, decoded = model.forward_supervised(images.double())
    assert [each.shape for each in logits] == 4 * [(2, 7)]
    assert [each.shape for each in decoded] == 3 * [images.shape]
    assert model.get_classifier().out_features == model.num_classes == 7


def test_dropout_comes_before_every_classifier() -> None:
    model = tiny(inter_supv=True, drop_rate=1.0).train()
    biases = [each.classifier[1].bias.expand(2, 5) for each in model.cls_blocks]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), biases[3])
    for logits, bias in zip(model.forward_supervised(images)[0], biases, strict=True):
        assert torch.equal(logits, bias)


def test_intermediates_are_the_last_columns_levels() -> None:
    model = tiny()
    images = torch.randn(2, 3, 64, 96)
    outputs: list[Tensor] = []
    for info in model.feature_info[:3]:
        level = model.get_submodule(info["module"])
        level.register_forward_hook(lambda _, __, out: outputs.append(out))
    features, maps = model_checks.check_intermediates(model, images, channels=(8, 12, 16, 24))
    assert torch.equal(features, maps[-1])
    column = model.subnet3
    for i, (out, each) in enumerate(zip(outputs[:3], maps, strict=False)):
        previous = (each - out) / getattr(column, f"alpha{i}")
        assert previous.shape == out.shape
        assert previous.std() > 0.1  # a level's output without the shortcut
    last = model.forward_intermediates(images, 1, output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(last[0].permute(0, 3, 1, 2), maps[3])
    first = model.forward_intermediates(images, [0], stop_early=True)
    assert torch.equal(first[0], features)
    assert torch.equal(first[1][0], maps[0])
    model_checks.check_pruning(model, images, maps)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.randn(1, 3, 48, 64)), "^x: .* that 32 divides, got 48 and 64$"),
        (lambda m: m(torch.randn(1, 3, 64, 65)), "^x: .* that 32 divides, got 64 and 65$"),
        (lambda m: m(torch.randn(1, 3, 0, 64)), "^x: .* that 32 divides, got 0 and 64$"),
        (lambda m: m(torch.randn(1, 4, 32, 32)), r"^x: .* C = 3, got shape \[1, 4, 32, 32\]$"),
        (lambda m: m(torch.randn(3, 32, 32)), r"^x: .* got shape \[3, 32, 32\]$"),
        (lambda m: m.forward_supervised(torch.randn(1, 3, 32, 32)), "^inter_supv: .* got False$"),
        (lambda m: RevCol(Config((8,) * 4, (1,) * 4, 6, 0.0), inter_supv=True), "^inter_supv: "),
        (lambda m: m.forward_intermediates(torch.randn(1, 3, 32, 32), norm=True), "^norm: "),
        (lambda m: m.reset_classifier(3, "max"), "^global_pool: expected"),
        (lambda m: tiny(global_pool="max"), "^global_pool: expected"),
        (lambda m: tiny(in_chans=0), "^in_chans: expected at least 1, got 0$"),
        (lambda m: tiny(num_classes=-1), "^num_classes: expected at least 0, got -1$"),
        (lambda m: tiny(drop_rate=1.5), "^drop_rate: expected 0 to 1, got 1.5$"),
        (lambda m: tiny(drop_path_rate=-0.1), "^drop_path_rate: expected 0 to 1, got -0.1$"),
        (lambda m: tiny(head_init_scale=math.inf), "^head_init_scale: .* finite .*, got inf$"),
        (lambda m: tiny(kernel_size=4), "^kernel_size: "),
    ],
)
def test_bad_arguments(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tiny())


@pytest.mark.parametrize(
    "name", ["inter_supv", "reversible", "exact", "drift_check", "drop_rate", "head_init_scale"]
)
def test_arguments_of_wrong_types(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name}: expected a (bool|number), got str$"):
        tiny(**{name: "no"})


def test_copies_and_pickles() -> None:
    model_checks.check_copies(tiny(inter_supv=True))


def test_columns_may_be_replaced() -> None:
    """What the attribute holds is what runs."""
    model, images = tiny(), torch.randn(2, 3, 32, 32)
    expected = model(images)
    model.subnet1 = tiny().subnet1
    assert torch.equal(model(images), expected)
    nn.init.zeros_(model.subnet1.level0.blocks[0].gamma)
    assert not torch.equal(model(images), expected)


def test_half_precision() -> None:
    model_checks.check_half_precision(tiny(reversible=False))
    model_checks.check_half_precision(tiny())


def test_each_level_may_be_compiled() -> None:
    torch.manual_seed(0)
    config = Config((8, 12), (1, 1), 3, drop_path_rate=0.2)
    model = model_checks.perturbed(RevCol(config, num_classes=5)).train()
    model_checks.check_compile(model, torch.randn(4, 3, 16, 8), Level)


def test_int16_layers_in_it_are_called() -> None:
    model_checks.check_int16_layers_are_called(tiny())


# timm


def test_timm_creates_them() -> None:
    model_checks.check_timm_creates("revcol_t", CONFIGS, RevCol, crop_pct=0.875)


def test_timm_makes_them_backbones() -> None:
    model_checks.check_timm_backbone("revcol_t", channels=(64, 256))
