"""Where each parameter lives on this rank, and how to read and write it so that it stays written.

Under ZeRO one parameter exists up to four times: what the forward pass reads (`live`: the whole
tensor, or a shard under ZeRO 3), the fp32 values the optimizer updates (`master`), its Adam moments
inside a flat tensor, and, for a bf16 weight, the 16-bit remainder that completes it to fp32.
Writing only one of live and master is undone or invisible after the next step; all writes here go
to both, in place. The attribute names are those of DeepSpeed 0.19; this file and `deepspeed.py`
are the only ones that know them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from relora.engine.sources import Source, Tensors

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Place:
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
    # int16; bf16 live + remainder = fp32, bit for bit. In host memory if so asked: only merges,
    # checkpoints and the start of a run touch it.
    remainder: Tensor | None = None

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
        return self.live_start, self.live_stop

    def value(self, start: int, stop: int) -> Tensor:
        """Exact fp32 values of entries start..stop of the flattened parameter, all of them held.

        The very tensor where that is fp32, else a copy.
        """
        if self.master_is_finer:
            assert self.master is not None
            return self.master.narrow(0, start - self.start, stop - start)
        start, count = start - self.live_start, stop - start
        live = self.live.narrow(0, start, count)
        if self.remainder is not None:
            return join_bf16(live, self.remainder.narrow(0, start, count).to(live.device))
        return live.float()

    def write_live_(self, values: Tensor, start: int) -> None:
        """Replace entries of `live` (and the remainder) from `start` of the flattened parameter on.

        `drop_stale_copies_` must follow.
        """
        start -= self.live_start
        live = self.live.narrow(0, start, values.numel())
        if self.remainder is not None:
            high, low = split_fp32(values.to(live.device))
            live.copy_(high)
            self.remainder.narrow(0, start, values.numel()).copy_(low)
        else:
            live.copy_(values)

    def write_(self, values: Tensor) -> None:
        """Replace the parameter by a whole fp32 tensor, which every rank has."""
        values = values.flatten()
        self.write_pieces_(lambda start, stop: values[start:stop])

    def write_pieces_(self, read: Callable[[int, int], Tensor]) -> None:
        """Replace the parameter; `read(start, stop)` gives flat fp32 pieces of the new values."""
        if self.live.numel():
            self.write_live_(read(self.live_start, self.live_stop), self.live_start)
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


class Places:
    """Every parameter of an engine by name, and its Adam state.

    Args:
        engine: a fresh DeepSpeed engine.
        remainder: where to keep a remainder of every frozen bf16 parameter: `host`, `device`, or
            None for nowhere.
    """

    @torch.no_grad()
    def __init__(self, engine: Any, remainder: str | None = "host") -> None:
        wrapper = engine.optimizer
        self.adam: torch.optim.Optimizer = getattr(wrapper, "optimizer", wrapper)
        # Stage 0 and a lone rank hold everything; otherwise pieces must be gathered.
        self.sharded = engine.zero_optimization() and engine.world_size > 1
        self.partitioned = self.sharded and engine.zero_optimization_stage() == 3
        trainable = _trainable_places(wrapper)
        self.by_name: dict[str, Place] = {}
        for name, param in engine.module.named_parameters():
            live, live_start, shape = _live(param)
            master, start, count, flat, offset = trainable.get(param, (None, 0, 0, None, 0))
            if master is not None:
                master = master.detach()  # a plain view, also where gradients are recorded
            place = Place(name, param, shape, live, live_start, master, start, count, flat, offset)
            if remainder and not param.requires_grad and live.dtype == torch.bfloat16:
                device = live.device if remainder == "device" else torch.device("cpu")
                place.remainder = torch.zeros_like(live, dtype=torch.int16, device=device)
            self.by_name[name] = place

    def __getitem__(self, name: str) -> Place:
        return self.by_name[name]

    def __iter__(self) -> Any:
        return iter(self.by_name.values())

    def moment(self, place: Place, kind: str) -> Tensor:
        """This rank's part of a moment of a trainable parameter, as a flat view."""
        assert place.flat is not None
        state = self._state(place.flat)
        return state[kind].view(-1).narrow(0, place.offset, place.count)

    def adam_step(self, place: Place) -> float:
        """Updates that Adam has counted for the flat tensor this parameter is part of."""
        assert place.flat is not None
        return float(self._state(place.flat)["step"])

    def set_adam_step_(self, place: Place, step: float) -> None:
        """Set that count, for the whole flat tensor (one parameter group, or a part of one)."""
        assert place.flat is not None
        self._state(place.flat)["step"].fill_(step)

    @torch.no_grad()
    def restore_(self, source: Source) -> None:
        """Take every value, moment and Adam step that the source has.

        Parameters whose moments it lacks start with zero moments (adapters at their birth).
        """
        for place in self:

            def read(start: int, stop: int, name: str = place.name) -> Tensor:
                piece = source.read(name, "value", start, stop)
                assert piece is not None, f"no values for {name}"
                return piece

            place.write_pieces_(read)
            if place.flat is None:
                continue
            for kind in MOMENTS:
                piece = source.read(place.name, kind, place.start, place.start + place.count)
                moment = self.moment(place, kind)
                moment.zero_() if piece is None else moment.copy_(piece)
            step = source.adam_step(place.name)
            if step is not None:
                self.set_adam_step_(place, step)

    def release_(self) -> None:
        """Forget every tensor and Adam's state; the engine is about to be destroyed."""
        self.by_name.clear()
        self.adam.state.clear()

    def piece(self, place: Place, kind: str) -> tuple[int, Tensor, bool]:
        """What this rank holds of a value or a moment: (start, flat fp32, whether all ranks do)."""
        if kind == "value":
            start, stop = place.held()
            shared = not (self.sharded if place.master_is_finer else self.partitioned)
            return start, place.value(start, stop), shared
        return place.start, self.moment(place, kind), not self.sharded

    def gather(self, places: Iterable[Place], kind: str) -> list[Tensor]:
        """`gather_each`, all at once."""
        return list(self.gather_each(list(places), kind))

    def gather_each(self, places: Sequence[Place], kind: str) -> Iterator[Tensor]:
        """Copies of whole fp32 tensors (`value` or a moment) of some parameters, on every rank.

        One collective for all of them, none where every rank holds them already.
        """
        pieces = [self.piece(place, kind) for place in places]
        if all(shared for *_, shared in pieces):
            wholes: Iterable[Tensor] = (piece.to(self.device, copy=True) for _, piece, _ in pieces)
        elif self.partitioned:
            wholes = _all_gather(places, [piece for _, piece, _ in pieces])
        else:
            wholes = _all_reduce(places, pieces)
        for whole, place in zip(wholes, places, strict=True):
            yield whole.detach().view(place.shape)

    def total(self, values: Tensor, kind: str) -> Tensor:
        """Sums over ranks of what each computed from its own parts of values or moments.

        Where every rank holds all of them, each rank's own numbers are the sums already.
        """
        if not (self.partitioned if kind == "value" else self.sharded):
            return values
        total = values.to(self.device)
        dist.all_reduce(total)
        return total.to(values.device)

    def before(self, values: Tensor) -> Tensor:
        """Sums over the ranks that hold earlier parts of each moment than this one does."""
        if not self.sharded:
            return torch.zeros_like(values)
        rows = values.new_zeros(dist.get_world_size(), *values.shape)
        rows[dist.get_rank()] = values  # parts follow each other in the order of ranks
        return self.total(rows, "exp_avg")[: dist.get_rank()].sum(dim=0)

    @property
    def device(self) -> torch.device:
        """Where the model lives on this rank."""
        return next(iter(self)).live.device

    def _state(self, flat: Tensor) -> dict[str, Tensor]:
        # Adam makes its state at the first step; whoever needs it earlier gets what it would make.
        state = self.adam.state[flat]
        if not state:
            on_device = self.adam.defaults.get("fused") or self.adam.defaults.get("capturable")
            device = flat.device if on_device else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for kind in MOMENTS:
                state[kind] = torch.zeros_like(flat)
        return state


