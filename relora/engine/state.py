"""What the engine holds of every parameter, and of Adam's state: read, gathered, written, restored.

A model with an optimizer of torch, alone or under DistributedDataParallel, is the simple case: each
rank holds everything, once. Under ZeRO see `views`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from relora.engine.codec import REMAINDER_DTYPE
from relora.engine.distributed import Ranks
from relora.engine.muon import Muon
from relora.engine.sources import InParts, Source
from relora.engine.views import MOMENTS, ParameterView, live_of, trainable_views
from relora.errors import ConfigError
from relora.lora.layers import adapted_layers, parameter_roles


class EngineState:
    """Every parameter of a model in training by name, and its Adam state: read, written, restored.

    Args:
        target: a fresh DeepSpeed engine; or a model, plain or in DistributedDataParallel, with the
            adapters in it.
        optimizer: that of the model, of Adam's family, made after the adapters; an engine has its
            own.
        remainder: where to keep a remainder of every frozen bf16 weight: `host`, `device`, or None
            for nowhere. An A that does not train has none: its value is what forward passes read.

    Raises:
        ConfigError: the optimizer is none whose state is known here, or lacks a parameter that is
            trained.
    """

    @torch.no_grad()
    def __init__(
        self,
        target: Any,
        optimizer: torch.optim.Optimizer | None = None,
        remainder: str | None = "host",
    ) -> None:
        is_engine = hasattr(target, "zero_optimization")
        wrapper = target.optimizer if is_engine else optimizer
        # DeepSpeed and DistributedDataParallel both hold the model as `module`.
        wrapped = is_engine or isinstance(target, nn.parallel.DistributedDataParallel)
        self.model: nn.Module = target.module if wrapped else target
        self.adam: Any = getattr(wrapper, "optimizer", wrapper)
        # Stage 0 and a lone rank hold everything; otherwise pieces must be gathered.
        self.sharded = is_engine and target.zero_optimization() and target.world_size > 1
        self.partitioned = self.sharded and target.zero_optimization_stage() == 3
        # Those who hold the same weights. Whoever averages gradients in a way of their own has a
        # plain model here, alone.
        self.group = None if is_engine else getattr(target, "process_group", None)
        self.replicas = 1
        if wrapped and not self.partitioned and dist.is_initialized():
            self.replicas = dist.get_world_size(self.group)
        if not is_engine:
            _check_plain(self.model, self.adam)
        trainable = trainable_views(wrapper)
        self.by_name: dict[str, ParameterView] = {}
        roles = parameter_roles(self.model)
        for name, param in self.model.named_parameters():
            live, live_start, shape = live_of(param)
            master, start, count, flat, offset = trainable.get(param, (None, 0, 0, None, 0))
            if master is not None:
                master = master.detach()  # a plain view, also where gradients are recorded
            view = ParameterView(
                name, param, shape, live, live_start, master, start, count, flat, offset
            )
            if isinstance(self.adam, Muon) and id(param) in self.adam.matrices:
                view.moments = MOMENTS[:1]
            completed = not param.requires_grad and roles[name] != "A"
            if remainder and completed and live.dtype == torch.bfloat16:
                device = live.device if remainder == "device" else torch.device("cpu")
                view.remainder_start, size = self._part(view)
                view.remainder = torch.zeros(size, dtype=REMAINDER_DTYPE, device=device)
            self.by_name[name] = view
        if isinstance(self.adam, Muon):
            self.adam.attach(self)

    def __getitem__(self, name: str) -> ParameterView:
        return self.by_name[name]

    def __iter__(self) -> Any:
        return iter(self.by_name.values())

    def count_parameters(self) -> tuple[int, int]:
        """(trainable, total) number of entries, whole also where ranks share them."""
        sizes = [(view.numel, view.param.requires_grad) for view in self]
        return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)

    def moment(self, view: ParameterView, kind: str) -> Tensor:
        """This rank's part of a moment of a trainable parameter, as a flat view."""
        state = self._state(view)
        return state[kind].view(-1).narrow(0, view.offset, view.count)

    def adam_step(self, view: ParameterView) -> float:
        """Updates that Adam has counted for the flat tensor this parameter is part of."""
        return float(self._state(view)["step"])

    def set_adam_step_(self, view: ParameterView, step: float) -> None:
        """Set that count, for the whole flat tensor (one parameter group, or a part of one)."""
        state = self._state(view)
        if isinstance(state["step"], Tensor):
            state["step"].fill_(step)
        else:  # DeepSpeed's own Adams count in Python
            state["step"] = int(step)

    @torch.no_grad()
    def restore_(self, source: Source) -> None:
        """Take every value, moment and Adam step that the source has. Collective.

        Parameters whose moments it lacks start with zero moments (adapters at their birth).
        """
        for view in self:
            source.fetch(view.name)

            def read(start: int, stop: int, name: str = view.name) -> Tensor:
                piece = source.read(name, "value", start, stop)
                assert piece is not None, f"no values for {name}"
                return piece

            view.write_pieces_(read)
            if view.flat is None:
                continue
            for kind in view.moments:
                piece = source.read(view.name, kind, view.start, view.start + view.count)
                moment = self.moment(view, kind)
                moment.zero_() if piece is None else moment.copy_(piece)
            step = source.adam_step(view.name)
            if step is not None:
                self.set_adam_step_(view, step)
        for _, layer in adapted_layers(self.model):
            layer.requantise_()

    def state_dict(self) -> dict[str, Tensor]:
        """Exact values (fp32, in host memory) of the weights that keep a remainder, by name, whole.

        What checkpoints of the model and its optimizer lack: nothing, where frozen weights are
        fp32. Collective.
        """
        views = [view for view in self if view.remainder is not None]
        return {view.name: self.gather([view], "value")[0].cpu() for view in views}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` gave, once the model has its weights back. Collective."""
        for name, whole in state.items():
            flat = whole.flatten()

            def read(start: int, stop: int, flat: Tensor = flat) -> Tensor:
                return flat[start:stop]

            self[name].write_pieces_(read)
        for _, layer in adapted_layers(self.model):
            layer.requantise_()

    def release_(self) -> None:
        """Forget every tensor and Adam's state; the engine is about to be destroyed."""
        self.by_name.clear()
        self.adam.state.clear()

    def piece(self, view: ParameterView, kind: str) -> tuple[int, Tensor, bool]:
        """What this rank holds of a value or a moment: (start, flat fp32, whether all ranks do)."""
        if kind == "value":
            start, stop = view.held()
            return start, view.value(start, stop), self.shares(view)
        return view.start, self.moment(view, kind), not self.sharded

    def shares(self, view: ParameterView) -> bool:
        """Whether each rank holds all exact values of a parameter, and not a part of its own."""
        if view.master_is_finer:
            return not self.sharded
        return not self.partitioned and (view.remainder is None or self.replicas == 1)

    @torch.no_grad()
    def spread_(self, view: ParameterView, slice_size: int) -> None:
        """Give each rank what the others wrote to their parts of a weight that all hold whole.

        Collective. Of a bf16 weight, two bytes an entry; nothing where there is no such part.

        Args:
            slice_size: entries of the weight that are gathered at a time.
        """
        if self.partitioned or self.shares(view):
            return
        start, own = self._part(view)
        size = -(-view.numel // self.replicas)  # of every part but the last ones
        step = max(1, slice_size // self.replicas)
        for at in range(0, size, step):
            # Bytes: not every backend gathers every dtype.
            mine = view.live.new_zeros(min(step, size - at))
            part = view.live[start + min(at, own) : start + min(at + step, own)]
            mine[: part.numel()] = part
            gathered = mine.new_empty(self.replicas * mine.numel())
            dist.all_gather_into_tensor(
                gathered.view(torch.uint8), mine.view(torch.uint8), group=self.group
            )
            for rank, piece in enumerate(gathered.split(mine.numel())):
                target = view.live[rank * size + at : (rank + 1) * size][: mine.numel()]
                target.copy_(piece[: target.numel()])

    def gather(self, views: Iterable[ParameterView], kind: str) -> list[Tensor]:
        """`gather_each`, all at once."""
        return list(self.gather_each(list(views), kind))

    def gather_each(self, views: Sequence[ParameterView], kind: str) -> Iterator[Tensor]:
        """Copies of whole fp32 tensors (`value` or a moment) of some parameters, on every rank.

        One collective for all of them, none where every rank holds them already.
        """
        pieces = [self.piece(view, kind) for view in views]
        if all(shared for *_, shared in pieces):
            wholes: Iterable[Tensor] = (piece.to(self.device, copy=True) for _, piece, _ in pieces)
        elif self.partitioned:
            wholes = _all_gather(views, [piece for _, piece, _ in pieces])
        else:
            wholes = _all_reduce(views, pieces, self.group)
        for whole, view in zip(wholes, views, strict=True):
            yield whole.detach().view(view.shape)

    def total(self, values: Tensor, shared: bool) -> Tensor:
        """Sums over ranks of what each computed from its own parts of values or moments.

        Args:
            shared: every rank holds all of them, and its own numbers are the sums already.
        """
        if shared:
            return values
        total = values.to(self.device)
        dist.all_reduce(total, group=self.group)
        return total.to(values.device)

    def before(self, values: Tensor) -> Tensor:
        """Sums over the ranks that hold earlier parts of each moment than this one does."""
        if not self.sharded:
            return torch.zeros_like(values)
        rows = values.new_zeros(dist.get_world_size(), *values.shape)
        rows[dist.get_rank()] = values  # parts follow each other in the order of ranks
        return self.total(rows, shared=False)[: dist.get_rank()].sum(dim=0)

    @property
    def device(self) -> torch.device:
        """Where the model lives on this rank."""
        # A quantised weight's exact values lie in host memory.
        return next(view.live.device for view in self if view.param.requires_grad)

    def _part(self, view: ParameterView) -> tuple[int, int]:
        """(start, entries) of what is this rank's of `live`: cut where ZeRO 3 would cut it."""
        if self.replicas == 1:
            return view.live_start, view.live.numel()
        size = -(-view.numel // self.replicas)
        start = min(dist.get_rank(self.group) * size, view.numel)
        return start, min(size, view.numel - start)

    def _state(self, view: ParameterView) -> dict[str, Tensor]:
        # Adam makes its state at the first step; whoever needs it earlier gets what it would make.
        flat = view.flat
        assert flat is not None
        state: dict[str, Tensor] = self.adam.state[flat]
        if not state:
            on_device = self.adam.defaults.get("fused") or self.adam.defaults.get("capturable")
            device = flat.device if on_device else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for kind in view.moments:
                state[kind] = torch.zeros_like(flat)
        return state


@torch.no_grad()
def capture(views: EngineState, keep_state: Callable[[str], bool], ranks: Ranks) -> InParts:
    """Every weight, and the optimizer state of the parameters chosen by name, in host memory.

    Collective. This is how a run changes its engine: out of the old one, into the new one.
    """
    captured = InParts(ranks)
    for view in views:
        kept = view.moments if view.flat is not None and keep_state(view.name) else ()
        for kind in ("value", *kept):
            captured.keep(view.name, kind, views.gather([view], kind)[0])
        if kept:
            captured.adam_steps[view.name] = views.adam_step(view)
    return captured


def _all_gather(views: Sequence[ParameterView], pieces: Sequence[Tensor]) -> Iterator[Tensor]:
    """Whole tensors from the shards of ZeRO 3, equal on all ranks but for padding."""
    world = dist.get_world_size()
    padded = [-(-view.numel // world) for view in views]
    # On the device, whose group it goes through, though offloaded state lies in host memory.
    mine = torch.zeros(sum(padded), dtype=torch.float32, device=views[0].live.device)
    for part, piece in zip(mine.split(padded), pieces, strict=True):
        part[: piece.numel()] = piece
    everything = mine.new_empty(world * mine.numel())
    dist.all_gather_into_tensor(everything, mine)
    del mine, part  # which is a view of it
    for view, column in zip(views, everything.view(world, -1).split(padded, dim=1), strict=True):
        yield column.flatten()[: view.numel]


def _all_reduce(
    views: Sequence[ParameterView], pieces: Sequence[tuple[int, Tensor, bool]], group: Any
) -> list[Tensor]:
    """Whole tensors from unequal pieces: every entry has one owner, and the others add 0."""
    sizes = [view.numel for view in views]
    buffer = torch.zeros(sum(sizes), dtype=torch.float32, device=views[0].live.device)
    rank = dist.get_rank(group)
    for whole, (start, piece, shared) in zip(buffer.split(sizes), pieces, strict=True):
        if not shared or rank == 0:
            whole[start : start + piece.numel()] = piece
    dist.all_reduce(buffer, group=group)
    return list(buffer.split(sizes))


def _check_plain(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Whether restarts reach all there is of a model and an optimizer of torch."""
    if optimizer is None:
        raise ConfigError("EngineState: a model needs its optimizer beside it")
    # By class: others have betas too, and moments of other names, in other formats, or but one.
    known = isinstance(optimizer, torch.optim.Adam | torch.optim.NAdam | torch.optim.RAdam)
    if not known or optimizer.defaults.get("amsgrad"):
        raise ConfigError(
            f"EngineState: the moments of {type(optimizer).__name__} are not known to be exp_avg "
            "and exp_avg_sq alone, of which a restart resets a part; take torch.optim.AdamW or "
            "Adam, without amsgrad (optim: adamw_torch in transformers' Trainer)"
        )
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for path, param in model.named_parameters():
        if not isinstance(param.data, Tensor) or type(param.data) is not Tensor:
            raise ConfigError(
                f"EngineState: {path} is a {type(param.data).__name__}, as under FSDP or tensor "
                "parallelism, which merges do not reach; take DDP or DeepSpeed's ZeRO"
            )
        if param.requires_grad and id(param) not in held:
            raise ConfigError(
                f"EngineState: the optimizer does not hold {path}; make it after add_adapters, of "
                "relora.parameter_groups(model) or of all parameters that require gradients"
            )
