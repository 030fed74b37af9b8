"""The rows of bench/peers.py as one table per case, and the goals judged from their medians."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

NUMBERS = (
    "decode_tokens_per_second",
    "prefill_tokens_per_second",
    "moe_seconds_per_token",
    "experts_seconds_per_token",
    "perplexity",
    "cgroup_peak",
    "rss_peak",
    "bits_per_weight",
    "read_bytes_per_token",
    "memory_bytes_per_second",
    "disk_bytes_per_second",
)
GOOD_RUNGS = 1.01  # of the exact model's perplexity


def judge(rows: list[dict[str, str]], peers: Mapping[str, Any]) -> dict[str, Any]:
    """{"rows": medians over the repeats, "goals": {goal, verdict, figures} each}. Rows: of one run, as in the CSV."""
    found = [
        _median([row for row in rows if (row["case"], row["peer"]) == key])
        for key in dict.fromkeys((row["case"], row["peer"]) for row in rows)
    ]
    quality = {row["peer"]: row["perplexity"] for row in found if row["perplexity"] is not None}
    for row in found:
        peer = peers.get(row["peer"])
        row["perplexity"] = quality.get(peer.quality or peer.name if peer else row["peer"])
        row["shown"] = _shown(row)
    return {"rows": found, "goals": Goals(found, quality).all()}


def _median(rows: list[dict[str, str]]) -> dict[str, Any]:
    out: dict[str, Any] = {"case": rows[0]["case"], "peer": rows[0]["peer"]}
    out["error"], out["ran"] = rows[-1]["error"], rows[-1]["ran"]
    good = [row for row in rows if not row["error"]]
    for name in NUMBERS:
        values = [float(row[name]) for row in good if row[name]]
        out[name] = statistics.median(values) if values else None
    return out


def _shown(row: dict[str, Any]) -> list[str]:
    def number(name: str, digits: int, scale: float = 1.0) -> str:
        return "" if row[name] is None else f"{row[name] * scale:.{digits}f}"

    told = row["error"]
    if row["memory_bytes_per_second"]:
        told = f"memory {number('memory_bytes_per_second', 1, 1e-9)} GB/s, disk {number('disk_bytes_per_second', 2, 1e-9)} GB/s"
    return [
        row["peer"],
        number("decode_tokens_per_second", 2),
        number("prefill_tokens_per_second", 0),
        number("moe_seconds_per_token", 2, 1e3),
        number("experts_seconds_per_token", 2, 1e3),
        number("cgroup_peak", 2, 1e-9),
        number("rss_peak", 2, 1e-9),
        number("perplexity", 3),
        told,
    ]


class Goals:
    def __init__(self, rows: list[dict[str, Any]], quality: dict[str, float]):
        self.rows = {(row["case"], row["peer"]): row for row in rows}
        self.quality = quality
        self.exact = quality.get("transformers eager")

    def all(self) -> list[dict[str, str]]:
        return [
            self.blocks("moe_seconds_per_token", "MoE blocks, routers included"),
            self.blocks("experts_seconds_per_token", "experts alone"),
            self.ratio("whole tokens, 4 bits against Q4_K_M, all resident", "resident", "llama.cpp Q4_K_M", 0.7, self.four_bits),
            self.ratio("2 GiB: exact against llama.cpp's mmap of bf16", "2 GiB", "llama.cpp bf16", 3.0, self.exact_ones),
            self.ratio("2 GiB: rungs within 1 % of perplexity against the same", "2 GiB", "llama.cpp bf16", 12.0, self.good_ones),
            self.ratio("1 GiB: alive, against the same", "1 GiB", "llama.cpp bf16", 10.0, self.ours),
            self.ratio("half of the weights resident, perplexity at most the peer's, against bf16", "half of the weights", "llama.cpp bf16", 2.0, self.no_worse("llama.cpp bf16")),
            self.ratio("the same against Q8_0", "half of the weights", "llama.cpp Q8_0", 2.0, self.no_worse("llama.cpp Q8_0")),
            self.ratio("the same against Q4_K_M, which fits as a whole", "half of the weights", "llama.cpp Q4_K_M", 2.0, self.no_worse("llama.cpp Q4_K_M")),
        ]  # fmt: skip

    # ---- which of our rows may stand for a goal ----------------------------------------------------------------

    def ours(self, name: str) -> bool:
        return name.startswith("comoe")

    def exact_ones(self, name: str) -> bool:
        return name.startswith("comoe exact")

    def four_bits(self, name: str) -> bool:
        return name.startswith("comoe 4 bits")

    def good_ones(self, name: str) -> bool:
        """Rungs, not exact weights, whose perplexity is within 1 % of exact."""
        got = self._perplexity(name)
        known = got is not None and self.exact is not None
        return self.ours(name) and not self.exact_ones(name) and known and got <= GOOD_RUNGS * self.exact  # fmt: skip

    def no_worse(self, peer: str):
        def allowed(name: str) -> bool:
            got, theirs = self._perplexity(name), self.quality.get(peer)
            # bf16 sums in another order move the fourth digit.
            return self.ours(name) and got is not None and theirs is not None and got <= theirs * 1.0005  # fmt: skip

        return allowed

    def _perplexity(self, name: str) -> float | None:
        rows = (row for (_, peer), row in self.rows.items() if peer == name)
        return next((row["perplexity"] for row in rows), None)

    # ---- goals -------------------------------------------------------------------------------------------------

    def ratio(self, goal: str, case: str, rival: str, least: float, allowed) -> dict[str, str]:
        goal = f"{goal}, at least {least:g}x"
        theirs = self._decode(case, rival)
        mine = {name: self._decode(case, name) for _, name in self.rows if allowed(name)}
        mine = {name: speed for name, speed in mine.items() if speed}
        if theirs is None or not mine:
            return {"goal": goal, "verdict": "not known", "figures": "rows are missing"}
        best = max(mine, key=mine.get)
        got = mine[best] / theirs
        return {
            "goal": goal,
            "verdict": "met" if got >= least else "MISSED",
            "figures": f"{got:.2f}x ({best} {mine[best]:.2f}/s, {rival} {theirs:.2f}/s)",
        }

    def blocks(self, part: str, what: str) -> dict[str, str]:
        goal = f"{what}, 4 bits against Q4_K_M, all resident, at least 1x"
        theirs = self.rows.get(("resident", "llama.cpp Q4_K_M"), {}).get(part)
        mine = {
            name: row[part]
            for (case, name), row in self.rows.items()
            if case == "resident" and self.four_bits(name) and row[part]
        }
        if not theirs or not mine:
            return {"goal": goal, "verdict": "not known", "figures": "rows are missing"}
        best = min(mine, key=mine.get)
        got = theirs / mine[best]
        figures = f"{got:.2f}x ({best} {mine[best] * 1e3:.2f} ms, llama.cpp Q4_K_M {theirs * 1e3:.2f} ms a token)"
        return {"goal": goal, "verdict": "met" if got >= 1 else "MISSED", "figures": figures}

    def _decode(self, case: str, peer: str) -> float | None:
        return self.rows.get((case, peer), {}).get("decode_tokens_per_second")
