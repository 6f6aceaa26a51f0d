"""Spectra files as a run leaves them, made by hand from matrices whose rank is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

DIRECTIONS = 8


def low_rank(rank: int, shape: tuple[int, int], seed: int) -> np.ndarray:
    """A matrix of a rank, with equal singular values 1."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(shape[0], rank)))[0]
    right = np.linalg.qr(rng.normal(size=(shape[1], rank)))[0]
    return left @ right.T


def write_spectra(
    run_dir: Path,
    step: int,
    merge: int | None,
    layers: dict[str, tuple[np.ndarray | None, np.ndarray]],
) -> Path:
    """One measurement: for each layer (the cycle's update or None, the whole update)."""
    tensors: dict[str, np.ndarray] = {}
    described: list[dict[str, Any]] = []
    for name, (cycle, total) in layers.items():
        figures: dict[str, Any] = {"name": name, "weight_norm": 1.0, "start_norm": 1.0}
        for kind, matrix in (("cycle", cycle), ("total", total)):
            if matrix is None:
                continue
            left, values, right = np.linalg.svd(matrix, full_matrices=False)
            share = values / values.sum()
            share = share[share > 1e-12]
            figures[f"{kind}_norm"] = float(np.linalg.norm(matrix))
            figures[f"{kind}_stable_rank"] = float((values**2).sum() / values[0] ** 2)
            figures[f"{kind}_effective_rank"] = float(np.exp(-(share * np.log(share)).sum()))
            tensors[f"{name}|{kind}_values"] = values.astype(np.float32)
            tensors[f"{name}|{kind}_left"] = left[:, :DIRECTIONS].astype(np.float32).copy()
            tensors[f"{name}|{kind}_right"] = right[:DIRECTIONS].T.astype(np.float32).copy()
        figures |= {"overlap": None, "amplification": 2.0}
        figures["total_ratio"] = figures.get("total_norm")  # of a start of norm 1
        described.append(figures)
    path = run_dir / "spectra" / f"step_{step:08d}.safetensors"
    path.parent.mkdir(exist_ok=True)
    metadata = {
        "step": str(step),
        "merge": "" if merge is None else str(merge),
        "layers": json.dumps(described),
    }
    save_file(tensors, path, metadata=metadata)
    return path
