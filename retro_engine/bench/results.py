"""What a bench has measured, shown and kept: tables on the screen, JSON, CSV and a plot on disk."""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retro_engine.bench.frame import Measured, Row, Target


def write(name: str, measured: Measured, folder: Path, about: dict[str, Any]) -> None:
    """FOLDER/NAME.json and NAME.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"bench": name, **asdict(row)} for row in measured.rows]
    whole = {**about, **measured.facts, "rows": rows, "targets": targets_by_row(measured.targets)}
    (folder / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {"ratios": json.dumps(row["ratios"])})


def ratios_by_case(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Of the first implementation of each case that is compared with others: ours."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.ratios:
            found.setdefault(row.case, row.ratios)
    return found


def targets_by_row(targets: list[Target]) -> dict[str, dict[str, Any]]:
    assert len({target.row for target in targets}) == len(targets), "two targets are of the same name"
    return {t.row: {"value": t.value, "target": t.target, "holds": t.holds} for t in targets}


def table(rows: list[Row]) -> str:
    width = max(len(row.case) for row in rows) + 2
    lines = [
        f"{'case':{width}}{'implementation':22}{'median':>11}{'GB/s':>8}{'GFLOP/s':>9}{'share':>8}{'error':>9}  slower by"
    ]
    for row in rows:
        unit = f"{row.median_s * 1e3:.3f} ms" if row.median_s > 1e-4 else f"{row.median_s * 1e6:.1f} us"
        cells = [f"{x:.0f}" if x is not None else "" for x in (row.gb_s, row.gflop_s)]
        share = f"{row.ceiling_share:.0%}" if row.ceiling_share is not None else ""
        error = f"{row.error:.0e}" if row.error is not None else ""
        ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row.ratios.items())
        said = "; ".join(filter(None, (ratios, row.note)))
        lines.append(
            f"{row.case:{width}}{row.implementation:22}{unit:>11}{cells[0]:>8}{cells[1]:>9}{share:>8}{error:>9}  {said}"
        )
    return "\n".join(lines)


def target_table(targets: list[Target], is_busy: bool = False) -> str:
    """`is_busy`: other work ran meanwhile, so that no verdict counts."""
    width = max(len(target.row) for target in targets) + 2
    lines = [f"{'must reach':{width}}{'value':>10}{'target':>12}"]
    for t in targets:
        value = "-" if t.value is None else f"{t.value:,.3f}"
        said = "holds" if t.holds else "not measured" if t.value is None else "falls short"
        said += " (busy: measure again)" * (is_busy and t.value is not None)
        lines.append(f"{t.row:{width}}{value:>10}{'<=' if t.is_at_most else '>=':>4}{t.target:>8,g}  {said}")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Bars of the time of every implementation relative to ours, a group a case. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [row for row in rows if row.ratios]
    figure, axes = pyplot.subplots(figsize=(9, 0.5 + 0.7 * len(cases)), layout="constrained")
    places = []
    for number, row in enumerate(cases):
        for i, (name, ratio) in enumerate(row.ratios.items()):
            place = number + 0.8 * i / len(row.ratios)
            axes.barh(place, ratio, 0.7 / len(row.ratios), color=f"C{i}")
            axes.text(ratio, place, f" {name} {ratio:.1f}x", va="center", fontsize=7)
        places.append(number + 0.3)
    axes.set_yticks(places, [row.case for row in cases], fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("time of the alternative / time of this project's")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
