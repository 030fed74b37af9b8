"""What a memory budget costs in quality: perplexity, bits per byte, and how far the predictions move.

Everything is teacher-forced: the text is cut into windows, each token is predicted once from the true
text before it. Against the exact model (the original weights, bit for bit) two numbers are kept:

    kl              mean over tokens of KL(exact || budgeted), in nats
    top1_agreement  share of tokens for which both would choose the same next token

No logits are stored: of the first run only the last hidden states are kept, in a temporary file, and
the head that both runs share is applied to them a few positions at a time.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

LOGITS_BYTES = 32 << 20  # working set of the head: logits of a chunk of positions in float32
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Window:
    """ids[begin:end] is fed; the targets ids[first:end] are scored, those before are context."""

    begin: int
    first: int
    end: int


@dataclass
class Score:
    """Sums over scored tokens; kl: KL(this run || the other), kl_back: KL(the other || this run)."""

    tokens: int = 0
    nats: float = 0.0
    kl: float = 0.0
    kl_back: float = 0.0
    agreements: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats / self.tokens, 700.0))


def plan_windows(num_tokens: int, window: int = 512, context: int = 128) -> list[Window]:
    """Windows of at most `window` tokens that score every token but the first exactly once, each with
    at least `context` tokens before its first target (where the text has them)."""
    if window < 2 or not 0 <= context < window - 1:
        raise ValueError(
            f"plan_windows: expected window >= 2 and 0 <= context < window - 1, got {window} and {context}"
        )
    windows, first = [], 1
    while first < num_tokens:
        begin = max(0, first - 1 - context) if windows else 0
        end = min(begin + window, num_tokens)
        windows.append(Window(begin, first, end))
        first = end
    return windows


class Head:
    """The model's own way from last hidden states to logits, on a few positions at a time.

    The model's forward is run with its body replaced by the given hidden states, so scaling and
    capping of logits are whatever the model does.
    """

    def __init__(self, model: Any):
        self.model = model
        self.body = model.base_model
        if self.body is model:
            raise ValueError(
                f"evaluate: {type(model).__name__} has no base_model, so it has no language-model head; "
                "load it with AutoModelForCausalLM"
            )
        vocabulary = model.get_output_embeddings().weight.shape[0]
        self.chunk = max(1, LOGITS_BYTES // (4 * vocabulary))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[P, H] -> float32 [P, vocabulary]."""
        output = _BodyOutput(last_hidden_state=hidden[None])
        before = self.body.__dict__.get("forward")
        self.body.forward = lambda *args, **kwargs: output
        try:
            ids = torch.zeros((1, hidden.shape[0]), dtype=torch.int64, device=hidden.device)
            # forward, not __call__: hooks that mark a step of the real model must not see this.
            return self.model.forward(input_ids=ids, use_cache=False).logits[0].float()
        finally:
            del self.body.forward
            if before is not None:
                self.body.forward = before

    @contextmanager
    def hidden_of_body(self) -> Iterator[list[torch.Tensor]]:
        """Collects the last hidden states of the body's calls."""
        caught: list[torch.Tensor] = []

        def keep(module, args, output):
            caught.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

        handle = self.body.register_forward_hook(keep)
        try:
            yield caught
        finally:
            handle.remove()


class _BodyOutput(dict):
    """Stands for any model's output class: what was not given is None."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __getitem__(self, key):
        return (
            list(self.values())[key] if isinstance(key, (int, slice)) else super().__getitem__(key)
        )


def encode(tokenizer: Any, text: str, max_tokens: int | None = None) -> tuple[list[int], int]:
    """(token ids, bytes of the text that all tokens but the first stand for)."""
    if not text:
        raise ValueError("evaluate: the text is empty")
    encoded = tokenizer(
        text, return_offsets_mapping=bool(getattr(tokenizer, "is_fast", False)), verbose=False
    )
    ids = list(encoded["input_ids"])[:max_tokens]
    if len(ids) < 2:
        raise ValueError(
            f"evaluate: expected a text of at least 2 tokens, got {len(ids)}; give a longer text"
        )
    offsets = encoded.get("offset_mapping")
    if offsets is None:
        return ids, len(tokenizer.decode(ids[1:]).encode())
    begin, end = offsets[0][1], max(offset[1] for offset in offsets[: len(ids)])
    return ids, len(text[begin:end].encode())


@torch.inference_mode()
def score(
    model: Any,
    ids: list[int],
    windows: list[Window],
    *,
    keep: Any = None,
    against: Any = None,
    progress: Progress | None = None,
) -> Score:
    """Runs a causal language model over the windows.

    keep: binary file that gets the last hidden states of scored positions.  against: such a file of a
    run of the same model over the same windows; `kl` is then KL(this run || that run).
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError("evaluate: needs a causal language model; this one is an encoder-decoder")
    head, total = Head(model), Score()
    device = model.get_input_embeddings().weight.device
    for number, window in enumerate(windows):
        span = torch.tensor(ids[window.begin : window.end], device=device)
        with head.hidden_of_body() as caught:
            last = (
                model(input_ids=span[None], use_cache=False, logits_to_keep=1).logits[0, -1].float()
            )
        hidden = caught[-1][0, window.first - 1 - window.begin : -1]
        if number == 0:
            _check_head(head, caught[-1][0, -1:], last)
        caught.clear()
        targets = span[window.first - window.begin :]
        for begin in range(0, len(targets), head.chunk):
            part = hidden[begin : begin + head.chunk]
            _add(total, head, part, targets[begin : begin + head.chunk], against)
            if keep is not None:
                keep.write(part.contiguous().view(torch.uint8).numpy().tobytes())
        if progress is not None:
            progress(window.end, windows[-1].end)
    return total


