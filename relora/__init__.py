"""ReLoRA pretraining on DeepSpeed: high-rank training through a sequence of low-rank updates."""

__version__ = "0.1.0"
