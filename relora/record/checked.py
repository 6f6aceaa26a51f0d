"""JSON that a run has left: anybody may have changed it since, so it is checked as it is read."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relora.errors import CheckpointError

Count = Annotated[int, Field(strict=True, ge=0, lt=2**63, description="a whole number ≥ 0")]
Amount = Annotated[float, Field(strict=True, ge=0, lt=2**63, description="a number ≥ 0")]


class JsonRecord(BaseModel):
    """What a JSON object holds: true is no number, and "3" is none either. Other keys are left out.

    A field's description says what is allowed.
    """

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


R = TypeVar("R", bound=JsonRecord)


def checked(kind: type[R], values: Any, where: object) -> R:
    """Plain values as a record; `where` names them in messages.

    Raises:
        CheckpointError: names the first field that is missing or wrong, and what is allowed.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if not first["loc"]:
        raise CheckpointError(f"{where}: is no JSON object")
    name = str(first["loc"][0])
    field = kind.model_fields.get(name)
    if field is None:
        raise CheckpointError(f"{where}: {name[:80]} is unknown")
    if first["type"] == "missing" and len(first["loc"]) == 1:
        raise CheckpointError(f"{where}: {name} is missing")
    raise CheckpointError(f"{where}: {name} must be {field.description}")
