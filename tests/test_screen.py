"""The screen of restart rules: its model is transformers' Llama, steps and restarts are right."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "configs/experiments"))

import relora
import screen
from relora.lora.config import ADAPTER_GROUPS

VOCABULARY = 64
RULES = (
    "full",
    "lora r=4 C=3",
    "lora r=4 C=3 a=orthonormal train=b m=transport",
    "lora r=4 C=3 a=sampled m=magnitude w=2",
    "lora r=4 C=3 b=rebalance",
    "lora r=4 C=3 b=gradient",
    "lora r=4 C=4 turns=1",
    "lora r=4 C=3 share=0.2",
    "lora r=4 C=4 slots=1",
    "lora r=4 C=3 opt=spectral",
    "lora r=4 layer k=2 C=3",
    "layer k=2 C=3 opt=muon",
    "block k=2 C=3 opt=muon",
)


def stack_of(arm: str, runs: list[tuple[str, int]], steps: int = 8) -> screen.Stack:
    tokens = torch.randint(VOCABULARY, (40 * screen.LENGTH,), dtype=torch.int32)
    args = argparse.Namespace(
        width=32, layers=2, vocabulary=VOCABULARY, device="cpu", steps=steps, batch=2,
        tokens=[tokens, tokens], lr_rest=1e-3,
    )  # fmt: skip
    return screen.Stack(arm, args, runs)


def transformers_twin(stack: screen.Stack, run: int) -> Any:
    """transformers' own model with the same weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=screen.LENGTH,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    weights = model.state_dict()
    of = stack.model.matrices
    for i in range(2):
        names = [f"self_attn.{x}_proj" for x in "qkvo"]
        found = dict(zip(names, of["attention"][4 * i : 4 * i + 4, run], strict=True))
        found |= {"mlp.gate_proj": of["up"][2 * i, run], "mlp.up_proj": of["up"][2 * i + 1, run]}
        found["mlp.down_proj"] = of["down"][i, run]
        for name, value in found.items():
            weights[f"model.layers.{i}.{name}.weight"].copy_(value)
    weights["model.embed_tokens.weight"].copy_(stack.model.rest[0][run])
    weights["lm_head.weight"].copy_(stack.model.rest[1][run])
    return model


def start_at_bands_of(model: Any, stack: screen.Stack) -> None:
    """Have the screen's blocks begin where those of relora do, which are drawn by name."""
    parameters = dict(model.named_parameters())
    names = {
        "attention": [f"self_attn.{x}_proj" for x in "qkvo"],
        "up": ["mlp.gate_proj", "mlp.up_proj"],
        "down": ["mlp.down_proj"],
    }
    for rule, found in zip(stack.rules, names.values(), strict=True):
        assert isinstance(rule, screen.Block)
        bands = [parameters[f"model.layers.{i}.{name}.lora_A"] for i in range(2) for name in found]
        rule.shift = torch.stack([band[:1].long() for band in bands])[:, None].clone()
        rule.place()


def test_its_model_is_transformers_llama_for_each_run_of_a_batch() -> None:
    stack = stack_of("full", [("1e-3", 0), ("1e-3", 1)])
    ids = torch.randint(VOCABULARY, (2, 3, screen.LENGTH))
    losses = stack.model.losses(ids).mean(1)
    for run in range(2):
        model = transformers_twin(stack, run)
        expected = model(input_ids=ids[run], labels=ids[run]).loss.item()
        assert losses[run].item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("arm", ["full", "full opt=muon", "block k=2 C=4 opt=muon"])
def test_it_trains_as_relora_does(arm: str) -> None:
    """From the same weights on the same batches, over two merges of blocks."""
    stack, rate = stack_of(arm, [("4e-3", 0)], steps=10), 4e-3
    model = transformers_twin(stack, 0)
    if "block" in arm:
        relora.add_adapters(model, relora.LoRAConfig(blocks=2))
        start_at_bands_of(model, stack)
    groups = relora.parameter_groups(model)
    make: Any = relora.Muon if "muon" in arm else torch.optim.AdamW
    optimizer = make(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    state = relora.EngineState(model, optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    for step in range(10):
        if step in stack.restarts:
            relora.merge_and_restart(state, step // 4, 0, relora.ResetConfig(mode="zero"))
            stack.restart(step // 4)
        for group in optimizer.param_groups:
            own = rate if group["name"] in ("matrices", *ADAPTER_GROUPS) else 1e-3
            group["lr"] = own * screen.curve(step, 10)
        ids = stack.ids()
        loss = model(input_ids=ids[0], labels=ids[0]).loss
        assert loss.item() == pytest.approx(stack.model.losses(ids).mean().item(), abs=1e-5), step
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        stack.step()


@pytest.mark.parametrize("arm", RULES)
def test_a_run_in_a_batch_is_the_run_by_itself(arm: str) -> None:
    runs = [("1e-3", 0), ("4e-3", 0), ("4e-3", 1)]
    found = []
    for some in (runs, runs[1:2]):
        torch.manual_seed(0)
        stack, number = stack_of(arm, some), 0
        for step in range(8):
            if step in stack.restarts:
                stack.restart(number)
                number += 1
            stack.step()
        found.append([w[:, len(some) // 2] for w in stack.model.matrices.values()])
    for together, alone in zip(*found, strict=True):
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("arm", RULES[1:])
def test_a_restart_moves_no_weight_and_what_trains_then_is_what_it_says(arm: str) -> None:
    stack = stack_of(arm, [("4e-3", 0)])
    for _ in range(3):
        stack.step()
    before = [w.detach().clone() for w in stack.model.matrices.values()]
    stack.restart(0)
    for w, old in zip(stack.model.matrices.values(), before, strict=True):
        assert torch.equal(w, old)
    stack.step()
    for rule in stack.rules:
        moved = rule.w - before[[id(r.w) for r in stack.rules].index(id(rule.w))]
        if isinstance(rule, screen.Block):
            assert (moved != 0).float().mean() == pytest.approx(1 / rule.k, abs=0.01)
        elif isinstance(rule, screen.Lora) and arm.split()[2:3] == ["C=3"]:
            ranks = torch.linalg.matrix_rank(moved, atol=1e-6, rtol=0)
            assert 0 < ranks.max() <= 2 * 4


def test_gradients_of_a_and_b_are_those_of_autograd() -> None:
    stack = stack_of("lora r=4", [("1e-3", 0)])
    for _ in range(2):
        stack.step()
    rule = stack.rules[0]
    assert isinstance(rule, screen.Lora)
    name = "attention"
    a, b = rule.a.clone().requires_grad_(), rule.b.clone().requires_grad_()
    whole = stack.model.matrices[name].detach()
    stack.model.matrices[name] = whole - (rule.b @ rule.a) + b @ a
    ids = stack.ids()
    expected = torch.autograd.grad(stack.model.losses(ids).mean(), [a, b])
    stack.model.matrices[name] = whole.requires_grad_()
    (g,) = torch.autograd.grad(stack.model.losses(ids).mean(), [stack.model.matrices[name]])
    for got, wanted in zip(rule.gradients(g), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-7, rtol=1e-4)
