"""What is wrong with a `deepspeed` section: by what is known here, then by DeepSpeed itself."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from relora.engine.config import DeepSpeedConfig, OptimizerConfig
from relora.engine.options import deepspeed_json, known_mistakes


def mistakes(
    section: DeepSpeedConfig, optimizer: OptimizerConfig, micro_batch_size: int, ask: bool
) -> Iterator[str]:
    """Every mistake of a `deepspeed` section, in words.

    Args:
        ask: DeepSpeed too, where `extra` holds something of its own; importing it takes seconds.
    """
    found = list(known_mistakes(section))
    yield from found
    if ask and section.extra and not found:
        yield from _refusals(section, optimizer, micro_batch_size)


def _refusals(
    config: DeepSpeedConfig, optimizer: OptimizerConfig, micro_batch_size: int
) -> Iterator[str]:
    """What DeepSpeed refuses in `extra`, or would never look at, by its own config model."""
    from relora.engine.deepspeed import config_model  # seconds; most configs have no `extra`

    parse = config_model()
    plain = config.model_copy(update={"extra": {}})
    parsed = parse(deepspeed_json(plain, optimizer, micro_batch_size))
    for key, value in config.extra.items():
        values = _Watched(
            deepspeed_json(
                config.model_copy(update={"extra": {key: value}}), optimizer, micro_batch_size
            )
        )
        path, default = f"deepspeed.extra.{key}", getattr(parsed, key, None)
        try:
            parse(values)
        except ValidationError as error:
            for one in error.errors(include_url=False):
                where = ".".join([path, *map(str, one["loc"])])
                yield f"{where}: {one['input']!r}: DeepSpeed refuses it: {one['msg']}"
        except Exception as error:  # assertions and type errors of any place in its code
            yield f"{path}: {value!r}: DeepSpeed refuses it: {error}"
        else:
            if key not in values.asked:
                close = difflib.get_close_matches(key, values.asked, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                yield f"{path}: DeepSpeed knows no such key{hint}"
            # Plain values it takes as they are, and fails on in the middle of the run.
            elif type(default) in _KINDS:
                allowed, kinds = _KINDS[type(default)]
                if type(value) not in kinds:
                    yield f"{path}: {value!r}: must be {allowed}"


_KINDS: dict[type, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
}


class _Watched(dict[str, Any]):
    """A mapping that knows which of its keys were asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> _Watched:
        return self  # DeepSpeed copies it before it looks
