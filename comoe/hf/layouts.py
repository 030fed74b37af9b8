"""How classes of experts modules keep their weights and are called.

A layout turns a module's own tensors into canonical matrices (gate [I, H], up [I, H], down [H, I])
and back, and makes the module call the runtime. `InterfaceLayout` serves every family on transformers'
ExpertsInterface by the flags of its decorator; the others are families with a convention of their own.
Letters: T tokens, H hidden, I intermediate, E experts, K experts per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from comoe.hf.activations import match_activation
from comoe.runtime.spec import ExpertsSpec

# (hidden [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Expert:
    """One expert in canonical orientation."""

    matrices: tuple[torch.Tensor, ...]  # [gate,] up, down
    biases: tuple[torch.Tensor, ...] = ()  # the same order, or empty
    scales: tuple[torch.Tensor, ...] = ()  # of matrices that are codes, as a store holds them


def _numbers(module: nn.Module) -> tuple[float, ...]:
    values = (v for v in vars(module).values() if isinstance(v, (int, float)))
    return tuple(dict.fromkeys(float(v) for v in values if not isinstance(v, bool)))


class Layout:
    """One way of keeping and calling experts. Tensor names are relative to the experts module."""

    def matches(self, module: nn.Module) -> bool:
        raise NotImplementedError

    def spec(self, name: str, module: nn.Module) -> ExpertsSpec:
        raise NotImplementedError

    def parameter_names(self, module: nn.Module) -> tuple[str, ...]:
        return tuple(name for name, _ in module.named_parameters())

    def experts(self, spec: ExpertsSpec, module: nn.Module, tensors: Tensors) -> Iterator[Expert]:
        """Canonical matrices, expert by expert; views of `tensors` where possible."""
        raise NotImplementedError

    def assemble(
        self, spec: ExpertsSpec, module: nn.Module, experts: Sequence[Expert]
    ) -> dict[str, torch.Tensor]:
        """The module's own tensors from canonical matrices: the inverse of `experts`."""
        raise NotImplementedError

    def bind(self, module: nn.Module, run: Run) -> None:
        """Make `module(...)` call `run`."""
        raise NotImplementedError

    def unbind(self, module: nn.Module) -> None:
        module.__dict__.pop("forward", None)