def _add(
    total: Score, head: Head, hidden: torch.Tensor, targets: torch.Tensor, against: Any
) -> None:
    logp = head(hidden).log_softmax(-1)
    total.tokens += len(targets)
    total.nats -= float(logp.gather(-1, targets[:, None]).sum(dtype=torch.float64))
    if against is None:
        return
    nbytes = hidden.numel() * hidden.element_size()
    raw = against.read(nbytes)
    if len(raw) != nbytes:
        raise ValueError("evaluate: the two runs differ in length or dtype")
    other = torch.frombuffer(bytearray(raw), dtype=hidden.dtype).reshape(hidden.shape)
    other_logp = head(other).log_softmax(-1)
    total.agreements += int((logp.argmax(-1) == other_logp.argmax(-1)).sum())
    total.kl += _divergence(logp, other_logp)
    total.kl_back += _divergence(other_logp, logp)


def _divergence(logp: torch.Tensor, logq: torch.Tensor) -> float:
    """Sum of KL(p || q) over positions."""
    # A probability of 0 adds nothing, also where the other's logarithm is -inf.
    p = logp.exp()
    terms = torch.where(p > 0, p * (logp - logq), torch.zeros_like(p))
    return float(terms.sum(dtype=torch.float64))


def _check_head(head: Head, hidden: torch.Tensor, expected: torch.Tensor) -> None:
    got = head(hidden)[0]
    if not torch.allclose(got, expected, rtol=0.02, atol=0.02 * float(expected.abs().max())):
        raise ValueError(
            f"evaluate: the head of {type(head.model).__name__} gives other logits on its own than in the "
            f"model (difference {float((got - expected).abs().max()):.3g}); this model cannot be evaluated"
        )


def evaluate(
    load: Callable[[bool], Any],
    tokenizer: Any,
    text: str,
    *,
    exact: bool = False,
    window: int = 512,
    context: int = 128,
    max_tokens: int | None = None,
    reference: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluates the model that `load(exact)` gives, against load(True); the first is closed before.

    exact: the model to evaluate is itself the exact one (kl 0, agreement 1).  reference=False: no
    second run (kl and top1_agreement are None).  Returns `perplexity, bits_per_byte, kl,
    top1_agreement, perplexity_exact, tokens, bytes` and, of a model under a budget, its stats() after
    the run under "stats".
    """
    ids, num_bytes = encode(tokenizer, text, max_tokens)
    windows = plan_windows(len(ids), window, context)
    compare = reference and not exact
    with tempfile.TemporaryFile(prefix="comoe-eval-") as kept:
        model = load(exact)
        budgeted = score(model, ids, windows, keep=kept if compare else None, progress=progress)
        runtime = getattr(model, "comoe", None)
        stats = runtime.stats() if runtime is not None else {}
        if runtime is not None and compare:
            runtime.close()
        if compare:
            # The next model must not share memory with this one.
            del model, runtime
            kept.seek(0)
            truth = score(load(True), ids, windows, against=kept, progress=progress)
        else:
            truth = budgeted
    same = exact and reference
    return {
        "perplexity": budgeted.perplexity,
        "bits_per_byte": budgeted.nats / math.log(2) / max(num_bytes, 1),
        "kl": truth.kl / truth.tokens if compare else 0.0 if same else None,
        "top1_agreement": truth.agreements / truth.tokens if compare else 1.0 if same else None,
        "perplexity_exact": truth.perplexity if compare or exact else None,
        "tokens": budgeted.tokens,
        "bytes": num_bytes,
        "stats": stats,
    }
