"""The base of every config section: frozen, and strict about keys."""

from typing import get_args

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
        return value

    def changed(self, *names: str) -> list[str]:
        """Those of `names` whose value is not the default; a resolved config names them all."""
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].default]
