"""benches/eager_revcol.py computes what viops' RevCol does, in both of its forms."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import revcol_golden
import torch
from torch import Tensor, nn
from viops.models.revcol import RevCol

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benches"))
from eager_revcol import EagerRevCol


def make(name: str, inter_supv: bool, reversible: bool = False) -> RevCol:
    config, classes = revcol_golden.NARROW[name], revcol_golden.NUM_CLASSES[name]
    model = RevCol(config, num_classes=classes, inter_supv=inter_supv, reversible=reversible)
    model.load_state_dict(revcol_golden.draw_state(model.state_dict()))
    return model.double().train()


def outputs(model: nn.Module, images: Tensor, inter_supv: bool) -> list[Tensor]:
    torch.manual_seed(3)  # of the blocks that are dropped
    if not inter_supv:
        return [model(images)]
    logits, decoded = model.forward_supervised(images)
    return [*logits, *decoded]


@pytest.mark.parametrize("grid_linear", [False, True])
@pytest.mark.parametrize("reversible", [True, False], ids=["reversible", "stored"])
@pytest.mark.parametrize("inter_supv", [True, False], ids=["supervised", "plain"])
@pytest.mark.parametrize("name", ["narrow", "from_last"])
def test_outputs_and_gradients_are_ours(
    name: str, inter_supv: bool, reversible: bool, grid_linear: bool
) -> None:
    model = make(name, inter_supv)
    eager = EagerRevCol(model, reversible, grid_linear)
    images = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    results = []
    for each in (eager, model):
        found = outputs(each, images, inter_supv)
        revcol_golden.supervised_loss(found).backward()
        results.append((found, {name: p.grad for name, p in each.named_parameters()}))
    (found, grads), (expected, expected_grads) = results
    for got, value in zip(found, expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-9)
    assert not torch.equal(outputs(model.eval(), images, inter_supv)[0], found[0])  # some dropped
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-7, atol=1e-9)


def test_it_loads_the_models_state() -> None:
    model, other = make("narrow", True), make("narrow", True)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    eager = EagerRevCol(other)
    eager.load_state_dict(model.state_dict())
    assert list(eager.state_dict()) == list(model.state_dict())
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(eager.eval()(images), model.eval()(images))


def test_its_alphas_are_clamped_in_place() -> None:
    eager = EagerRevCol(make("narrow", False))
    with torch.no_grad():
        eager.subnet1.alpha2[0, :3, 0, 0] = torch.tensor([1e-5, -1e-5, 0.0])
    eager(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert eager.subnet1.alpha2[0, :3, 0, 0].tolist() == pytest.approx([1e-3, -1e-3, 0.0])


def test_its_reversible_form_keeps_features_alone() -> None:
    """Of each column its outputs, and what the stem needs: not what blocks compute."""
    kept: dict[str, set[int]] = {}
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for form, reversible in (("reversible", True), ("stored", False)):
        eager, kept[form] = EagerRevCol(make("narrow", False), reversible), set()
        known = {parameter.data_ptr() for parameter in eager.parameters()}

        def note(tensor: Tensor, form: str = form, known: set[int] = known) -> Tensor:
            if tensor.dim() == 4 and tensor.data_ptr() not in known:
                kept[form].add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = eager(images)
        assert out.requires_grad
    assert len(kept["reversible"]) < 4 * 4 + 10
    assert len(kept["stored"]) > 4 * len(kept["reversible"])
