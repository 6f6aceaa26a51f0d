"""Only `relora.engine` knows DeepSpeed, its launcher, and number formats; all others ask it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from test_layering import MODULES, is_in

# What code would be about: whole words that are attributes, keywords or strings. Prose is free.
WORDS = {
    "parameters under ZeRO": "ds_id ds_tensor ds_status ds_numel ds_shape ds_process_group "
    "ds_secondary_tensor _hp_mapping lp_fragment_address hp_fragment_address hp_fragment",
    "engines and their optimizers": "was_step_applied get_global_grad_norm override_loss_scale "
    "coalesce_grad_reduction parameter_offload zero_optimization_stage bit16_groups fp16_groups "
    "single_partition_of_fp32_groups fp32_partitioned_groups_flat grad_position get_param_id "
    "DeepSpeedZeroOptimizer DeepSpeedZeroOptimizer_Stage3",
    "options": "zero_optimization overlap_comm reduce_bucket_size stage3_max_reuse_distance "
    "stage3_prefetch_bucket_size stage3_param_persistence_threshold round_robin_gradients "
    "offload_param data_types gradient_clipping train_micro_batch_size_per_gpu steps_per_print",
    "environment variables": "DS_ACCELERATOR DS_BUILD_OPS DS_ENV_FILE CROSS_RANK LOCAL_SIZE "
    "LOCAL_WORLD_SIZE LOCAL_RANK RANK WORLD_SIZE MASTER_ADDR MASTER_PORT CUDA_VISIBLE_DEVICES",
    "number formats": "fp32 bf16 fp16 deepspeed_bf16",
}
# Inside longer strings too.
PARTS = re.compile(
    r"deepspeed\.(launcher|runtime|comm|ops|zero|utils)\b|--world_info|--master_(addr|port)|PDSH_"
)


def said_by(path: Path) -> Iterator[str]:
    """Attributes, keywords, imported names and strings of a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.keyword | ast.arg):
            yield node.arg or ""
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def broken(path: Path) -> list[str]:
    """What a module says that only the engine should."""
    words = re.compile(rf"ds_\w+|DS_\w+|{'|'.join(' '.join(WORDS.values()).split())}")
    found = said_by(path)
    return [t for t in found if words.fullmatch(t) or PARTS.search(t)]


@pytest.mark.parametrize("module", [m for m in MODULES if not is_in(m, "relora.engine")])
def test_only_the_engine_knows(module: str) -> None:
    assert broken(MODULES[module]) == []


@pytest.mark.parametrize("about", WORDS)
def test_the_engine_uses_every_word_that_is_kept_in_it(about: str) -> None:
    """Else the list has grown old and guards nothing."""
    said = {t for m, path in MODULES.items() if is_in(m, "relora.engine") for t in said_by(path)}
    assert set(WORDS[about].split()) <= said


@pytest.mark.parametrize(
    "line",
    [
        "size = param.ds_numel",
        "size = getattr(param, 'ds_numel', 0)",
        "build(overlap_comm=True)",
        "zero = extra.get('zero_optimization', {})",
        "import os; first = os.environ.get('LOCAL_RANK') == '0'",
        "half = precision == 'bf16'",
        "width = {'fp32': 4}[precision]",
        "from deepspeed.runtime.zero import config",
        "words = f'--master_port={port}'",
    ],
)
def test_the_wall_sees(line: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(line)
    assert broken(path)
