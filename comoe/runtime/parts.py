"""What the two halves of a runtime, placing experts and computing them, both work with."""

from __future__ import annotations

from dataclasses import dataclass

from comoe import _C
from comoe.config import CoMoEConfig
from comoe.policy.plan import Sizes
from comoe.runtime.engine import Records
from comoe.runtime.kept import Kept
from comoe.runtime.live import Live
from comoe.runtime.missing import MissHandler
from comoe.runtime.network import Network
from comoe.runtime.remote import Remote
from comoe.runtime.spec import ExpertsSpec


@dataclass
class Parts:
    """Made once, when the store is opened.

    sizes: of what the store has.  op: the kernels over pages.  policy: the native half of the policy.
    remote, network: None where everything lies on this machine.
    """

    config: CoMoEConfig
    specs: list[ExpertsSpec]
    sizes: Sizes
    engine: _C.Engine
    op: _C.MoeOp
    policy: _C.MoePolicy
    records: Records
    kept: Kept
    live: Live
    missing: MissHandler
    remote: Remote | None
    network: Network | None
