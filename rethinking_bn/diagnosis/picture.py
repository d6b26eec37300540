"""One picture of a diagnosis: the layers along the depth, what was measured, what was found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rethinking_bn.files import replace

if TYPE_CHECKING:
    from rethinking_bn.diagnosis.result import Diagnosis

# axes: title, (kind, number in its evidence, colour), severe from
_PANELS = (
    (
        "stored statistics, standard deviations from the data's",
        (("stale-statistics", "distance", "C0"), ("identity-statistics", "distance", "C3"),
         ("mixed-modes", "distance", "C4"), ("domain-shift", "distance", "C2")),
        0.5,
    ),
    (
        "within a batch, standard deviations",
        (("small-batch", "noise", "C1"), ("dependent-samples", "excess", "C5"),
         ("repeated-use", "apart", "C6")),
        0.4,
    ),
    (
        "change of the output by one layer",
        (("output-effect", "stored_to_exact", "C0"), ("output-effect", "exact_to_batch", "C1")),
        0.3,
    ),
)  # fmt: skip
_MARKS = {"warning": ("^", "darkorange"), "severe": ("X", "crimson")}


def draw(diagnosis: Diagnosis, path: Path) -> None:
    """Write the picture, in the format of the file's suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    depth = {name: i for i, name in enumerate(diagnosis.layers)}
    figure = Figure(figsize=(max(7.0, min(16.0, 0.22 * len(depth) + 3)), 8.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(_PANELS), 1, sharex=True)
    for ax, (title, series, severe) in zip(axes, _PANELS, strict=True):
        for kind, key, colour in series:
            points = sorted(
                (depth[f.layer], f.evidence[key], f.severity)
                for f in diagnosis.findings
                if f.kind == kind
                and f.layer in depth
                and math.isfinite(f.evidence.get(key, math.nan))
            )
            if points:
                label = kind if kind != "output-effect" else key.replace("_to_", " to ")
                x, y, _ = zip(*points, strict=True)
                ax.plot(x, y, ".-", color=colour, label=label, linewidth=0.8, markersize=4)
            for severity, (marker, mark_colour) in _MARKS.items():
                marked = [p[:2] for p in points if p[2] == severity]
                if marked:
                    ax.scatter(
                        *zip(*marked, strict=True), marker=marker, color=mark_colour, zorder=3
                    )
        ax.axhline(severe, color="grey", linewidth=0.6, linestyle=":")
        ax.set_ylim(bottom=0)
        ax.set_title(title, fontsize=9, loc="left")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7, loc="upper right", bbox_to_anchor=(1.0, 1.16), ncols=4)
    every = max(1, len(depth) // 60)
    axes[-1].set_xticks(
        list(depth.values())[::every], list(depth)[::every], rotation=90, fontsize=6
    )
    for finding in diagnosis.findings:
        if finding.kind in ("non-finite", "impossible-variance") and finding.severity == "severe":
            axes[0].axvline(depth[finding.layer], color="crimson", linewidth=0.8)
    figure.suptitle(str(diagnosis).splitlines()[0], fontsize=10)
    kind = path.suffix.lstrip(".") or "png"
    replace(path, lambda aside: figure.savefig(aside, dpi=110, format=kind))
