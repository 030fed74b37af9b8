"""Greedy or sampled text from a loaded model, token by token, with its figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class TokenStream:
    """A streamer for `model.generate`: passes text on as soon as it is certain, and notes when tokens
    came. The prompt, which generate puts first, is left out."""

    def __init__(
        self, tokenizer: Any, on_text: Callable[[str], None] | None = None, skip_prompt: bool = True
    ):
        self._tokenizer, self._on_text = tokenizer, on_text
        self._prompt_next = skip_prompt
        self._given = 0
        self.tokens: list[int] = []
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_next:
            self._prompt_next = False
            return
        self.tokens += value.reshape(-1).tolist()
        self.times.append(time.perf_counter())
        if self._on_text is not None:
            self._pass_on(final=False)

    def end(self) -> None:
        if self._on_text is not None:
            self._pass_on(final=True)

    def text(self) -> str:
        return self._tokenizer.decode(self.tokens, skip_special_tokens=True)

    def _pass_on(self, final: bool) -> None:
        text = self.text()
        # A character may lie across tokens: its first bytes decode to U+FFFD until the rest is here.
        stable = len(text) if final else len(text.rstrip("\ufffd"))
        if stable > self._given:
            self._on_text(text[self._given : stable])
            self._given = stable


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continues the prompt: {text, tokens, tokens_per_second, prompt_tokens, prefill_seconds, seconds}.

    tokens_per_second is of decoding: new tokens after the first, over the time from the first to the
    last; of a single token, 1 / seconds.  temperature 0 takes the likeliest token each time.
    """
    if max_tokens < 1:
        raise ValueError(f"generate: max_tokens: expected at least 1, got {max_tokens}")
    if temperature < 0:
        raise ValueError(f"generate: temperature: expected at least 0, got {temperature}")
    if not prompt:
        raise ValueError("generate: the prompt is empty; give some text to continue")
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError(
            "generate: the tokenizer makes no tokens of the prompt; is it this model's tokenizer?"
        )
    inputs.pop("token_type_ids", None)
    if seed is not None:
        torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    stream = TokenStream(tokenizer, on_text, skip_prompt=True)
    begin = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            **inputs, max_new_tokens=max_tokens, streamer=stream, pad_token_id=pad, **sampling
        )
    seconds, times = time.perf_counter() - begin, stream.times
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else len(times) / seconds
    return {
        "text": stream.text(),
        "tokens": stream.tokens,
        "tokens_per_second": rate,
        "prompt_tokens": int(inputs["input_ids"].shape[1]),
        "prefill_seconds": times[0] - begin if times else seconds,
        "seconds": seconds,
    }
