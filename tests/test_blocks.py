"""Blocks of a weight that train in place of A and B: the layer, its graph, its merges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import relora
from relora.errors import ConfigError
from relora.lora.draws import draw_a
from relora.lora.layers import AdaptedLayer
from runs import checkpoint, differing, make_config, train, trajectory
from runs import relora as command

OUT, IN, K = 18, 12, 3
KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(IN, OUT),
    "conv1d": lambda: Conv1D(OUT, IN),
}


def layer_of(kind: str, blocks: int = K, dtype: torch.dtype = torch.float64) -> Any:
    """A layer with random blocks."""
    torch.manual_seed(0)
    model = nn.Sequential(KINDS[kind]()).to(dtype)
    relora.add_adapters(model, relora.LoRAConfig(blocks=blocks))
    layer = model[0]
    assert isinstance(layer, AdaptedLayer)
    layer.lora_B.data = torch.randn(layer.lora_B.shape, dtype=dtype)
    return layer


def dense(layer: Any) -> Tensor:
    """The matrix (out, in) of its blocks alone, entry by entry."""
    blocks = layer.lora_B.detach()
    _, height, width = blocks.shape
    whole = blocks.new_zeros(OUT, IN)
    for row, column in enumerate(layer.lora_A.int().tolist()):
        for i in range(height):
            for j in range(width):
                whole[row * height + i, column * width + j] = blocks[row, i, j]
    return whole


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_and_its_gradients_are_those_of_the_sum(kind: str) -> None:
    layer = layer_of(kind)
    layer.shrink = 0.9
    weight = 0.9 * layer.matrix(layer.weight.data) + dense(layer)
    x = torch.randn(2, 5, IN, dtype=torch.float64).transpose(0, 1).requires_grad_(True)
    gradient = torch.randn(5, 2, OUT, dtype=torch.float64)
    y = layer(x)
    y.backward(gradient)
    torch.testing.assert_close(y, x @ weight.t() + layer.bias, rtol=0, atol=1e-13)
    torch.testing.assert_close(x.grad, gradient @ weight, rtol=0, atol=1e-13)
    of_weight = torch.einsum("abn,abm->nm", gradient, x.detach())
    mine = layer.lora_B.grad
    height, width = OUT // K, IN // K
    for row, column in enumerate(layer.lora_A.int().tolist()):
        part = of_weight[row * height :, column * width :][:height, :width]
        torch.testing.assert_close(mine[row], part, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_merge_adds_is_the_same_in_any_pieces(kind: str) -> None:
    layer = layer_of(kind)
    factors, shape = (layer.lora_A.data, layer.lora_B.data), layer.weight.shape
    whole = layer.stored(dense(layer), shape).flatten()
    for size in (1, 7, OUT, OUT * IN):
        pieces = [
            layer.delta(*factors, shape, at, min(at + size, OUT * IN))
            for at in range(0, OUT * IN, size)
        ]
        assert torch.equal(torch.cat(pieces), whole)
    merged = layer.merged(layer.weight.data, *factors)
    torch.testing.assert_close(merged.flatten(), layer.weight.data.flatten() + whole)


def test_in_half_precision_each_entry_is_rounded_once() -> None:
    layer = layer_of("linear", dtype=torch.float32)
    layer.weight.data = layer.weight.data.bfloat16()
    exact = layer.weight.data.float() + dense(layer)
    assert torch.equal(layer.effective(torch.bfloat16), exact.bfloat16())


def test_after_as_many_merges_as_blocks_every_entry_has_trained() -> None:
    seen = torch.zeros(4, 4)
    for merge in range(4):
        bands = draw_a(torch.Size([4]), 7, merge, "model.layers.0.mlp.up_proj.lora_A").long()
        assert sorted(bands.tolist()) == [0, 1, 2, 3]
        seen[torch.arange(4), bands] += 1
    assert torch.equal(seen, torch.ones(4, 4))


@pytest.mark.parametrize("k", [2, 4])
def test_products_and_saved_bytes(k: int) -> None:
    """4Tmn for W, 2Tmn/k for the gradient of the blocks; the input is all that is kept."""
    tokens, m, n = 64, 48, 32
    layer = nn.Sequential(nn.Linear(n, m, bias=False))
    relora.add_adapters(layer, relora.LoRAConfig(blocks=k))
    x = torch.randn(tokens, n, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        y.sum().backward()
    assert counter.get_total_flops() == 4 * tokens * m * n + 2 * tokens * m * n // k
    assert sum(kept.values()) == 4 * tokens * n


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {}}, "lora: give the size of the adapters as either rank or blocks"),
        ({"lora": {"rank": 4, "blocks": 2}}, "lora: give the size of the adapters as either"),
        ({"lora": {"blocks": 2, "alpha": 8}}, "lora: alpha is of A and B, and would do nothing"),
        ({"lora": {"blocks": 2, "graph": "low_rank"}}, "lora: graph: low_rank is of A and B"),
        ({"lora": {"blocks": 2}}, "relora.reset.mode: magnitude: after a merge other entries of W"),
        (
            {"lora": {"blocks": 3}, "relora__reset": {"mode": "zero"}},
            "lora.blocks: model.layers.0.self_attn.q_proj (32, 32) is not cut into 3 bands",
        ),
    ],
)
def test_what_does_not_go_with_blocks_is_said(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("train", make_config(tmp_path / "run", **changes)) == 2
    assert message in capsys.readouterr().err


def test_sizes_are_checked_in_a_library_too() -> None:
    with pytest.raises(ConfigError, match=r"0 \(18, 12\) is not cut into 5 bands"):
        layer_of("linear", blocks=5)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (2, {"optimizer__matrices": "muon"}),
        pytest.param(3, {"deepspeed__precision": "bf16"}, marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_evaluates_and_exports(
    stage: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    changes = {
        "lora": {"blocks": 2},
        "relora__reset": {"mode": "zero"},
        "deepspeed__zero_stage": stage,
        "spectra": {},
        **changes,
    }
    assert train(tmp_path / "whole", **changes) == 0
    assert train(tmp_path / "cut", "train.stop_after=15", **changes) == 75
    assert train(tmp_path / "cut", **changes) == 0
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert trajectory(cut) == trajectory(whole)
    assert differing(checkpoint(cut, 24), checkpoint(whole, 24)) == []
    assert command("evaluate", tmp_path / "whole") == 0
    assert command("export", tmp_path / "whole", "--to", tmp_path / "export") == 0


@pytest.mark.process
def test_a_run_of_blocks_by_muon_says_nothing_that_is_no_news(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed warns of optimizers that it does not know."""
    blocks = {"lora": {"blocks": 2}, "relora__reset": {"mode": "zero"}}
    changes = {"optimizer__matrices": "muon", "deepspeed__zero_stage": 2, "train__steps": 14}
    assert train(tmp_path / "run", **blocks, **changes) == 0
    said = "".join(capfd.readouterr())
    assert "MERGE 1" in said
    assert "untested" not in said
