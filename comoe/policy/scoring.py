"""What a predictor is worth: recall, bytes wasted, and the only figure that counts, time saved.

Time saved is that of the simulator: seconds per token without reading ahead less those with it, for the same
cache policy. A guess that is right but resident anyway, or that comes too late, saves nothing; a wrong
one delays demand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from comoe.policy.cache import CachePolicy
from comoe.policy.costs import Costs
from comoe.policy.plan import Plan, Sizes
from comoe.policy.predictor import NoPredictor, Predictor, PrefetchGauge
from comoe.policy.simulator import Result, Simulator

if TYPE_CHECKING:
    from comoe.trace import Trace


@dataclass(frozen=True)
class Score:
    """recall: share of the experts used that were predicted before their layer ran.  precision: share of
    the predicted that were used.  wasted_bytes: read ahead and not used, per token.  saved: seconds per
    token; below 0 where reading ahead cost time.  gated: the same where it switches itself off."""

    recall: float
    precision: float
    wasted_bytes: float
    saved: float
    gated_wasted_bytes: float
    gated_saved: float


class AlwaysOn(PrefetchGauge):
    """Counts like the gauge of production, but never finds that reading ahead does not pay."""

    @property
    def useful(self) -> bool:
        return True


def score_predictors(
    predictors: dict[str, Callable[[], Predictor]],
    sizes: Sizes,
    costs: Costs,
    plan: Plan,
    trace: Trace,
    cache: Callable[[], CachePolicy],
) -> dict[str, Score]:
    """Each predictor by itself over the whole trace, always reading ahead, and as it is used."""

    def replay(predictor: Predictor, gauge: PrefetchGauge | None) -> tuple[Result, PrefetchGauge]:
        simulator = Simulator(
            sizes, costs, plan, trace=trace, cache=cache(), predictor=predictor, gauge=gauge
        )
        return simulator.run(), simulator.gauge

    without, _ = replay(NoPredictor(), None)
    scores = {}
    for name, make in predictors.items():
        always, gauge = replay(make(), AlwaysOn())
        gated, _ = replay(make(), None)
        stats = gauge.stats()
        scores[name] = Score(
            stats["recall"],
            stats["precision"],
            always.summary()["wasted_per_token"],
            float(without.token_time.mean() - always.token_time.mean()),
            gated.summary()["wasted_per_token"],
            float(without.token_time.mean() - gated.token_time.mean()),
        )
    return scores
