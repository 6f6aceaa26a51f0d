"""What is known of DeepSpeed's own config: how ours becomes it, what is refused, its defaults.

No torch and no DeepSpeed are imported here, for config errors answer at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from relora.engine.config import DeepSpeedConfig, OptimizerConfig
from relora.engine.precision import Name, precision_of

# Options of DeepSpeed's zero_optimization under which a merge would be wrong, and why.
UNSAFE_ZERO = {
    "round_robin_gradients": "DeepSpeed maps fp32 masters to the wrong parameters with it",
    "offload_param": "merges do not reach weights that were moved off the device",
    "zenflow": "its optimizer keeps moments of its own, which merges do not reset",
    "mics_shard_size": "merges count on each entry having one owner among all ranks",
    "zero_quantized_weights": "a merge into quantised weights loses most of the update",
    "zero_quantized_nontrainable_weights": "a merge into quantised weights loses most of it",
}
REFUSED_EXTRA = {
    "fp16": "DeepSpeed's fp16 engine never scales the loss under ZeRO 0, and 16 bits more do not "
    "complete its fp16 weights to fp32, so merges would lose updates; take deepspeed.precision: "
    "fp16",
    "amp": "the model's arithmetic is chosen by deepspeed.precision; remove it",
    "data_types": "DeepSpeed wraps Adam in another class for it, whose state merges do not reach; "
    "remove it",
    "checkpoint": "checkpoints are relora's own: those of DeepSpeed lose frozen weights when the "
    "ranks change; remove it",
    "autotuning": "it ends the process after a few steps, as if the run were done; remove it",
    "compile": "would do nothing; remove it",
    "data_efficiency": "would do nothing, since batches are relora's own; remove it",
    "pipeline": "would do nothing, since the model is not cut into stages; remove it",
    "tensor_parallel": "merges count on each weight being whole, or partitioned by ZeRO; remove it",
    "expert_parallel": "merges count on each weight being whole, or partitioned by ZeRO; remove it",
    "hybrid_engine": "it swaps the layers for its own, without their adapters; remove it",
    "elasticity": "the global batch is fixed, and a run goes on with any number of ranks that "
    "divides it; remove it",
}


MOST_IN_BUCKET = 50_000_000  # entries; a collective of 100 MB and more is as fast as they get


class ZeroSizes(NamedTuple):
    """How much ZeRO holds and moves at once, in entries."""

    bucket: float  # of gradients that are reduced together
    buckets: int  # 2 where gradients are reduced beside the backward pass
    kept_whole: float  # ZeRO 3: parameters up to this size are whole on every rank
    reuse_distance: float  # ZeRO 3: weights stay if no more lies between their two uses
    prefetched: float  # ZeRO 3: gathered ahead of their use
    stepped: float  # entries that ZeRO 3 updates at a time, on a rank


def deepspeed_json(
    config: DeepSpeedConfig,
    optimizer: OptimizerConfig,
    micro_batch_size: int,
    trained: int = MOST_IN_BUCKET,
) -> dict[str, Any]:
    """DeepSpeed's own config. Gradient accumulation is ours (see `train_step`), hence 1 here.

    Args:
        trained: number of entries that train.
    """
    clip = optimizer.grad_clip or 0.0
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip if config.zero_stage > 0 else 0.0,  # stage 0: `train_step` clips
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": bucket_size(trained),
        },
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW everywhere: no compiled op
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,  # ours are tested here
    }
    if config.offload_optimizer:
        values["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if precision_of(config.precision).is_deepspeeds:
        values["bf16"] = {"enabled": True}
    if config.reduce_dtype is not None:
        values["communication_data_type"] = config.reduce_dtype
    return _merge(values, config.extra)


def bucket_size(trained: int) -> int:
    """Entries of the buffer that gradients are reduced in. DeepSpeed's own 500 million take 2 GB
    beside any model; what waits for the optimizer needs no more than there are gradients."""
    return max(1, min(trained, MOST_IN_BUCKET))


def zero_sizes(section: DeepSpeedConfig, trained: int) -> ZeroSizes:
    """Those of a run in which so many entries train: ours, or DeepSpeed's defaults, where
    `deepspeed.extra` says nothing else."""
    zero = section.extra.get("zero_optimization", {})
    return ZeroSizes(
        bucket=float(zero.get("reduce_bucket_size", bucket_size(trained))),
        buckets=2 if zero.get("overlap_comm") else 1,
        kept_whole=float(zero.get("stage3_param_persistence_threshold", 1e5)),
        reuse_distance=float(zero.get("stage3_max_reuse_distance", 1e9)),
        prefetched=float(zero.get("stage3_prefetch_bucket_size", 5e7)),
        stepped=float(zero.get("sub_group_size", 1e9)),
    )


def known_mistakes(section: DeepSpeedConfig) -> Iterator[str]:
    """What a `deepspeed` section asks for that is not offered, or would break merges."""
    refused = refusal(section.zero_stage, section.precision, section.offload_optimizer)
    if refused:
        why, way_out = refused
        yield (
            f"deepspeed: zero_stage {section.zero_stage}, precision {section.precision}, "
            f"offload_optimizer {str(section.offload_optimizer).lower()}: {why}; take {way_out}"
        )
    yield from _reduction_mistakes(section)
    ours = {
        "train_batch_size": "batch.global_batch_size",
        "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
        "gradient_accumulation_steps": "batch",
        "gradient_clipping": "optimizer.grad_clip",
        "optimizer": "optimizer",
        "scheduler": "schedule",
        "torch_autocast": "deepspeed.precision",
        "bf16": "deepspeed.precision, where deepspeed_bf16 is DeepSpeed's own engine",
    }
    for key in section.extra:
        if key in ours:
            yield f"deepspeed.extra.{key}: is decided by {ours[key]}; set it there"
        elif key in REFUSED_EXTRA:
            yield f"deepspeed.extra.{key}: {REFUSED_EXTRA[key]}"
    zero = section.extra.get("zero_optimization", {})
    if not isinstance(zero, dict):
        yield f"deepspeed.extra.zero_optimization: {zero!r}: is a mapping"
        return
    for key, where in {"stage": "zero_stage", "offload_optimizer": "offload_optimizer"}.items():
        if key in zero:
            yield f"deepspeed.extra.zero_optimization.{key}: is decided by deepspeed.{where}"
    for key, why in UNSAFE_ZERO.items():
        if zero.get(key):
            yield f"deepspeed.extra.zero_optimization.{key}: {why}; remove it"


def _reduction_mistakes(section: DeepSpeedConfig) -> Iterator[str]:
    if section.reduce_dtype is None:
        return
    if precision_of(section.precision).is_deepspeeds:
        yield (
            f"deepspeed.reduce_dtype: {section.reduce_dtype}: with precision {section.precision} "
            "DeepSpeed makes gradients and reduces them in bf16; take null, or precision: bf16"
        )
    if "communication_data_type" in section.extra:
        yield (
            "deepspeed.extra.communication_data_type: is decided by deepspeed.reduce_dtype; "
            "remove one"
        )


def reduced_share(section: DeepSpeedConfig) -> float:
    """Bytes of a gradient that travels, as a share of those of one in fp32."""
    return 0.5 if section.reduce_dtype == "bf16" else 1.0


def refusal(zero_stage: int, precision: Name, offload_optimizer: bool) -> tuple[str, str] | None:
    """Why a combination is not offered, and the nearest one that is; None if it works."""
    if offload_optimizer and zero_stage == 0:
        other = "" if precision_of(precision).is_deepspeeds else ", or offload_optimizer: false"
        return (
            "ZeRO 0 has no partitioned optimizer to offload",
            f"zero_stage 1, 2 or 3{other}",
        )
    if precision_of(precision).is_deepspeeds and zero_stage == 0:
        return (
            "DeepSpeed's wrapper of ZeRO 0 takes an optimizer step with zero gradients when built",
            "precision: bf16, or zero_stage 1, 2 or 3",
        )
    return None


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
