"""One token through the model in fixed shapes, so that a CUDA graph can replay it: no launch, no wait.

A small model's step on a GPU takes less time than Python needs to launch its two hundred kernels. B rows, V
``vocab_size``.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.kv_cache import KVCache

# positions that a step attends over, filled or not; doubled when they are full, so few graphs are captured
FIRST_WIDTH = 256


class DecodingStep:
    """A model's step over a cache that the prompts have filled.

    On CUDA the first step of each width runs as it is, which warms up what a capture must not, and is then
    captured; where that fails, or cannot be, this is said once and all steps run as the first.
    The plain path may take over the cache at any time.

    Args:
        cache: Its ``length`` positions are read, and it grows with each step.
        padding: ``(B,)``, see :meth:`GPTModel.features`.
        compiled: Whether the step is compiled first, which takes half a minute and more a width, and fuses
            its small kernels.

    Attributes:
        largest: ``(B,)``, of the logits of the last call; which the next one overwrites too.
        likeliest: ``(B,)``, the ids of these, of equal ones the lowest.
    """

    largest: Tensor
    likeliest: Tensor

    def __init__(
        self, model: GPTModel, cache: KVCache, padding: Tensor | None, *, compiled: bool = False
    ) -> None:
        device = cache.keys[0].device
        self._model = model
        self._cache = cache
        self._padding = padding
        self._tokens = torch.zeros(len(cache.keys[0]), dtype=torch.int64, device=device)
        # what no token has filled is masked, but 0 × NaN would still be NaN
        for tensor in (*cache.keys, *cache.values):
            tensor[:, :, cache.length :] = 0
        self._static = KVCache(cache.keys, cache.values)
        self._static.at = torch.full((1,), cache.length, dtype=torch.int64, device=device)
        self._run: Callable[[], tuple[Tensor, Tensor, Tensor]] = self._forward
        if compiled:  # on a GPU a product with one row as a kernel of its own, with what is before and after it
            tuned: dict[str, Any] = {"coordinate_descent_tuning": device.type == "cuda"}
            self._run = torch.compile(self._forward, dynamic=False, options=tuned)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._found: tuple[Tensor, Tensor, Tensor] | None = None
        obstacle = obstacle_to_capture(model)
        self._captures = obstacle is None
        if obstacle is not None:
            _say_once(obstacle)

    def __call__(self, last: Tensor) -> Tensor:
        """The newest ids ``(B,)`` → the next tokens' logits ``(B, V)``, which the next call overwrites.

        Of a row that has ended the id is below 0, and its logits mean nothing.
        """
        cache = self._cache
        if cache.length >= self._static.width:
            self.close()  # a graph's widths are its own
            self._static.width = _width(cache.length + 1, cache.max_length)
        self._tokens.copy_(last)
        cache.length += 1
        if self._graph is not None:
            self._graph.replay()
            assert self._found is not None
            logits, self.largest, self.likeliest = self._found
            return logits
        logits, self.largest, self.likeliest = self._run()
        if self._captures:
            self._capture()
        return logits

    @property
    def is_captured(self) -> bool:
        """Whether the next step of this width replays a graph."""
        return self._graph is not None

    def close(self) -> None:
        """Let go of the graph, after its last replay is done."""
        if self._graph is not None:
            torch.cuda.synchronize(self._tokens.device)
            self._graph = self._found = None

    def _forward(self) -> tuple[Tensor, Tensor, Tensor]:
        model, cache, padding = self._model, self._static, self._padding
        position = cache.at
        assert position is not None
        columns = torch.arange(cache.width, device=position.device)
        seen = (columns <= position)[None]  # (1, width)
        positions = position
        if padding is not None:
            seen = seen & (columns >= padding[:, None])  # (B, width)
            positions = (position - padding)[:, None]  # (B, 1)
        x = model.tok_emb(self._tokens.clamp(min=0)[:, None]) + model.pos_emb(positions)
        # kernels for a mask read it as numbers of the queries' kind
        mask = torch.zeros(seen.shape, dtype=x.dtype, device=x.device)
        mask = mask.masked_fill(~seen, -torch.inf)[:, None, None]  # (B or 1, 1, 1, width)
        for block in model.trf_blocks:
            x = block(x, cache, mask)
        logits = model.head(model.final_norm(x)[:, -1])
        position.add_(1)
        return logits, logits.amax(dim=-1), logits.argmax(dim=-1)

    def _capture(self) -> None:
        device = self._tokens.device
        stream = torch.cuda.current_stream(device)
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads, which copy batches to the GPU, may go on meanwhile
            with (
                torch.cuda.device(device),
                torch.cuda.graph(
                    graph, stream=_capture_stream(device), capture_error_mode="thread_local"
                ),
            ):
                found = self._run()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a capture that fails does not give it back
            self._captures = False
            _say_once(str(error).splitlines()[0] if str(error) else type(error).__name__)
            return
        self._graph, self._found = graph, found


def padded_length(length: int) -> int:
    """Of a cache for ``length`` positions, such that the kernels find its widths aligned."""
    return -(-length // 64) * 64


def _width(needed: int, most: int) -> int:
    width = FIRST_WIDTH
    while width < needed:
        width *= 2
    return min(width, most)


def obstacle_to_capture(model: GPTModel) -> str | None:
    """None on CUDA, but that a replay runs no hooks, such as gather sharded weights, and autocast's copies of
    weights do not last."""
    kind = model.tok_emb.weight.device.type
    if kind != "cuda":
        return f"the model is on {kind}"
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return "it has hooks"
    return "autocast is on" if torch.is_autocast_enabled("cuda") else None


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for each stream it has seen."""
    return torch.cuda.Stream(device)


@functools.cache
def _say_once(cause: str) -> None:
    print(
        f"gpt_lightning: generate: the step could not be captured as a CUDA graph ({cause}); "
        "it runs without, slower",
        file=sys.stderr,
    )
