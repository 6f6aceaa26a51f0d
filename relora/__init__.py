"""ReLoRA for any training loop: adapters that are merged into the base weights and start again.

    import relora

    relora.add_adapters(model, relora.LoRAConfig(rank=128))
    optimizer = torch.optim.AdamW(relora.parameter_groups(model), lr=1e-3)
    state = relora.EngineState(model, optimizer)        # or of a DeepSpeed engine, any ZeRO stage
    …
    relora.merge_and_restart(state, merge=1)
    relora.merge_adapters(model)

The names below are the library; whatever else the package holds serves its command line and may
change. torch is imported when the first of them is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from relora.version import __version__

if TYPE_CHECKING:
    from relora.commands.train import train
    from relora.config import Config
    from relora.engine.muon import Muon
    from relora.engine.state import EngineState
    from relora.integrations.trainer import ReLoRACallback
    from relora.lean import make_lean
    from relora.load import load_config
    from relora.lora.config import LoRAConfig
    from relora.lora.inject import (
        add_adapters,
        merge_adapters,
        parameter_groups,
        quantise_base,
        remove_adapters,
        unmerge_adapters,
    )
    from relora.lora.layers import adapted_layers
    from relora.lora.peft_format import (
        AdapterWeights,
        adapter_of,
        load_adapter,
        read_adapter,
        save_adapter,
        using_adapter,
    )
    from relora.record.loaded import load_run
    from relora.restart.config import ReLoRAConfig, ResetConfig
    from relora.restart.moments import reset_moments
    from relora.restart.restart import merge_and_restart
    from relora.restart.schedule import Clock

__all__ = [
    "AdapterWeights",
    "Clock",
    "Config",
    "EngineState",
    "LoRAConfig",
    "Muon",
    "ReLoRACallback",
    "ReLoRAConfig",
    "ResetConfig",
    "__version__",
    "adapted_layers",
    "adapter_of",
    "add_adapters",
    "load_adapter",
    "load_config",
    "load_run",
    "make_lean",
    "merge_adapters",
    "merge_and_restart",
    "parameter_groups",
    "quantise_base",
    "read_adapter",
    "remove_adapters",
    "reset_moments",
    "save_adapter",
    "train",
    "unmerge_adapters",
    "using_adapter",
]
_HOMES = {
    "AdapterWeights": "lora.peft_format",
    "Clock": "restart.schedule",
    "Config": "config",
    "EngineState": "engine.state",
    "LoRAConfig": "lora.config",
    "Muon": "engine.muon",
    "ReLoRACallback": "integrations.trainer",
    "ReLoRAConfig": "restart.config",
    "ResetConfig": "restart.config",
    "adapted_layers": "lora.layers",
    "adapter_of": "lora.peft_format",
    "add_adapters": "lora.inject",
    "load_adapter": "lora.peft_format",
    "load_config": "load",
    "load_run": "record.loaded",
    "make_lean": "lean",
    "merge_adapters": "lora.inject",
    "merge_and_restart": "restart.restart",
    "parameter_groups": "lora.inject",
    "quantise_base": "lora.inject",
    "read_adapter": "lora.peft_format",
    "remove_adapters": "lora.inject",
    "reset_moments": "restart.moments",
    "save_adapter": "lora.peft_format",
    "train": "commands.train",
    "unmerge_adapters": "lora.inject",
    "using_adapter": "lora.peft_format",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'relora' has no attribute {name!r}")
    value = getattr(import_module(f"relora.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
