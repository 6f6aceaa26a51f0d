"""The base of every config section: frozen, and strict about keys."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of the config file. Each lives in the package whose code reads it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def changed(self, *names: str) -> list[str]:
        """Those of `names` whose value is not the default; a resolved config names them all."""
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].default]
