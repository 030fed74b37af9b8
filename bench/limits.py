"""The tables of docs/performance.md from the rows of bench/results: floor, measured value and gap of each path.

python bench/limits.py     # rewrites what lies between the page's markers; measures nothing
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from peers_judge import judge
from roofline import decode_points, prefill_points, rows_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
HELD_DISK = 1.2e9  # bytes/s; below it the disk was held back
NO_ROWS = "No rows yet."


def markdown(header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return NO_ROWS
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def kernels() -> str:
    """Share of memory's rate at T = 1 / 2 / 4 rows per expert, in both states of memory."""
    points = decode_points()
    rows = []
    for level in ("exact", "bits8", "bits4", "bits3", "bits2", "fp8", "mxfp4"):
        for hidden, intermediate in ((2048, 768), (768, 3072)):
            cells = []
            for state in ("slow", "fast"):
                shares = [points.get((level, hidden, t, state)) for t in (1, 2, 4)]
                told = " / ".join("-" if p is None else f"{p['share'] * 100:.0f}" for p in shares)
                cells.append("-" if not any(shares) else told + " %")
            rows.append([level, f"{hidden} x {intermediate}", *cells])
    return markdown(["level", "H x I", "memory at 26 to 35 GB/s", "at 43 to 50 GB/s"], rows)


def prefill() -> str:
    points = prefill_points()
    rows = []
    for level, hidden in dict.fromkeys(key[:2] for key in points):
        found = [points[level, hidden, t] for t in (64, 512) if (level, hidden, t) in points]
        speeds = " / ".join(f"{p['gflops']:.0f}" for p in found)
        shares = " / ".join(f"{p['share'] * 100:.0f}" for p in found)
        unpacking = " / ".join(f"{p['unpacking'] * 100:.0f}" for p in found)
        rows.append([level, str(hidden), speeds, f"{shares} %", f"{unpacking} %"])
    return markdown(["level", "H", "GFLOP/s", "of the matmul alone", "time spent unpacking"], rows)


def disk() -> str:
    rows = rows_of("disk")
    newest = rows[-1]["commit"]
    return markdown(
        ["reader", "GB/s", "of the best raw reader"],
        [
            [row["reader"], row["gb_per_s"], percent(float(row["share_of_best_raw"]))]
            for row in rows
            if row["commit"] == newest
        ],
    )


def offload() -> str:
    """The newest commit's rows: exact decoding with a third resident over its floor."""
    rows = [row for row in rows_of("offload") if row["text"] == "random"]
    newest = rows[-1]["commit"]
    table = []
    for name, held in (("the disk held at 1 GB/s", True), ("the disk as it is", False)):
        found = [
            row
            for row in rows
            if row["commit"] == newest and (float(row["disk_bandwidth"]) < HELD_DISK) == held
        ]
        if not found:
            continue
        values = {
            name: statistics.median(float(row[name]) for row in found)
            for name in ("ratio", "seconds_per_token", "floor", "compute", "disk", "recall")
        }
        table.append(
            [name, str(len(found))]
            + [
                f"{values[n] * 1e3:.0f} ms"
                for n in ("compute", "disk", "floor", "seconds_per_token")
            ]
            + [f"{values['recall']:.2f}", f"{values['ratio']:.2f}x"]
        )
    return markdown(
        ["", "repeats", "C", "D", "floor", "measured", "r", "over the floor"],
        table,
    )


# ---- bench/peers.py --------------------------------------------------------------------------------------------


def judged() -> dict[str, Any]:
    from peers import known_peers

    try:
        rows = rows_of("peers")
    except FileNotFoundError:
        return {"rows": [], "goals": []}
    return judge([row for row in rows if row["run"] == rows[-1]["run"]], known_peers())


def peers_cases(found: dict[str, Any]) -> str:
    parts = []
    for case in dict.fromkeys(row["case"] for row in found["rows"]):
        if case == "perplexity":
            continue
        rows = [row for row in found["rows"] if row["case"] == case]
        ceiling = next((row for row in rows if row["memory_bytes_per_second"]), None)
        title = f"**{case}**"
        if ceiling:
            title += (
                f" (memory read at {ceiling['memory_bytes_per_second'] / 1e9:.0f} GB/s, "
                f"the disk at {ceiling['disk_bytes_per_second'] / 1e9:.1f} GB/s)"
            )
        table = []
        for row in rows:
            if row is ceiling or row["memory_bytes_per_second"]:
                continue
            shown = [cell or "-" for cell in row["shown"][1:8]]
            if row["error"]:
                shown[0] = row["error"].split(":")[0]
            table.append([row["peer"], *shown])
        header = ["", "decode/s", "prefill/s", "MoE ms", "experts ms", "peak GB", "RSS GB", "perplexity"]  # fmt: skip
        parts += [title, markdown(header, table)]
    return "\n\n".join(parts) or NO_ROWS


def peers_goals(found: dict[str, Any]) -> str:
    return markdown(
        ["goal", "", "measured"],
        [[goal["goal"], goal["verdict"], goal["figures"]] for goal in found["goals"]],
    )


def page(text: str) -> str:
    """The page with its tables made anew."""
    found = judged()
    parts = {
        "kernels": kernels(),
        "prefill": prefill(),
        "disk": disk(),
        "offload": offload(),
        "peers": peers_cases(found),
        "goals": peers_goals(found),
    }
    for name, table in parts.items():
        begin, end = f"<!-- figures: {name} -->", "<!-- end of figures -->"
        pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{PAGE.name} has no {begin}")
        text = pattern.sub(lambda _, t=table, b=begin: f"{b}\n{t}\n{end}", text)  # noqa: B023
    return text


def main() -> None:
    PAGE.write_text(page(PAGE.read_text()))
    print(PAGE)


if __name__ == "__main__":
    main()
