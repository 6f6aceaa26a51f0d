"""The base of every config section: frozen, and strict about keys."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of the config file. Each lives in the package whose code reads it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
