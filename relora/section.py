"""The base of every config section: frozen, and strict about keys."""

from collections.abc import Iterator
from typing import get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """One section of the config file. Each lives in the package whose code reads it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        annotation = cls.model_fields[info.field_name or ""].annotation
        kinds = {kind if isinstance(kind, type) else type(kind) for kind in get_args(annotation)}
        if isinstance(value, bool) and {int, float} & {annotation, *kinds}:
            raise ValueError("must be a number")  # Python would take true for 1
        if isinstance(value, dict) and get_origin(annotation) is not dict:
            return value  # a section, which checks its own fields
        for part in _plain_values(value):
            if isinstance(part, int) and not -(2**63) <= part < 2**63:
                raise ValueError("must fit in 64 bits")
            if isinstance(part, str) and "\0" in part:
                raise ValueError("must not hold a zero byte")
        return value

    def changed(self, *names: str) -> list[str]:
        """Those of `names` whose value is not the default; a resolved config names them all."""
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].default]


def _plain_values(value: object) -> Iterator[object]:
    """What a tree of lists and mappings holds."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        for part in value:
            yield from _plain_values(part)
    else:
        yield value
