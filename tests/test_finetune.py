"""The fine-tuning tables: a miniature of them, and what their arms train."""

from __future__ import annotations

import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

import finetune
import relora

pytestmark = pytest.mark.process


def tiny() -> RobertaForSequenceClassification:
    """A RoBERTa of one layer."""
    torch.manual_seed(0)
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=260,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_labels=5,
            max_position_embeddings=66,
        )
    )


def examples(count: int) -> finetune.Examples:
    """Random bytes; the class is that of the first."""
    ids = torch.randint(4, 260, (count, 16), generator=torch.Generator().manual_seed(0))
    return finetune.Examples("input_ids", ids, ids[:, 0] % 5)


@pytest.mark.parametrize("row", [*finetune.ARMS, *finetune.FURTHER])
def test_an_arm_trains_what_it_says_and_nothing_else(row: str) -> None:
    """By formula, and by which weights have moved after some steps."""
    model = tiny()
    finetune.equip_arm(model, row)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    head = 32 * 32 + 32 + 5 * 32 + 5
    adapters = 3 * 8 * (32 + 32)
    total = sum(p.numel() for p in tiny().parameters())
    expected = {"full": total, "head only": head}.get(row, head + adapters)
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert sum(before[name].numel() for name in trained) == expected
    trainer = finetune.fit(model, examples(64), 1e-2, 0, 3, 8, "checkpointed" in row)
    for name, param in model.named_parameters():
        moved = not torch.equal(param.detach(), before[name])
        # Positions and words that no example has do not move; all else does.
        assert moved == (name in trained), name
    # 4 bytes a weight; of what trains as much for its gradient and twice that for its moments, and
    # a step count of 4 bytes for each tensor.
    state, host = finetune.state_bytes(model, trainer)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    quantised = sum(layer.quantised is not None for _, layer in relora.adapted_layers(model))
    weights = sum(p.numel() for p in model.parameters()) - quantised * 32 * 32
    assert state == 4 * weights + buffers + 12 * expected + 4 * len(trained)
    assert host == quantised * 4 * 32 * 32
    assert quantised == (3 if "base" in row else 0)


def test_checkpointing_keeps_less_and_trains_alike() -> None:
    kept, losses = [], []
    for row in ("LoRA", "LoRA, checkpointed"):
        model = tiny()
        finetune.equip_arm(model, row)
        finetune.fit(model, examples(64), 1e-2, 0, 3, 8, "checkpointed" in row)
        kept.append(finetune.saved_bytes(model, examples(8), 8))
        model.eval()
        data = examples(32)
        with torch.no_grad():
            losses.append(model(input_ids=data.inputs, labels=data.labels).loss.item())
    assert kept[1] < kept[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_no_example_is_trained_on_and_tested() -> None:
    parts = finetune.cut(examples(200), each=4)
    rows = [{tuple(row) for row in part.inputs.tolist()} for part in parts]
    assert len(parts[0]) == 20
    assert sum(map(len, rows)) == len(set.union(*rows)) == 200


@pytest.mark.slow
def test_the_tables_are_made_by_one_command() -> None:
    """In miniature: both tasks, one rate, one seed, a step or two."""
    pytest.importorskip("sklearn")
    budget = finetune.Budget(2, 1, 8, (0,), (1e-3,), ("full", "LoRA", "head only"))
    page = finetune.report(budget, "command")
    assert page.startswith("# Fine-tuning\n\n`command`, commit ")
    for title in ("### ViT, digits 5–9", "### RoBERTa, kinds of text"):
        rows = [line.split(" | ") for line in page.partition(title)[2].splitlines()[4:9]]
        assert [row[0] for row in rows[2:]] == ["| full", "| LoRA", "| head only"]
        assert rows[2][3] == "100.0%"
