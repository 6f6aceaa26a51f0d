"""The `batch`, `optimizer` and `deepspeed` sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from relora.engine.precision import Name
from relora.section import Section


class BatchConfig(Section):
    """Sequences per optimizer step; gradient accumulation is derived from the world size."""

    global_batch_size: int = Field(ge=1)
    """Sequences of an optimizer step, over all ranks; accumulation follows from it."""
    micro_batch_size: int = Field(ge=1)
    """Sequences of a forward pass, on each rank."""


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay, none of it on norms and biases."""

    matrices: Literal["adamw", "muon"] = "adamw"
    """How matrices step: W where it trains in full, A and B, or blocks. muon keeps one moment of
    them and not two; embeddings, head, norms and biases are AdamW's in any case."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Of muon."""
    lr: float = Field(gt=0)
    """Learning rate of matrices; of adapters too, unless relora.lr or lora.lr says another."""
    lr_embeddings: Annotated[float, Field(gt=0)] | Literal["adapters"] | None = None
    """Learning rate of embeddings, head, norms and biases, which restarts leave alone. null = lr,
    in every phase and method; adapters = that of the adapters once there are some, restarts
    included, as published."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's two moments, each in [0, 1)."""
    eps: float = Field(default=1e-8, gt=0)
    """Of AdamW."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled; none of it on norms and biases."""
    grad_clip: float | None = Field(default=1.0, gt=0)
    """Largest global norm of the gradient; null = no clipping."""

    @model_validator(mode="before")
    @classmethod
    def _without_name(cls, values: Any) -> Any:
        """Configs from before, those of runs among them, name the one optimizer there is."""
        if isinstance(values, dict) and values.get("name") == "adamw":
            return {key: value for key, value in values.items() if key != "name"}
        return values

    @field_validator("betas")
    @classmethod
    def _below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both betas lie in [0, 1)")
        return value


Stage = Literal[0, 1, 2, 3]
STAGES: tuple[int, ...] = get_args(Stage)


class DeepSpeedConfig(Section):
    """What DeepSpeed does. Its own JSON is made from this by one function; `extra` goes in last.

    `precision`: `bf16` and `fp16` keep every trainable parameter in fp32 and the frozen base in
    bf16, and multiply under autocast; fp16 scales its loss dynamically. `deepspeed_bf16` is
    DeepSpeed's own engine: all weights and gradients in bf16, with fp32 masters.
    """

    zero_stage: Stage = 2
    """What ranks share: 1 optimizer state, 2 gradients too, 3 weights too."""
    precision: Name = "bf16"
    """bf16, fp16: trainable parameters in fp32, frozen ones in bf16, products in half precision;
    deepspeed_bf16: all in bf16 with fp32 masters; fp32."""
    offload_optimizer: bool = False
    """Keep optimizer state and its step in host memory."""
    reduce_dtype: Literal["fp32", "bf16"] | None = None
    """In which gradients travel between ranks: bf16 halves the traffic and rounds each rank's, and
    their sum. null = as they are: fp32, or with deepspeed_bf16 bf16."""
    timeout_minutes: float = Field(default=30.0, gt=0)
    """Of a collective, before a hang is an error."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Merged into DeepSpeed's own JSON last."""
