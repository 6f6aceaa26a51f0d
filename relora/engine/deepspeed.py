"""The door to DeepSpeed: its config, its engine, one optimizer step. Nobody else imports it."""

from __future__ import annotations

import gc
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from relora.engine.config import DeepSpeedConfig, OptimizerConfig
from relora.engine.distributed import Ranks, be_found_by_others
from relora.engine.evaluation import Loss
from relora.engine.memory import give_memory_
from relora.engine.muon import Muon
from relora.engine.options import deepspeed_json
from relora.engine.precision import dtype_of, precision_of
from relora.engine.reading import Reading, read_at_norm, whole_rows
from relora.errors import ConfigError
from relora.lora.inject import parameter_groups
from relora.lora.layers import adapted_layers, constant_weights
from relora.quiet import is_loud

Engine = Any  # deepspeed.DeepSpeedEngine; the import happens late

# Where the wrappers of ZeRO 1–3 keep whole groups of weights and fp32 masters.
FLAT_TENSORS = (
    "bit16_groups_flat",
    "single_partition_of_fp32_groups",
    "fp16_partitioned_groups_flat",
    "fp32_partitioned_groups_flat",
)


class StepResult(NamedTuple):
    """What one optimizer step did. `applied` is False if the update was not finite and skipped."""

    loss: float  # cross-entropy, mean over the micro-batches of all ranks
    auxiliary: float | None  # what else was trained on, likewise; None if nothing
    grad_norm: float  # global, before clipping
    applied: bool
    notes: Sequence[float] = ()  # sums over ranks of what each had to say


def init_distributed(ranks: Ranks, timeout_minutes: float) -> None:
    """Join the process group: nccl on GPUs, gloo on CPUs. Compiles nothing.

    No group that is made from now on waits longer than `timeout_minutes`.
    """
    deepspeed = _import_deepspeed()
    timeout = timedelta(minutes=timeout_minutes)
    _limit_waiting(timeout)
    be_found_by_others(ranks)
    deepspeed.init_distributed(
        dist_backend="nccl" if ranks.device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        timeout=timeout,
        verbose=False,
    )


def build_engine(
    model: nn.Module,
    deepspeed_config: DeepSpeedConfig,
    optimizer_config: OptimizerConfig,
    micro_batch_size: int,
    ranks: Ranks,
    merged_decay: bool = False,
) -> Engine:
    """Wrap a model for training: AdamW over its trainable parameters, under the chosen stage.

    Parameters on the meta device get memory, and their values from whoever fills the engine.
    """
    deepspeed = _import_deepspeed()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    json = deepspeed_json(deepspeed_config, optimizer_config, micro_batch_size, trained)
    formats = precision_of(deepspeed_config.precision)
    # DeepSpeed's own engine casts by itself, but nothing that is partitioned.
    early = deepspeed_config.zero_stage == 3 and not formats.is_deepspeeds
    optimizer = build_optimizer(model, optimizer_config, merged_decay)  # while shapes are whole
    give_memory_(model, ranks.device, _partitioner(deepspeed, json) if early else None)
    autocast = formats.autocast
    if autocast is not None:
        model.forward = torch.autocast(ranks.device.type, dtype_of(autocast))(model.forward)
    try:
        engine, *_ = deepspeed.initialize(
            model=model.to(ranks.device),
            optimizer=optimizer,
            config=json,
            dist_init_required=False,
        )
    except (AssertionError, ValueError, TypeError, NotImplementedError) as error:
        if not deepspeed_config.extra:
            raise
        keys = ", ".join(deepspeed_config.extra)
        raise ConfigError(
            f"deepspeed.extra: DeepSpeed builds no engine with {keys} as they are: "
            f"{str(error) or type(error).__name__}; mend or remove them"
        ) from error
    if autocast is not None and deepspeed_config.zero_stage == 3:
        # Gathering is no arithmetic, and fp16's autocast refuses to put bf16 pieces together.
        coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        plain = torch.autocast(ranks.device.type, enabled=False)
        coordinator.fetch_sub_module = plain(coordinator.fetch_sub_module)
    return engine


def _partitioner(deepspeed: Any, json: dict[str, Any]) -> Callable[[nn.Parameter], None]:
    """What partitions one parameter over all ranks, as the engine of ZeRO 3 would all of them."""
    first: list[Any] = []

    def partition(param: nn.Parameter) -> None:
        if first:
            first[0].convert_to_zero_parameters([param])
        else:
            only = nn.ParameterList([param])
            deepspeed.zero.Init(module=only, config_dict_or_path=json, dtype=torch.float32)
            first.append(param)

    return partition


