"""viops.patch.int16: networks that multiply INT16 integers."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import viops
from torch import Tensor, nn
from viops.ops.integer_conv import kernels
from viops.patch.int16 import IntegerConv2d, IntegerLinear
from viops.patch.integer_blocks import IntegerBlock

pytestmark = pytest.mark.filterwarnings("ignore:.*without a kernel of its own:RuntimeWarning")


def narrow(name: str, **options: object) -> Callable[[], nn.Module]:
    options = {"layers": (1, 2, 1, 1), "channels": (16, 16, 24, 32), "num_classes": 10, **options}
    return functools.partial(timm.create_model, name, **options)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "basic": narrow("resnet18"),
    "bottleneck": narrow("resnet26"),
    "pooled shortcut": narrow("resnet26t"),
    "anti-aliased": narrow("resnetblur18"),
    "attention": narrow("seresnet18"),
    "torchvision18": functools.partial(torchvision.models.resnet18, num_classes=10),
    "torchvision50": functools.partial(
        torchvision.models.resnet.ResNet,
        torchvision.models.resnet.Bottleneck,
        [1, 2, 1, 1],
        width_per_group=16,
        num_classes=10,
    ),
    "convnext": functools.partial(timm.create_model, "convnext_atto", num_classes=10),
    "deit": functools.partial(timm.create_model, "deit_tiny_patch16_224", depth=2, img_size=64),
}
#: Those of which some blocks run from integers to integers.
FUSED = set(MODELS) - {"attention", "convnext", "deit"}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def models_of(name: str, **options: object) -> tuple[nn.Module, nn.Module]:
    """A network with statistics and affines that are not trivial, and the same patched."""
    torch.manual_seed(0)
    plain = MODELS[name]()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    plain.eval()
    return plain, viops.patch.int16(copy.deepcopy(plain), **options)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def difference(value: Tensor, other: Tensor) -> float:
    return ((value - other).norm() / other.norm()).item()


def test_logits_are_near_those_of_float32(name: str) -> None:
    plain, patched = models_of(name, scaling="max")
    with torch.no_grad():
        assert difference(patched(images()), plain(images())) < 2e-3


def test_blocks_that_infer_compute_what_others_do(name: str) -> None:
    _, patched = models_of(name)
    blocks = [module for module in patched.modules() if isinstance(module, IntegerBlock)]
    assert bool(blocks) == (name in FUSED)
    with torch.no_grad():
        fused = patched(images())
    unfused = patched(images())  # a gradient may be asked for: blocks run their own forward
    assert unfused.requires_grad
    # integers may round to the other neighbour where norms round otherwise
    assert difference(fused, unfused) < 1e-3
    with torch.inference_mode():
        assert torch.equal(patched(images()), fused)


def test_within_blocks_integers_go_from_layer_to_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    _, patched = models_of("torchvision50")
    calls = []
    quantize = kernels.native_quantize

    def counting(x: Tensor, *args: object) -> tuple:
        calls.append(args[4] if len(args) > 4 else None)
        return quantize(x, *args)

    monkeypatch.setattr(kernels, "native_quantize", counting)
    with torch.no_grad():
        patched(images())
        calls.clear()
        patched(images())
    assert len(calls) == 15  # the blocks' convolutions but for shortcuts; each knows the largest
    assert None not in calls


def test_state_dict_and_parameters_stay(name: str) -> None:
    torch.manual_seed(0)
    plain = MODELS[name]()
    before = dict(plain.named_parameters())
    keys = list(plain.state_dict())
    patched = viops.patch.int16(plain)
    assert patched is plain
    assert list(patched.state_dict()) == keys
    assert all(p is before[key] for key, p in patched.named_parameters())
    restored = viops.patch.undo(patched)
    assert restored is plain
    fresh = MODELS[name]()
    fresh.load_state_dict(patched.state_dict())
    classes = [type(module) for module in restored.modules()]
    assert classes == [type(module) for module in fresh.modules()]
    assert [set(vars(m)) for m in restored.modules()] == [set(vars(m)) for m in fresh.modules()]


def test_the_first_and_the_last_layer_stay(name: str) -> None:
    _, patched = models_of(name)
    layers = [m for m in patched.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    integer = [isinstance(layer, (IntegerConv2d, IntegerLinear)) for layer in layers]
    assert integer == [False, *[True] * (len(layers) - 2), False]


def test_names_in_skip_stay() -> None:
    _, patched = models_of("basic", skip=["layer1", "fc"])
    assert isinstance(patched.conv1, IntegerConv2d)
    assert not viops.patch.int16.__globals__["is_patched"](patched.layer1)
    assert isinstance(patched.layer2[0], IntegerBlock)


@pytest.mark.parametrize("name", ["basic", "bottleneck", "convnext", "deit"])
def test_a_training_step_is_near_that_of_float32(name: str) -> None:
    plain, patched = (model.train() for model in models_of(name, scaling="max"))
    grads = []
    for model in (plain, patched):
        torch.manual_seed(0)
        loss = F.cross_entropy(model(images(8)), torch.arange(8))
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    flat = [torch.cat([g.flatten() for g in grad]) for grad in grads]
    # where the sign of a ReLU's input flips, a gradient changes by a whole term
    assert F.cosine_similarity(*flat, dim=0) > 0.995


def test_training_changes_what_inference_gives() -> None:
    _, patched = models_of("basic")
    optimizer = torch.optim.SGD(patched.parameters(), 0.1)
    with torch.no_grad():
        before = patched(images())
    F.cross_entropy(patched.train()(images()), torch.arange(2)).backward()
    optimizer.step()
    patched.eval()
    with torch.no_grad():
        after = patched(images())
        for module in patched.modules():
            if isinstance(module, viops.nn.Int16Conv2d):
                module.forget()
        assert torch.equal(patched(images()), after)
    assert difference(after, before) > 1e-3


def test_hooks_are_called() -> None:
    _, patched = models_of("bottleneck")
    called = []
    patched.layer1[0].bn2.register_forward_hook(lambda *_: called.append("bn2"))
    patched.layer2[0].downsample.register_forward_hook(lambda *_: called.append("downsample"))
    with torch.no_grad():
        patched(images())
    assert called == ["bn2", "downsample"]


def test_global_hooks_and_forwards_of_an_instance_are_called() -> None:
    _, patched = models_of("bottleneck")
    conv = patched.layer1[0].conv2
    called = []

    def note(module: nn.Module, *_: object) -> None:
        if module is conv:
            called.append("hook")

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        with torch.no_grad():
            patched(images())
    finally:
        handle.remove()
    own = conv.forward
    conv.forward = lambda x: called.append("forward") or own(x)
    with torch.no_grad():
        patched(images())
    assert called == ["hook", "forward"]


def test_what_is_replaced_after_the_patch_runs() -> None:
    plain, patched = models_of("bottleneck")
    for model in (plain, patched):
        model.layer1[0].act1 = nn.Tanh().eval()
        torch.manual_seed(0)
        model.layer2[0].conv2 = nn.Conv2d(16, 16, 3, 2, 1).eval()
    with torch.no_grad():
        assert difference(patched(images()), plain(images())) < 5e-3


def test_attention_of_torchs_own_is_left_alone() -> None:
    model = torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=5)
    patched = viops.patch.int16(model)
    layer = patched.encoder.layers[0]
    assert type(layer.self_attention.out_proj) not in (IntegerLinear, nn.Linear)
    assert isinstance(layer.mlp[0], IntegerLinear)
    assert patched(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_undo_refuses_a_parametrized_layer() -> None:
    model = viops.patch.int16(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)))
    nn.utils.parametrizations.weight_norm(model[1])
    with pytest.raises(ValueError, match=r"^1: expected what int16 put in"):
        viops.patch.undo(model)


def test_a_norm_in_training_mode_takes_statistics() -> None:
    _, patched = models_of("bottleneck")
    norm = patched.layer1[0].bn2
    norm.train()
    before = norm.running_mean.clone()
    with torch.no_grad():
        patched(images())
    assert not torch.equal(norm.running_mean, before)


def test_compile_and_export() -> None:
    _, patched = models_of("bottleneck")
    torch._dynamo.reset()
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert difference(compiled(images()), patched(images())) < 1e-3
        program = torch.export.export(patched, (images(),))
        assert difference(program.module()(images()), patched(images())) < 1e-3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied: Callable) -> None:
    _, patched = models_of("bottleneck")
    with torch.no_grad():
        expected = patched(images())
        assert torch.equal(copied(patched)(images()), expected)
        assert torch.equal(
            viops.patch.undo(copied(patched))(images()), models_of("bottleneck")[0](images())
        )


class TestRefusals:
    def test_a_patched_model(self) -> None:
        _, patched = models_of("basic")
        with pytest.raises(ValueError, match=r"^model: it is patched already"):
            viops.patch.int16(patched)

    def test_a_model_without_layers(self) -> None:
        with pytest.raises(ValueError, match=r"^model: expected one with convolutions"):
            viops.patch.int16(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))

    def test_no_model(self) -> None:
        with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module"):
            viops.patch.int16("resnet50")

    @pytest.mark.parametrize(
        ("argument", "error", "options"),
        [
            ("bits", ValueError, {"bits": 16}),
            ("scaling", ValueError, {"scaling": "min"}),
            ("rounding", ValueError, {"rounding": "up"}),
            ("skip", ValueError, {"skip": ["layer9"]}),
            ("skip", TypeError, {"skip": "fc"}),
        ],
    )
    def test_bad_arguments(self, argument: str, error: type, options: dict) -> None:
        model = MODELS["basic"]()
        with pytest.raises(error, match=rf"^{argument}: \S"):
            viops.patch.int16(model, **options)
        assert type(model.layer1[0].conv1) is nn.Conv2d

    def test_a_layer_in_half_precision(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).half(), nn.Linear(3, 3))
        with pytest.raises(ValueError, match=r"^1: expected a float32 weight, got torch.float16"):
            viops.patch.int16(model)

    def test_a_derived_layer(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 1), viops.nn.WSConv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
        with pytest.raises(
            TypeError, match=r"^1: expected torch's own Conv2d or Linear, got viops"
        ):
            viops.patch.int16(model)
        assert isinstance(viops.patch.int16(model, skip=["1"])[0], IntegerConv2d)
