"""viops.patch.micro_batch: weight standardization and batch channel norm in models that exist."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
import viops
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from viops.patch.micro_batch import FusedActivation, FusedBlock, StandardizedConv2d

pytestmark = pytest.mark.filterwarnings("ignore:.*without a kernel of its own:RuntimeWarning")


def sequence(num_classes: int) -> nn.Module:
    """As VGG's features."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 20, 3, groups=2),
        nn.BatchNorm2d(20),
        nn.ReLU(),
        nn.Conv2d(20, 20, 3),
        nn.ReLU(),
        nn.BatchNorm2d(20),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(20, num_classes),
    )


def conv_norm_acts(num_classes: int) -> nn.Module:
    """timm's norms with an activation of their own: ReLU, none, another, and after DropBlock."""
    layer = timm.layers.ConvNormAct
    drop = functools.partial(timm.layers.DropBlock2d, 0.5, block_size=3)
    return nn.Sequential(
        layer(3, 12, 3),
        layer(12, 16, 3, apply_act=False),
        layer(16, 16, 3, act_layer=nn.SiLU),
        layer(16, 16, 3, drop_layer=drop),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


def timm_resnet(name: str, **options: object) -> Callable[..., nn.Module]:
    """One of timm's resnets with narrow stages of one block."""
    options = {"layers": (1, 1, 1, 1), "channels": (16, 16, 24, 32), **options}
    return functools.partial(timm.create_model, name, **options)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "basic": timm_resnet("resnet18", layers=(1, 1, 1, 2)),
    "bottleneck": timm_resnet("resnet26"),
    "tiered": timm_resnet("resnet26t"),
    "blur": timm_resnet("resnetblur18"),
    "attention": timm_resnet("seresnet18"),
    "drop": timm_resnet("resnet26", drop_path_rate=0.5, drop_block_rate=0.1),
    "silu": timm_resnet("resnet26", act_layer=nn.SiLU),
    "resnext": timm_resnet("resnext50_32x4d", cardinality=4, channels=(64,) * 4),
    "regnetx": functools.partial(timm.create_model, "regnetx_002"),
    "regnety": functools.partial(timm.create_model, "regnety_002"),
    "densenet": functools.partial(timm.create_model, "densenet121", block_config=(2, 2)),
    "torchvision18": torchvision.models.resnet18,
    "torchvision50": functools.partial(
        torchvision.models.resnet.ResNet,
        torchvision.models.resnet.Bottleneck,
        [1, 2, 1, 1],
        width_per_group=16,
    ),
    "sequence": sequence,
    "conv_norm_acts": conv_norm_acts,
}


def make(name: str) -> nn.Module:
    """A model with parameters and statistics that are not those of the start."""
    torch.manual_seed(0)
    model = MODELS[name](num_classes=7)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def images(batch: int = 3, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def unfused(model: nn.Module, num_groups: int) -> nn.Module:
    """The model by rules that are written otherwise: no fusion, no replaced activation."""
    model = copy.deepcopy(model)
    names = {name for name, m in make_patched_names(model)}
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.BatchNorm2d):
            groups = max(g for g in range(1, num_groups + 1) if module.num_features % g == 0)
            setattr(parent, name.rpartition(".")[2], PlainNorm(module, groups))
        elif name in names:
            conv = viops.nn.WSConv2d.unfold(module)
            setattr(parent, name.rpartition(".")[2], conv)
    return model


def make_patched_names(model: nn.Module) -> list[tuple[str, nn.Module]]:
    patched = viops.patch.micro_batch(copy.deepcopy(model))
    return [(n, m) for n, m in patched.named_modules() if isinstance(m, StandardizedConv2d)]