def config_model() -> Any:
    """The class by which DeepSpeed reads its own config. Takes a second or two, for the import."""
    _import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig as Parsed  # as quietly

    return Parsed


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, merged_decay: bool = False
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, in groups: see `parameter_groups`; or Muon."""
    groups = parameter_groups(model, config.weight_decay, merged_decay)
    usual: dict[str, Any] = {
        "lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True
    }  # fmt: skip
    if config.matrices == "muon":
        return Muon(groups, config.momentum, **usual)
    return torch.optim.AdamW(groups, **usual)


def train_step(
    engine: Engine,
    micro_batches: Sequence[Tensor],
    loss_of: Callable[[Engine, Tensor], Loss],
    rates: Mapping[str, float],
    grad_clip: float | None,
    loss_scale: float | None = None,
    notes: Callable[[], Sequence[float]] = tuple,
) -> StepResult:
    """One optimizer step over this rank's micro-batches; gradients are reduced once, at the end.

    An update that is not finite is skipped on all ranks alike. The host waits for the device once,
    before the update is applied (see `reading`).

    Args:
        rates: learning rates, by the names of `parameter_groups`.
        loss_scale: of the backward pass; gradients are divided by it before anything else.
        notes: what this rank tells the others, as many numbers on each.
    """
    stage = engine.zero_optimization_stage()
    engine.train()
    for group in engine.optimizer.param_groups:
        group["lr"] = rates[group["name"]]
    factor = loss_scale or 1.0
    if stage > 0 and loss_scale is not None:
        engine.optimizer.override_loss_scale(loss_scale)  # it multiplies and divides by itself
        factor = 1.0
    # ZeRO 3 holds weights where they are used and no longer.
    constant = constant_weights(engine.module) if stage < 3 else nullcontext()
    losses: list[Tensor] = []
    others: list[Tensor] = []
    last = len(micro_batches) - 1
    # Stages 1–3 collect local gradients and reduce them when the block ends; stage 0 reduces in
    # the backward pass outside no_sync.
    together = engine.coalesce_grad_reduction() if stage > 0 and last > 0 else nullcontext()
    with together, constant, whole_rows():
        for index, batch in enumerate(micro_batches):
            with engine.no_sync() if stage == 0 and index < last else nullcontext():
                loss = loss_of(engine, batch)
                engine.backward(loss.total * factor / len(micro_batches))
                losses.append(loss.cross_entropy)
                if loss.auxiliary is not None:
                    others.append(loss.auxiliary)
    means = [torch.stack(x).mean() for x in (losses, others) if x]
    reading = Reading(notes)
    take = partial(reading.take, means)
    if stage == 0:
        norm, applied = _step_unsharded(engine, grad_clip, factor, take)
    else:
        with read_at_norm(engine.optimizer, stage, take):
            engine.step()
        applied = bool(engine.was_step_applied())
        norm = float(engine.get_global_grad_norm()) if applied else math.inf
    mean, *rest = reading.means
    return StepResult(mean, rest[0] if rest else None, norm, applied, reading.sums)


def destroy(engine: Engine) -> None:
    """Take an engine's hooks off and give its memory back.

    DeepSpeed keeps modules and parameters in global lists and caches, so letting go of the engine
    frees nothing; the storage behind its tensors is dropped by hand.
    """
    wrapper = engine.optimizer
    params = list(engine.module.parameters())
    codes = [b for _, layer in adapted_layers(engine.module) for b in layer.buffers()]
    engine.destroy()
    held = [*params, *codes, *(param.ds_tensor for param in params if hasattr(param, "ds_tensor"))]
    for name in FLAT_TENSORS:
        held += getattr(wrapper, name, ())
    for param in params:
        param.grad = None
    for tensor in held:
        tensor.data = tensor.data.new_empty(0)
    engine.optimizer = engine.module = None
    _restore_linear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def leave(together: bool = True) -> None:
    """End the process group, so that no rank dies in the middle of the others' last messages.

    Args:
        together: all ranks come here. One that failed alone must not wait for them, as nccl would.
    """
    _restore_linear()
    if dist.is_initialized() and (together or dist.get_backend() != "nccl"):
        # DeepSpeed's own call also forgets the groups that it keeps for the next engine.
        _import_deepspeed().comm.destroy_process_group()


def _restore_linear() -> None:
    """Under ZeRO 3 DeepSpeed puts a function of its own in torch's place, for good."""
    partitioning = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if partitioning is not None:
        kept = partitioning.InsertPostInitMethodToModuleSubClasses
        nn.functional.linear = getattr(kept, "linear_bk", nn.functional.linear)


def _step_unsharded(
    engine: Engine,
    grad_clip: float | None,
    loss_scale: float,
    take: Callable[[Sequence[Tensor]], list[Tensor]],
) -> tuple[float, bool]:
    # DeepSpeed's stage 0 in fp32 neither reports the norm nor refuses an infinite gradient.
    params = [p for p in engine.module.parameters() if p.grad is not None]
    if loss_scale != 1:
        for param in params:
            param.grad.div_(loss_scale)
    norm = float(take([nn.utils.clip_grad_norm_(params, grad_clip or math.inf)])[0])
    if not math.isfinite(norm):
        engine.zero_grad()
        return math.inf, False
    engine.step()
    return norm, True


def _limit_waiting(timeout: timedelta) -> None:
    # DeepSpeed makes groups of its own, waits in them before it hands them out, and gives them
    # torch's default, 30 minutes on gloo.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, name, timeout)


def _import_deepspeed() -> Any:
    """Import it quietly, on the accelerator that there is, with nothing left to compile."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("DS_BUILD_OPS", "0")
    # What torch will drop some day is for DeepSpeed to mend; its users cannot.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

    # Reading this table would try the compiler for every op, and on CPUs init_distributed would
    # then compile one, where a killed compile hangs later starts. Nothing here uses any of them.
    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.INFO if is_loud() else logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    """DeepSpeed calls every optimizer untested that it does not know; Muon is tested here."""
    return "untested optimizer" not in record.getMessage()
