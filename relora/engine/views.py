"""Where one parameter lives on this rank, and how to write it so that it stays written.

Under ZeRO one parameter exists up to four times: what the forward pass reads (`live`: the whole
tensor, or a shard under ZeRO 3), the fp32 values the optimizer updates (`master`), its Adam moments
inside a flat tensor, and, for a bf16 weight, the 16-bit remainder that completes it to fp32.
Writing only one of live and master is undone or invisible after the next step; all writes here go
to both, in place. The attribute names are those of DeepSpeed 0.19; this file and `deepspeed.py`
are the only ones that know them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from relora.engine.codec import decode, encode_
from relora.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")
AT_ONCE = 2**22  # entries that are written together: what that takes beside is freed again


@dataclass
class ParameterView:
    """One parameter on this rank. All tensors are flat views of what DeepSpeed and torch hold."""

    name: str
    param: nn.Parameter
    shape: torch.Size  # of the whole parameter
    live: Tensor  # what the forward pass reads from this rank
    live_start: int  # of `live` in the flattened parameter
    master: Tensor | None  # fp32 values the optimizer updates, unless they are `live` itself
    start: int  # of this rank's moments (and `master`) in the flattened parameter
    count: int  # of moments this rank holds; 0 for frozen parameters
    flat: Tensor | None  # the tensor under which the optimizer keeps their state
    offset: int  # of the moments in that state
    moments: tuple[str, ...] = MOMENTS  # that the optimizer keeps of it, if it trains
    # int16; bf16 live + remainder = fp32, bit for bit. In host memory if so asked: only merges,
    # checkpoints and the start of a run touch it. Where all ranks have the whole `live`, each has
    # the remainder of its own part alone, so that all of them together hold it once.
    remainder: Tensor | None = None
    remainder_start: int = 0  # of it in the flattened parameter

    @property
    def numel(self) -> int:
        """Entries of the whole parameter."""
        return self.shape.numel()

    @property
    def live_stop(self) -> int:
        """End of `live` in the flattened parameter."""
        return self.live_start + self.live.numel()

    @property
    def master_is_finer(self) -> bool:
        """Whether only the masters hold the exact values (DeepSpeed's bf16 engine)."""
        return self.master is not None and self.live.dtype != self.master.dtype

    def held(self) -> tuple[int, int]:
        """(start, stop) of the flattened parameter whose exact values this rank holds."""
        if self.master_is_finer:
            return self.start, self.start + self.count
        if self.remainder is not None:
            return self.remainder_start, self.remainder_start + self.remainder.numel()
        return self.live_start, self.live_stop

    def value(self, start: int, stop: int) -> Tensor:
        """Exact fp32 values of entries start..stop of the flattened parameter, all of them held.

        The very tensor where that is fp32, else a copy.
        """
        if self.master_is_finer:
            assert self.master is not None
            return self.master.narrow(0, start - self.start, stop - start)
        live = self.live.narrow(0, start - self.live_start, stop - start)
        if self.remainder is None:
            return decode(live, None)
        return decode(live, self.remainder.narrow(0, start - self.remainder_start, stop - start))

    def write_live_(self, values: Tensor, start: int) -> None:
        """Replace entries of `live` (and the remainder) from `start` of the flattened parameter on.

        `drop_stale_copies_` must follow, and `EngineState.spread_` where each rank writes its part.
        """
        live = self.live.narrow(0, start - self.live_start, values.numel())
        if self.remainder is None:
            encode_(values, live, None)
            return
        first = max(start, self.remainder_start)
        last = max(first, min(start + values.numel(), self.held()[1]))
        own = self.remainder[first - self.remainder_start : last - self.remainder_start]
        encode_(values, live, own, slice(first - start, last - start))

    def write_(self, values: Tensor) -> None:
        """Replace the parameter by a whole fp32 tensor, which every rank has."""
        values = values.flatten()
        self.write_pieces_(lambda start, stop: values[start:stop])

    def write_pieces_(self, read: Callable[[int, int], Tensor]) -> None:
        """Replace the parameter; `read(start, stop)` gives flat fp32 pieces of the new values."""
        for start in range(self.live_start, self.live_stop, AT_ONCE):
            self.write_live_(read(start, min(start + AT_ONCE, self.live_stop)), start)
        if self.master is not None and self.count:
            self.master.copy_(read(self.start, self.start + self.count))
        self.drop_stale_copies_()

    def drop_stale_copies_(self) -> None:
        """ZeRO 3: drop full or secondary copies, which would hide a write to the shard.

        On every rank, also those whose shard is empty, or they would disagree on who gathers.
        """
        if not hasattr(self.param, "ds_id"):
            return
        param: Any = self.param
        if param.ds_status.name == "AVAILABLE":
            param.partition(param_list=[param], has_been_updated=False)
        if getattr(param, "ds_secondary_tensor", None) is not None:
            param.ds_secondary_tensor = None


def live_of(param: Any) -> tuple[Tensor, int, torch.Size]:
    """(flat view of what this rank holds for the forward pass, its start, the whole shape)."""
    if not hasattr(param, "ds_id"):
        return param.data.view(-1), 0, param.shape
    shard = param.ds_tensor  # ZeRO 3: equal shards, the last one padded
    start = dist.get_rank(group=param.ds_process_group) * shard.ds_numel
    count = max(0, min(shard.ds_numel, param.ds_numel - start))
    return shard.data.view(-1).narrow(0, 0, count), min(start, param.ds_numel), param.ds_shape


def trainable_views(wrapper: Any) -> dict[nn.Parameter, tuple[Any, int, int, Tensor, int]]:
    """param → (master, start, count, flat, offset) for each class that DeepSpeed wraps Adam in."""
    kind = type(wrapper).__name__
    if kind == "DeepSpeedZeroOptimizer":
        return _zero12_views(wrapper)
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return _zero3_views(wrapper)
    if not isinstance(wrapper, torch.optim.Optimizer):
        raise ConfigError(
            f"DeepSpeed keeps the optimizer's state in a {kind} here, which merges and resets do "
            "not reach; take ZeRO 1, 2 or 3, or fp32 parameters with torch_autocast"
        )
    params = [p for group in wrapper.param_groups for p in group["params"]]
    return {p: (None, 0, p.numel(), p, 0) for p in params}


def _zero12_views(wrapper: Any) -> dict[nn.Parameter, tuple[Any, int, int, Tensor, int]]:
    assert not getattr(wrapper, "round_robin_gradients", False)
    views = {}
    for group, flat in zip(
        wrapper.bit16_groups, wrapper.single_partition_of_fp32_groups, strict=True
    ):
        for param in group:
            mapping = param._hp_mapping  # None where this rank owns nothing of the parameter
            if mapping is None:
                views[param] = (flat.narrow(0, 0, 0), 0, 0, flat, 0)
                continue
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            views[param] = (mapping.hp_fragment, low.start, low.numel, flat, high.start)
    return views


def _zero3_views(wrapper: Any) -> dict[nn.Parameter, tuple[Any, int, int, Tensor, int]]:
    views = {}
    for group in wrapper.fp16_groups:
        for param in group:
            index, offset, padded = wrapper.grad_position[wrapper.get_param_id(param)]
            flat = wrapper.fp32_partitioned_groups_flat[index]
            start = dist.get_rank(group=param.ds_process_group) * padded
            count = max(0, min(padded, param.ds_numel - start))
            start = min(start, param.ds_numel)
            views[param] = (flat.narrow(0, offset, count), start, count, flat, offset)
    return views