class InterfaceLayout(Layout):
    """Fused 3-D tensors and `forward(hidden_states, top_k_index, top_k_weights)`.

    Also takes classes that are not decorated but have the very same tensors and call (Step-3.7).
    """

    ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")

    def matches(self, module: nn.Module) -> bool:
        if isinstance(getattr(module, "has_gate", None), bool) and hasattr(module, "is_transposed"):
            return True
        first = module._parameters.get("gate_up_proj")
        return (
            first is not None
            and first.dim() == 3
            and "down_proj" in module._parameters
            and getattr(module, "num_experts", None) == first.shape[0]
            and tuple(inspect.signature(type(module).forward).parameters)[1:] == self.ARGUMENTS
        )

    @staticmethod
    def _first(module: nn.Module) -> str:
        return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"

    def parameter_names(self, module: nn.Module) -> tuple[str, ...]:
        names = (self._first(module), "down_proj")
        if getattr(module, "has_bias", False):
            names += tuple(f"{name}_bias" for name in names)
        return names

    def spec(self, name: str, module: nn.Module) -> ExpertsSpec:
        gated = getattr(module, "has_gate", True)
        transposed = getattr(module, "is_transposed", False)
        known = set(self.parameter_names(module))
        others = [n for n, p in module._parameters.items() if p is not None and n not in known]
        missing = [n for n in known if module._parameters.get(n) is None]
        if others or missing:
            raise ValueError(
                f"{name} ({type(module).__name__}): expected parameters {sorted(known)}, "
                f"missing {missing}, unknown {others}"
            )
        num_experts, rows, cols = module._parameters[self._first(module)].shape
        if transposed:
            rows, cols = cols, rows
        apply_gate = self._canonical_gate(module, gated)
        activation, alpha, limit = match_activation(
            apply_gate, gated=gated, numbers=_numbers(module)
        )
        post_norm = None
        if getattr(module, "has_post_expert_norm", False):
            post_norm = module.post_expert_norm
        return ExpertsSpec(
            name=name,
            num_experts=num_experts,
            hidden=cols,
            intermediate=rows // 2 if gated else rows,
            gated=gated,
            biased=getattr(module, "has_bias", False),
            activation=activation,
            alpha=alpha,
            limit=limit,
            apply_gate=apply_gate,
            post_norm=post_norm,
        )

    @staticmethod
    def _canonical_gate(module: nn.Module, gated: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        if not gated:
            return module.act_fn
        if getattr(module, "is_concatenated", True):
            return module._apply_gate if hasattr(module, "_apply_gate") else _default_gate(module)

        def interleaved(x: torch.Tensor) -> torch.Tensor:
            gate, up = x.chunk(2, dim=-1)
            return module._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))

        return interleaved

    def experts(self, spec: ExpertsSpec, module: nn.Module, tensors: Tensors) -> Iterator[Expert]:
        transposed = getattr(module, "is_transposed", False)
        first, last = tensors[self._first(module)], tensors["down_proj"]
        for e in range(spec.num_experts):
            fused, down = first[e], last[e]
            if transposed:
                fused, down = fused.T, down.T
            biases: tuple[torch.Tensor, ...] = ()
            if spec.biased:
                fused_bias = tensors[f"{self._first(module)}_bias"][e]
                biases = (*self._halves(module, spec, fused_bias), tensors["down_proj_bias"][e])
            yield Expert((*self._halves(module, spec, fused), down), biases)

    @staticmethod
    def _halves(module: nn.Module, spec: ExpertsSpec, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not spec.gated:
            return (x,)
        if getattr(module, "is_concatenated", True):
            return x[: spec.intermediate], x[spec.intermediate :]
        return x[::2], x[1::2]

    def assemble(
        self, spec: ExpertsSpec, module: nn.Module, experts: Sequence[Expert]
    ) -> dict[str, torch.Tensor]:
        def fuse(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            if not spec.gated:
                return parts[0]
            if getattr(module, "is_concatenated", True):
                return torch.cat(list(parts))
            return torch.stack(list(parts), dim=1).flatten(0, 1)

        transposed = getattr(module, "is_transposed", False)
        first = torch.stack([fuse(e.matrices[:-1]) for e in experts])
        down = torch.stack([e.matrices[-1] for e in experts])
        if transposed:
            first, down = first.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        out = {self._first(module): first, "down_proj": down}
        if spec.biased:
            out[f"{self._first(module)}_bias"] = torch.stack([fuse(e.biases[:-1]) for e in experts])
            out["down_proj_bias"] = torch.stack([e.biases[-1] for e in experts])
        return out

    def bind(self, module: nn.Module, run: Run) -> None:
        # A decorated class finds "comoe" through its config (see attach.py); only a class that is
        # not decorated needs a forward of its own.
        if not hasattr(module, "is_transposed"):
            module.forward = run


def _default_gate(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return module.act_fn(gate) * up

    return apply


class IdentityExpertsLayout(InterfaceLayout):
    """LongCat-Flash: indices E and above are experts without weights that return their input.

    `gate_up_proj` has rows for them too, which nothing reads.
    """

    def matches(self, module: nn.Module) -> bool:
        return (
            hasattr(module, "zero_expert_num")
            and hasattr(module, "identity_expert")
            and module._parameters.get("gate_up_proj") is not None
        )

    def spec(self, name: str, module: nn.Module) -> ExpertsSpec:
        spec = super().spec(name, module)
        return ExpertsSpec(**{**vars(spec), "num_experts": module.num_routed_experts})

    def assemble(
        self, spec: ExpertsSpec, module: nn.Module, experts: Sequence[Expert]
    ) -> dict[str, torch.Tensor]:
        out = super().assemble(spec, module, experts)
        first = out["gate_up_proj"]
        unread = first.new_zeros(module.zero_expert_num, *first.shape[1:])
        return {**out, "gate_up_proj": torch.cat([first, unread])}

    def bind(self, module: nn.Module, run: Run) -> None:
        num_experts = module.num_routed_experts

        def forward(hidden_states, top_k_index, top_k_weights):
            identity = (top_k_weights * (top_k_index >= num_experts)).sum(-1, keepdim=True)
            return run(hidden_states, top_k_index, top_k_weights) + (hidden_states * identity).to(
                hidden_states.dtype
            )

        module.forward = forward


class LinearPairLayout(Layout):
    """Switch Transformers and NLLB-MoE: a ModuleDict of two-layer networks."""

    PAIRS = (("wi", "wo"), ("fc1", "fc2"))
    SWITCH_ARGUMENTS = ("hidden_states", "selected_experts", "routing_weights")

    def matches(self, module: nn.Module) -> bool:
        return (
            isinstance(module, nn.ModuleDict) and "expert_0" in module and bool(self._pair(module))
        )

    def _pair(self, module: nn.Module) -> tuple[str, str] | None:
        expert = module["expert_0"]
        for pair in self.PAIRS:
            if all(isinstance(getattr(expert, name, None), nn.Linear) for name in pair):
                return pair
        return None

    def spec(self, name: str, module: nn.Module) -> ExpertsSpec:
        up, down = self._pair(module)
        expert = module["expert_0"]
        intermediate, hidden = getattr(expert, up).weight.shape
        activation, alpha, limit = match_activation(expert.act, gated=False)
        return ExpertsSpec(
            name=name,
            num_experts=module.num_experts,
            hidden=hidden,
            intermediate=intermediate,
            gated=False,
            biased=getattr(expert, down).bias is not None,
            activation=activation,
            alpha=alpha,
            limit=limit,
            apply_gate=expert.act,
        )

    def experts(self, spec: ExpertsSpec, module: nn.Module, tensors: Tensors) -> Iterator[Expert]:
        pair = self._pair(module)
        for e in range(spec.num_experts):
            matrices = tuple(tensors[f"expert_{e}.{name}.weight"] for name in pair)
            biases = ()
            if spec.biased:
                biases = tuple(tensors[f"expert_{e}.{name}.bias"] for name in pair)
            yield Expert(matrices, biases)

    def assemble(
        self, spec: ExpertsSpec, module: nn.Module, experts: Sequence[Expert]
    ) -> dict[str, torch.Tensor]:
        out = {}
        for e, expert in enumerate(experts):
            for i, name in enumerate(self._pair(module)):
                out[f"expert_{e}.{name}.weight"] = expert.matrices[i]
                if spec.biased:
                    out[f"expert_{e}.{name}.bias"] = expert.biases[i]
        return out

    def bind(self, module: nn.Module, run: Run) -> None:
        if tuple(inspect.signature(type(module).forward).parameters)[1:] == self.SWITCH_ARGUMENTS:
            module.forward = _switch_forward(run, module.num_experts)
            return
        # NLLB's own forward stays, and finds the runtime in place of each expert.
        for e in range(module.num_experts):
            module[f"expert_{e}"].forward = _one_expert(run, e)

    def unbind(self, module: nn.Module) -> None:
        super().unbind(module)
        for e in range(module.num_experts):
            module[f"expert_{e}"].__dict__.pop("forward", None)


def _switch_forward(run: Run, num_experts: int) -> Callable[..., torch.Tensor]:
    def forward(hidden_states, selected_experts, routing_weights):
        # selected_experts: one-hot [T, 1, E], all zero for a token over its expert's capacity
        index = torch.where(selected_experts.any(-1), selected_experts.argmax(-1), num_experts)
        return run(hidden_states, index, routing_weights)

    return forward


def _one_expert(run: Run, expert: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x):
        index = torch.full((x.shape[0], 1), expert, device=x.device)
        return run(x, index, torch.ones_like(index, dtype=x.dtype))

    return forward


class SortedRowsLayout(Layout):
    """Llama 4: every expert gets T rows, scaled by the router beforehand; rows not routed are zero."""

    def matches(self, module: nn.Module) -> bool:
        first = module._parameters.get("gate_up_proj")
        return (
            first is not None
            and hasattr(module, "expert_dim")
            and tuple(inspect.signature(type(module).forward).parameters)[1:] == ("hidden_states",)
        )

    def spec(self, name: str, module: nn.Module) -> ExpertsSpec:
        num_experts, hidden, rows = module.gate_up_proj.shape
        gate = _default_gate(module)
        activation, alpha, limit = match_activation(gate, gated=True)
        return ExpertsSpec(
            name=name,
            num_experts=num_experts,
            hidden=hidden,
            intermediate=rows // 2,
            activation=activation,
            alpha=alpha,
            limit=limit,
            apply_gate=gate,
        )

    def experts(self, spec: ExpertsSpec, module: nn.Module, tensors: Tensors) -> Iterator[Expert]:
        for fused, down in zip(tensors["gate_up_proj"], tensors["down_proj"], strict=True):
            gate, up = fused.T[: spec.intermediate], fused.T[spec.intermediate :]
            yield Expert((gate, up, down.T))

    def assemble(
        self, spec: ExpertsSpec, module: nn.Module, experts: Sequence[Expert]
    ) -> dict[str, torch.Tensor]:
        first = torch.stack([torch.cat(e.matrices[:2]).T for e in experts])
        return {"gate_up_proj": first, "down_proj": torch.stack([e.matrices[2].T for e in experts])}

    def bind(self, module: nn.Module, run: Run) -> None:
        num_experts = module.num_experts

        def forward(hidden_states):
            rows = hidden_states.view(num_experts, -1, hidden_states.shape[-1])
            # No bias and act(0) * 0 = 0: a zero row has a zero output, so only the others are run.
            expert, token = torch.where(rows.ne(0).any(-1))
            index = expert[:, None]
            out = torch.zeros_like(rows)
            weights = torch.ones(index.shape, dtype=hidden_states.dtype, device=index.device)
            out[expert, token] = run(rows[expert, token], index, weights)
            return out.view(-1, hidden_states.shape[-1])

        module.forward = forward


class DbrxLayout(Layout):
    """DBRX: three 2-D tensors [E * I, H] in a child `mlp`; `w2` is the transposed down projection."""

    NAMES = ("mlp.w1", "mlp.v1", "mlp.w2")

    def matches(self, module: nn.Module) -> bool:
        mlp = getattr(module, "mlp", None)
        return mlp is not None and all(
            mlp._parameters.get(name[4:]) is not None for name in self.NAMES
        )

    def spec(self, name: str, module: nn.Module) -> ExpertsSpec:
        def gate(x: torch.Tensor) -> torch.Tensor:
            left, right = x.chunk(2, dim=-1)
            return module.mlp.activation_fn(left) * right

        activation, alpha, limit = match_activation(gate, gated=True)
        rows, hidden = module.mlp.w1.shape
        return ExpertsSpec(
            name=name,
            num_experts=module.num_experts,
            hidden=hidden,
            intermediate=rows // module.num_experts,
            activation=activation,
            alpha=alpha,
            limit=limit,
            apply_gate=gate,
        )

    def experts(self, spec: ExpertsSpec, module: nn.Module, tensors: Tensors) -> Iterator[Expert]:
        shape = (spec.num_experts, spec.intermediate, spec.hidden)
        for w1, v1, w2 in zip(*(tensors[name].view(shape) for name in self.NAMES), strict=True):
            yield Expert((w1, v1, w2.T))

    def assemble(
        self, spec: ExpertsSpec, module: nn.Module, experts: Sequence[Expert]
    ) -> dict[str, torch.Tensor]:
        parts = zip(
            *((e.matrices[0], e.matrices[1], e.matrices[2].T) for e in experts), strict=True
        )
        return {name: torch.cat(list(part)) for name, part in zip(self.NAMES, parts, strict=True)}

    def bind(self, module: nn.Module, run: Run) -> None:
        def forward(hidden_states, top_k_index, top_k_weights):
            flat = hidden_states.reshape(-1, hidden_states.shape[-1])
            out = run(flat, top_k_index, top_k_weights)
            return out.view(hidden_states.shape[0], -1, hidden_states.shape[-1])

        module.forward = forward


LAYOUTS: tuple[Layout, ...] = (
    IdentityExpertsLayout(),
    InterfaceLayout(),
    LinearPairLayout(),
    SortedRowsLayout(),
    DbrxLayout(),
)


def find_layout(module: nn.Module) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.matches(module)), None)
