"""Loss over the bytes that training holds, of the compared methods: the picture of the README.

python configs/experiments/benefit.py        # reads screen.jsonl, writes benefit.png
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from screen import rows

HERE = Path(__file__).parent
STEPS = 10_240  # 20 tokens a parameter
# Arms by their words in the screen: name, where its label goes, and whether it restarts.
ARMS = {
    "full": ("full rank, AdamW", (0, 9), False),
    "full opt=muon": ("full rank, Muon", (0, 9), False),
    "block k=2 C=400 opt=muon": ("two blocks, Muon", (0, -16), True),
    "block k=4 C=400 opt=muon": ("four blocks, Muon", (6, -16), True),
    "lora r=32": ("LoRA, rank 1/4", (8, -3), False),
    "lora r=16": ("LoRA, rank 1/8", (8, 2), False),
    "lora r=16 C=800 w=20 m=magnitude": ("ReLoRA, rank 1/8", (8, -9), True),
}


def main() -> None:
    """Draw a panel for each text."""
    figure = Figure(figsize=(9, 3.6), dpi=160, layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, source in zip(panels, ("english", "python"), strict=True):
        for row in rows(HERE / "screen.jsonl"):
            if (row.source, row.width, row.steps) != (source, 128, STEPS) or row.arm not in ARMS:
                continue
            name, place, restarts = ARMS[row.arm]
            spread = [[row.mean - min(row.losses)], [max(row.losses) - row.mean]]
            color = "#c2410c" if restarts else "#475569"
            panel.errorbar(row.state, row.mean, spread, fmt="o", color=color, capsize=3)
            options = {"ha": "left" if place[0] == 8 else "center", "fontsize": 8, "color": color}
            spot = (row.state, row.mean)
            panel.annotate(name, spot, place, textcoords="offset points", **options)
        panel.set_title(f"{source.capitalize()}, 20 tokens a parameter", fontsize=9)
        panel.set_xlabel("bytes of state an entry of W: values and moments that train, fp32")
        panel.xaxis.label.set_fontsize(8)
        panel.set_xlim(0, 14)
        panel.margins(y=0.18)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation loss, best rate of each")
    figure.savefig(HERE / "benefit.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