class PlainNorm(nn.Module):
    """Batch norm, then what is left of batch channel norm, then timm's activation."""

    def __init__(self, bn: nn.Module, num_groups: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(bn.num_features, bn.eps, bn.momentum)
        self.bn.load_state_dict(bn.state_dict())
        self.bn.to(bn.weight.dtype)
        self.then = nn.Sequential(
            getattr(bn, "drop", nn.Identity()), getattr(bn, "act", nn.Identity())
        )
        self.num_groups = num_groups

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.group_norm(self.bn(x), self.num_groups, eps=self.bn.eps)
        return self.then(out)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_patched_model_equals_one_without_fusion(name: str, training: bool) -> None:
    """Output, gradients and running statistics, in float64."""
    plain = make(name).double()
    model = viops.patch.micro_batch(copy.deepcopy(plain), num_groups=8)
    other = unfused(plain, 8)
    results = []
    for each in (model, other):
        each.train(training)
        torch.manual_seed(1)
        x = images().double().requires_grad_()
        y = each(x)
        parameters = [p for n, p in each.named_parameters() if n.rpartition(".")[2] == "weight"]
        of = [p for p in parameters if p.dim() == 4]  # the convolutions'
        grads = torch.autograd.grad(y.square().sum(), [x, *of])
        running = [b for n, b in each.named_buffers() if "running" in n]
        results.append([y, *grads, *running])
    assert len(results[0]) == len(results[1]) > 9
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-7 * want.norm() + 1e-12


#: Of all convolutions those that standardise; of all norms those that took over a ReLU; blocks
#: that add the shortcut in the norm.
COUNTS = {
    "basic": ((15, 15), (11, 15), 5),
    "bottleneck": ((16, 16), (13, 16), 4),
    "tiered": ((18, 18), (15, 18), 4),
    "blur": ((13, 13), (9, 13), 4),
    "attention": ((13, 21), (5, 13), 0),  # comes between the norm and the shortcut
    "drop": ((16, 16), (8, 16), 1),  # so does drop path, but in the first block
    "silu": ((16, 16), (0, 16), 0),
    "resnext": ((17, 17), (13, 17), 4),
    "regnetx": ((44, 44), (27, 44), 0),
    "regnety": ((44, 70), (27, 44), 0),
    "densenet": ((5, 10), (11, 11), 0),  # what follows a concatenation or pooling is no norm of it
    "torchvision18": ((20, 20), (17, 20), 8),
    "torchvision50": ((20, 20), (16, 20), 5),
    "sequence": ((2, 3), (2, 3), 0),
    "conv_norm_acts": ((4, 4), (1, 4), 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_replaced(name: str) -> None:
    plain = make(name)
    parameters = set(plain.parameters())
    model = viops.patch.micro_batch(plain)
    assert model is plain
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, viops.nn.BatchChannelNorm2d)]
    counts = (
        (sum(isinstance(m, StandardizedConv2d) for m in convs), len(convs)),
        (sum(m.activation == "relu" for m in norms), len(norms)),
        sum(isinstance(m, FusedBlock) for m in model.modules()),
    )
    assert counts == COUNTS[name]
    assert parameters <= set(model.parameters())
    assert len(set(model.parameters()) - parameters) == 2 * len(norms)
    for module in model.modules():
        assert module in [norm.bn for norm in norms] or type(module) is not nn.BatchNorm2d


@pytest.mark.parametrize("name", MODELS)
def test_undo_leaves_nothing_behind(name: str) -> None:
    model = MODELS[name](num_classes=7).eval()  # with zeros at the end of branches
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    objects = [id(module) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    text, out = repr(model), model(images())
    viops.patch.micro_batch(model, num_groups=8, estimate=True)
    assert repr(model) != text
    assert viops.patch.undo(model) is model
    assert repr(model) == text
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert [id(module) for module in model.modules()] == objects
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(images()), out)
    with pytest.raises(ValueError, match="has patched, got"):
        viops.patch.undo(model)
    viops.patch.micro_batch(model)


def test_undo_keeps_what_was_trained_and_the_mode() -> None:
    model = viops.patch.micro_batch(make("basic")).train()
    model(images()).square().sum().backward()
    torch.optim.SGD(model.parameters(), 1e-3).step()
    mean, weight = model.bn1.bn.running_mean.clone(), model.conv1.weight.detach().clone()
    viops.patch.undo(model.eval())
    assert torch.equal(model.bn1.running_mean, mean)
    assert torch.equal(model.conv1.weight, weight)
    assert not any(module.training for module in model.modules())
    assert model(images()).isfinite().all()


def test_state_dict_keys() -> None:
    plain, model = make("basic"), viops.patch.micro_batch(make("basic"), estimate=True)
    norms = [name for name, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d)]
    expected = {}
    for key, value in plain.state_dict().items():
        owner, _, rest = key.rpartition(".")
        expected[f"{owner}.bn.{rest}" if owner in norms else key] = value
    state = model.state_dict()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key
    new = {f"{n}.{k}" for n in norms for k in ("weight", "bias", "bn.estbn_moving_speed")}
    assert set(state) == {*expected, *new}
    other = viops.patch.micro_batch(MODELS["basic"](num_classes=7), estimate=True)
    other.load_state_dict(state)
    assert torch.equal(other.eval()(images()), model.eval()(images()))


def test_zeros_at_the_end_of_a_branch_go_to_the_groups() -> None:
    """A new ResNet's residual branches begin at nothing; they do so with a norm of groups, too."""
    model = viops.patch.micro_batch(timm.create_model("resnet18", num_classes=7))
    last = model.layer1[0].bn2
    assert (last.bn.weight == 1).all()
    assert (last.weight == 0).all()
    assert (model.bn1.weight == 1).all()
    x = torch.randn(2, 64, 8, 8)
    assert torch.equal(model.layer1[0](x), x.relu())
    model(images()).square().sum().backward()
    assert last.weight.grad.norm() > 0


def test_groups_that_do_not_divide_the_channels() -> None:
    model = viops.patch.micro_batch(make("regnetx"), num_groups=32)
    for norm in model.modules():
        if isinstance(norm, viops.nn.BatchChannelNorm2d):
            rest = range(norm.num_groups + 1, 33)
            assert norm.num_features % norm.num_groups == 0
            assert all(norm.num_features % groups for groups in rest)