@torch.no_grad()
def capture(places: Places, keep_state: Callable[[str], bool]) -> Tensors:
    """Every weight, and the optimizer state of the parameters chosen by name, in host memory.

    Collective. This is how a run changes its engine: out of the old one, into the new one.
    """
    tensors, steps = {}, {}
    for place in places:
        kept = MOMENTS if place.flat is not None and keep_state(place.name) else ()
        for kind in ("value", *kept):
            tensors[place.name, kind] = places.gather([place], kind)[0].cpu()
        if kept:
            steps[place.name] = places.adam_step(place)
    return Tensors(tensors, steps)


def _all_gather(places: Sequence[Place], pieces: Sequence[Tensor]) -> Iterator[Tensor]:
    """Whole tensors from the shards of ZeRO 3, equal on all ranks but for padding."""
    world = dist.get_world_size()
    padded = [-(-place.numel // world) for place in places]
    # On the device, whose group it goes through, though offloaded state lies in host memory.
    mine = torch.zeros(sum(padded), dtype=torch.float32, device=places[0].live.device)
    for part, piece in zip(mine.split(padded), pieces, strict=True):
        part[: piece.numel()] = piece
    everything = mine.new_empty(world * mine.numel())
    dist.all_gather_into_tensor(everything, mine)
    del mine
    for place, column in zip(places, everything.view(world, -1).split(padded, dim=1), strict=True):
        yield column.flatten()[: place.numel]


def _all_reduce(
    places: Sequence[Place], pieces: Sequence[tuple[int, Tensor, bool]]
) -> list[Tensor]:
    """Whole tensors from unequal pieces: every entry has one owner, and the others add 0."""
    sizes = [place.numel for place in places]
    buffer = torch.zeros(sum(sizes), dtype=torch.float32, device=places[0].live.device)
    rank = dist.get_rank()
    for whole, (start, piece, shared) in zip(buffer.split(sizes), pieces, strict=True):
        if not shared or rank == 0:
            whole[start : start + piece.numel()] = piece
    dist.all_reduce(buffer)
    return list(buffer.split(sizes))


def join_bf16(high: Tensor, low: Tensor) -> Tensor:
    """fp32 from its bf16 rounding and the int16 difference of the bit patterns; exact."""
    bits = (high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
    return bits.view(torch.float32)


def split_fp32(values: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 → (bf16, int16) with join_bf16(bf16, int16) == fp32, bit for bit.

    Rounds half away from zero, so that the difference always fits 16 bits; rounding half to even
    would leave +0x8000 and −0x8000 for the same bf16.
    """
    bits = values.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = (bits - (high << 16)).to(torch.int16)
    return high.to(torch.int16).view(torch.bfloat16), low


def _live(param: Any) -> tuple[Tensor, int, torch.Size]:
    """(flat view of what this rank holds for the forward pass, its start, the whole shape)."""
    if not hasattr(param, "ds_id"):
        return param.data.view(-1), 0, param.shape
    shard = param.ds_tensor  # ZeRO 3: equal shards, the last one padded
    start = dist.get_rank(group=param.ds_process_group) * shard.ds_numel
    count = max(0, min(shard.ds_numel, param.ds_numel - start))
    return shard.data.view(-1).narrow(0, 0, count), min(start, param.ds_numel), param.ds_shape


def _trainable_places(wrapper: Any) -> dict[nn.Parameter, tuple[Any, int, int, Tensor, int]]:
    """param → (master, start, count, flat, offset) for each class that DeepSpeed wraps Adam in."""
    kind = type(wrapper).__name__
    if kind == "DeepSpeedZeroOptimizer":
        return _zero12_places(wrapper)
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return _zero3_places(wrapper)
    assert isinstance(wrapper, torch.optim.Optimizer), f"unknown optimizer wrapper {kind}"
    params = [p for group in wrapper.param_groups for p in group["params"]]
    return {p: (None, 0, p.numel(), p, 0) for p in params}


def _zero12_places(wrapper: Any) -> dict[nn.Parameter, tuple[Any, int, int, Tensor, int]]:
    assert not getattr(wrapper, "round_robin_gradients", False)
    places = {}
    for group, flat in zip(
        wrapper.bit16_groups, wrapper.single_partition_of_fp32_groups, strict=True
    ):
        for param in group:
            mapping = param._hp_mapping  # None where this rank owns nothing of the parameter
            if mapping is None:
                places[param] = (flat.narrow(0, 0, 0), 0, 0, flat, 0)
                continue
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            places[param] = (mapping.hp_fragment, low.start, low.numel, flat, high.start)
    return places


def _zero3_places(wrapper: Any) -> dict[nn.Parameter, tuple[Any, int, int, Tensor, int]]:
    places = {}
    for group in wrapper.fp16_groups:
        for param in group:
            index, offset, padded = wrapper.grad_position[wrapper.get_param_id(param)]
            flat = wrapper.fp32_partitioned_groups_flat[index]
            start = dist.get_rank(group=param.ds_process_group) * padded
            count = max(0, min(padded, param.ds_numel - start))
            start = min(start, param.ds_numel)
            places[param] = (flat.narrow(0, offset, count), start, count, flat, offset)
    return places
