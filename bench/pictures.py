"""The pictures that bench/stall.py and bench/codec.py draw of their results.

matplotlib is optional, and imported when one is drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ways import DCP, LEVEL_1, OFF

BLOCKED, SLOWED, STEP = "#c0392b", "#e8a29a", "#b8c4d0"


def draw_bars(results: dict[str, Any], path: Path) -> None:
    """Draw the training time that a checkpoint costs, a bar for each way of saving."""
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if row["warm"] and not row["reference"]]
    if not rows:
        return
    rows.sort(key=lambda row: -row["warm"]["lost_seconds"]["median"])
    noise = next(
        row["warm"]["lost_seconds"] for row in results["rows"] if row["name"] == "no saving"
    )
    figure = Figure(figsize=(10, 0.9 + 0.5 * len(rows)), layout="constrained")
    panel = figure.subplots()
    panel.axvspan(noise["min"], noise["max"], color="#eeeeee", label="noise: cycles without a save")
    for y, row in enumerate(rows):
        lost, waited = row["warm"]["lost_seconds"], row["warm"]["blocked_seconds"]["median"]
        waited += row["warm"]["fence_seconds"]["median"]
        first = y == 0
        panel.barh(y, lost["median"], color=SLOWED, label="lost in all, median" if first else None)
        panel.barh(y, waited, color=BLOCKED, label="of that: blocked + fence" if first else None)
        low, high = lost["median"] - lost["min"], lost["max"] - lost["median"]
        panel.errorbar(lost["median"], y, xerr=[[low], [high]], color="#555555", lw=1, capsize=3)
    panel.set_yticks(range(len(rows)), [row["name"] for row in rows])
    longest = max(row["warm"]["lost_seconds"]["median"] for row in rows)
    panel.set_xlim(min(0.0, noise["min"]), 2.0 * max(longest, 0.01))
    panel.set_xlabel("seconds of training lost to one checkpoint (smallest … largest)")
    panel.set_title(
        f"{results['state_bytes'] / 1e9:.2f} GB of state, {results['hardware']['cores']} cores, "
        f"{results['settings']['saves']} saves each"
    )
    panel.legend(loc="upper right")  # the longest bars are below
    figure.savefig(path, dpi=110)


def draw_timeline(results: dict[str, Any], path: Path) -> None:
    """Draw the training steps beside one save of each of three ways, on one scale of time."""
    from matplotlib.figure import Figure

    chosen = [cycle for name in (OFF, LEVEL_1, DCP) if (cycle := _typical(results, name))]
    if not chosen:
        return
    figure = Figure(figsize=(10, 0.9 + 1.1 * len(chosen)), layout="constrained")
    panel = figure.subplots()
    for row, cycle in enumerate(reversed(chosen)):
        begin = cycle["blocked_seconds"]
        panel.barh(row + 0.2, begin, height=0.34, color=BLOCKED)
        for i, end in enumerate(cycle["step_ends"]):
            panel.barh(
                row + 0.2,
                end - begin,
                left=begin,
                height=0.34,
                color=STEP,
                alpha=0.65 if i % 2 else 1.0,
                edgecolor="white",
            )
            begin = end
        durable = cycle["durable_seconds"]
        panel.barh(row - 0.2, durable, height=0.26, color="#2c7fb8")
        panel.annotate(
            f" done after {durable:.2f} s", (durable, row - 0.2), va="center", fontsize=9
        )
    panel.set_yticks(range(len(chosen)), [cycle["way"] for cycle in reversed(chosen)])
    longest = max(cycle["durable_seconds"] for cycle in chosen)
    panel.set_xlim(0, 1.25 * longest)
    panel.set_xlabel(
        "seconds from the call. Above: blocked (red), then training steps, each a box. "
        "Below: the save"
    )
    panel.set_title("One checkpoint beside the training")
    figure.savefig(path, dpi=110)


def draw_codings(results: dict[str, Any], path: Path) -> None:
    """Draw ratio against encode speed for every coding, one panel for each kind in fp32."""
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if row["dtype"] == "fp32"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, len(kinds))
    for kind, panel in zip(kinds, panels, strict=True):
        _draw_kind([row for row in rows if row["kind"] == kind], panel)
        panel.set(xscale="log", xlabel="encode, GB/s, one thread", title=f"{kind}, fp32")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ratio")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


def _draw_kind(rows: list[dict[str, Any]], panel: Any) -> None:
    ours = [row for row in rows if row["coding"].removeprefix("asyncsave, level ").isdigit()]
    # of other bytes, so of other ratios: a line of their own
    for sampled, style in ((False, ".-"), (True, ".:")):
        line = [row for row in ours if row["sampled"] is sampled]
        panel.plot(
            [row["encode"]["median"] for row in line],
            [row["ratio"] for row in line],
            style,
            color="tab:blue",
            label="asyncsave, by level" + (", of a sample" if sampled else ""),
        )
    for row in ours:
        level = row["coding"].rpartition(" ")[2]
        if level in ("1", "4", "6", "9", "12", "15", "19", "22"):
            place = (row["encode"]["median"], row["ratio"])
            panel.annotate(level, place, (3, 4), textcoords="offset points", color="tab:blue")
    for row, marker in zip([row for row in rows if row not in ours], "sD^vPX", strict=False):
        place = (row["encode"]["median"], row["ratio"])
        panel.plot(*place, marker, label=row["coding"], markersize=7)


def _typical(results: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return the warm cycle of a way whose loss is the median one."""
    cycles = [cycle for cycle in results["cycles"] if cycle["way"] == name and cycle["round"]]
    plain: float = results["plain_step_seconds"]
    cycles.sort(key=lambda cycle: cycle["cycle_seconds"] - cycle["steps"] * plain)
    return cycles[len(cycles) // 2] if cycles else None
