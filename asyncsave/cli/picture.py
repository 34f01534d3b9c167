"""What `tune` measured, as a table with bars for the terminal, and as a picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from asyncsave import TuneReport, TuneRow

_BAR_CELLS = 12


def show(report: TuneReport, console: Console, *, every_row: bool) -> None:
    """Print the table; the bars are of the time to durable.

    Args:
        every_row: all levels; else those that a decision is between: no compression, the soonest
            durable, the smallest, and the soonest that compresses.
    """
    rows = report.rows if every_row else _few(report)
    table = Table(
        title=f"{report.state_bytes / 1e9:.3g} GB of state, {report.encoders} "
        f"encoder{'s' if report.encoders > 1 else ''} "
        f"({report.kernel}), disk of {escape(str(report.directory))}",
        caption=_caption(report, len(report.rows) - len(rows)),
    )
    for name in ("level", "ratio", "encode GB/s", "CPU s", "durable s", ""):
        table.add_column(name, justify="left" if not name else "right")
    longest = max(row.durable_seconds for row in rows)
    for row in rows:
        speed = row.encode_bytes_per_second
        low, high = row.durable_range_seconds
        bar = "█" * max(1, round(_BAR_CELLS * row.durable_seconds / longest))
        marks = [
            mark
            for level, mark in ((report.best, "best here"), (report.smallest, "smallest"))
            if level == row.level
        ]
        table.add_row(
            f"{row.level}" + ("" if row.level else " (off)"),
            f"{row.ratio:.3f}",
            "–" if speed is None else f"{speed / 1e9:.2f}",
            f"{row.cpu_seconds:.2f}",
            f"{row.durable_seconds:.2f} [dim]{low:.2f} … {high:.2f}[/dim]",
            f"{bar} {', '.join(marks)}",
            style="bold" if row.level == report.best else None,
        )
    console.print(table)


def _few(report: TuneReport) -> list[TuneRow]:
    encoded = [row for row in report.rows if row.level]
    soonest = min(encoded, key=lambda row: row.durable_seconds).level if encoded else 0
    chosen = {0, report.best, report.smallest, soonest}
    return [row for row in report.rows if row.level in chosen]


def _caption(report: TuneReport, hidden: int) -> str:
    parts = ["time to durable: median, and smallest … largest"]
    if any(row.sample_bytes < report.state_bytes for row in report.rows):
        parts.append("measured on a sample of the state, and scaled up to the whole")
    if hidden:
        parts.append(f"{hidden} more levels were measured: --all shows them")
    if report.skipped:
        levels = ", ".join(map(str, report.skipped))
        parts.append(f"not enough time for level {levels}: give more --seconds")
    return "\n".join(parts)


def draw(report: TuneReport, path: Path) -> None:
    """Draw ratio and time to durable of every level.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    time, space = figure.subplots(1, 2)
    levels = [f"{row.level}" if row.level else "off" for row in report.rows]
    best = [row.level == report.best for row in report.rows]
    colors = ["#c0392b" if each else "#9fb6c9" for each in best]
    durable = [row.durable_seconds for row in report.rows]
    low = [row.durable_seconds - row.durable_range_seconds[0] for row in report.rows]
    high = [row.durable_range_seconds[1] - row.durable_seconds for row in report.rows]
    time.bar(levels, durable, color=colors, yerr=[low, high], ecolor="#555555", capsize=2)
    time.set(xlabel="level (red: best here)", ylabel="seconds to durable", yscale="log")
    space.bar(levels, [row.ratio for row in report.rows], color=colors)
    space.set(xlabel="level", ylabel="ratio", ylim=(0.98 * min(r.ratio for r in report.rows), None))
    figure.suptitle(f"{report.state_bytes / 1e9:.3g} GB of state on the disk of {report.directory}")
    figure.savefig(path, dpi=110, format="png")  # whatever the name ends in