def test_copies_are_patched_and_independent() -> None:
    model = viops.patch.micro_batch(make("torchvision18")).eval()
    out = model(images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(other(images()), out)
        viops.patch.undo(other)
        assert torch.equal(other(images()), make("torchvision18").eval()(images()))
        assert torch.equal(model(images()), out)


def test_skipped_modules_stay() -> None:
    model = viops.patch.micro_batch(make("basic"), skip=["conv1", "layer4", "layer1.0.bn1"])
    assert type(model.conv1) is nn.Conv2d
    assert type(model.bn1) is viops.nn.BatchChannelNorm2d
    assert not any(
        isinstance(
            m, (StandardizedConv2d, FusedActivation, FusedBlock, viops.nn.BatchChannelNorm2d)
        )
        for m in model.layer4.modules()
    )
    block = model.layer1[0]
    assert type(block.bn1) is nn.BatchNorm2d
    assert type(block.act1) is nn.ReLU
    assert type(block.act2) is FusedActivation
    assert model(images()).isfinite().all()
    # the one ReLU of torchvision's block is called after each of its norms
    model = viops.patch.micro_batch(make("torchvision18"), skip=["layer1.0.bn1"])
    block = model.layer1[0]
    assert type(block) is torchvision.models.resnet.BasicBlock
    assert type(block.relu) is nn.ReLU
    assert block.bn2.activation is None


def test_depthwise_convolutions_stay() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 1),
        nn.GroupNorm(4, 8),
        nn.Conv2d(8, 5, 1),
    )
    viops.patch.micro_batch(model)
    patched = [type(m) is StandardizedConv2d for m in model if isinstance(m, nn.Conv2d)]
    assert patched == [True, False, True, True, False]


def test_hooked_activations_stay() -> None:
    model = make("basic")
    seen = []
    model.layer1[0].act1.register_forward_hook(lambda *args: seen.append(args[-1]))
    viops.patch.micro_batch(model)
    assert type(model.layer1[0].act1) is nn.ReLU
    assert model.layer1[0].bn1.activation is None
    model(images())
    assert len(seen) == 1


def test_features_are_those_after_the_activation() -> None:
    """timm takes features by the names of activations."""
    model = viops.patch.micro_batch(make("bottleneck")).eval()
    final, features = model.forward_intermediates(images())
    assert all((feature >= 0).all() for feature in features)
    torch.testing.assert_close(model.forward_head(final), model(images()))


def test_shared_modules_stay_shared() -> None:
    """One norm in two places; a ReLU after one of them is not the norm's."""
    norm, relu = nn.BatchNorm2d(8), nn.ReLU()
    model = nn.Sequential(nn.Conv2d(8, 8, 1), norm, relu, nn.Conv2d(8, 8, 1), norm).eval()
    viops.patch.micro_batch(model)
    assert model[1] is model[4]
    assert type(model[2]) is nn.ReLU
    viops.patch.undo(model)
    assert model[1] is model[4] is norm


def test_shared_statistics_after_the_patch() -> None:
    model = viops.patch.micro_batch(make("basic"))
    out = model.eval()(images())
    viops.nn.convert_sync_batch_channel_norm(model)
    assert type(model.bn1) is viops.nn.SyncBatchChannelNorm
    assert torch.equal(model(images()), out)
    viops.patch.undo(model)
    assert torch.equal(model(images()), make("basic").eval()(images()))


def test_autocast() -> None:
    model = viops.patch.micro_batch(make("basic"))
    out = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images())
        block = model.layer1[0](torch.randn(2, 64, 8, 8))  # a shortcut in float32
    assert mixed.dtype is block.dtype is torch.bfloat16
    mixed.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert (mixed - out).norm() < 0.1 * out.norm()


def test_channels_last() -> None:
    model = viops.patch.micro_batch(make("basic")).eval()
    out = model(images())
    model.to(memory_format=torch.channels_last)
    got = model(images().contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["basic", "torchvision50", "densenet"])
def test_compile_without_graph_breaks_and_without_recompiling_for_a_batch(name: str) -> None:
    model = viops.patch.micro_batch(make(name)).eval()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (2, 3, 7, 5):
        got = compiled(images(batch))
        torch.testing.assert_close(got, model(images(batch)), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2  # the first size, and one graph for all that follow


def test_compiled_and_checkpointed_training_equal_eager() -> None:
    def results(wrap: Callable) -> list[Tensor]:
        model = viops.patch.micro_batch(make("basic")).double()
        y = wrap(model)(images().double())
        y.square().sum().backward()
        return [y, *(p.grad for p in model.parameters()), model.bn1.bn.running_mean]

    def checkpointed(model: nn.Module) -> Callable[[Tensor], Tensor]:
        model.set_grad_checkpointing()
        return model

    expected = results(lambda model: model)
    compiled = results(lambda m: torch.compile(m, fullgraph=True, backend="aot_eager"))
    for got in (compiled, results(checkpointed)):
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    whole = results(lambda model: lambda x: checkpoint(model, x, use_reentrant=False))
    for one, other in zip(whole[:-1], expected[:-1], strict=True):  # statistics move twice
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
