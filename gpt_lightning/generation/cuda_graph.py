"""One token through the model in fixed shapes, so that a CUDA graph can replay it: no launch, no wait.

A small model's step on a GPU takes less time than Python needs to launch its two hundred kernels. Of few rows it is
fewer kernels, of our own (:mod:`gpt_lightning.generation.fused_decode`). B rows, V ``vocab_size``.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gpt_lightning.kernels.support import kernels_unsupported_reason
from gpt_lightning.model.gpt import GPTModel, TransformerBlock
from gpt_lightning.model.kv_cache import KVCache

logger = logging.getLogger(__name__)

# positions that a step attends over, filled or not; doubled when they are full, so few graphs are captured
FIRST_WIDTH = 256
# for which our kernels are made; of more rows torch's products are as fast
MOST_FUSED_ROWS, WIDEST_FUSED, WIDEST_FUSED_HEAD = 4, 4096, 256


class GraphedDecodeStep:
    """A model's step over a cache that the prompts have filled.

    On CUDA the first step of each width runs as it is, which warms up what a capture must not, and is then
    captured; where that fails, or cannot be, this is said once and all steps run as the first.
    The plain path may take over the cache at any time.

    Args:
        cache: Its ``length`` positions are read, and it grows with each step.
        padding: ``(B,)``, see :meth:`GPTModel.features`.
        fused: Whether it is to run on our own kernels, which are compiled the first time on a machine, in some
            seconds; where they cannot, this is said once, and it runs on torch's.

    Attributes:
        largest: ``(B,)``, of the logits of the last call.
        likeliest: ``(B,)``, the ids of these, of equal ones the lowest.
        is_fused: Whether it runs on our own kernels.
    """

    largest: Tensor
    likeliest: Tensor

    def __init__(
        self,
        model: GPTModel,
        cache: KVCache,
        padding: Tensor | None,
        *,
        fused: bool = False,
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
        # of each position, so that nothing need be copied before the next step; (B, T_max)
        self._largest = cache.keys[0].new_zeros(len(self._tokens), cache.max_length)
        self._likeliest = torch.zeros_like(self._largest, dtype=torch.int64)
        self._run: Callable[[], Tensor] = self._forward
        self.is_fused = False
        if fused:
            if (obstacle := fused_decode_unsupported_reason(model, len(self._tokens))) is None:
                self._fuse()
            else:
                _say_once(f"our own kernels could not be used ({obstacle})")
        self._graph: torch.cuda.CUDAGraph | None = None
        self._found: Tensor | None = None
        obstacle = cuda_graph_unsupported_reason(model)
        self._captures = obstacle is None
        if obstacle is not None:
            _say_once(f"the step could not be captured as a CUDA graph ({obstacle})")

    def __call__(self, last: Tensor | None = None) -> Tensor:
        """The newest ids ``(B,)``, by default the last call's likeliest → the next tokens' logits ``(B, V)``, which the
        next call overwrites.

        Of a row that has ended the id is below 0, and its logits mean nothing.
        """
        cache = self._cache
        if cache.length >= self._static.width:
            self.close()  # a graph's widths are its own
            self._static.width = _width(cache.length + 1, cache.max_length)
        if last is not None:
            self._tokens.copy_(last)
        self.largest = self._largest[:, cache.length]
        self.likeliest = self._likeliest[:, cache.length]
        cache.length += 1
        if self._graph is not None:
            self._graph.replay()
            assert self._found is not None
            return self._found
        logits = self._first_run()
        if self._captures:
            self._capture()
        return logits

    def _fuse(self) -> None:
        try:
            from gpt_lightning.generation.fused_decode import FusedDecodeForward

            self._run = FusedDecodeForward(
                self._model,
                self._static,
                self._tokens,
                self._padding,
                self._largest,
                self._likeliest,
            )
        except Exception as error:  # a Triton of another kind, or no memory for what it keeps
            _say_once(f"our own kernels could not be used ({_first_line(error)})")
            return
        self._static.width = self._cache.max_length  # it reads no more than is filled
        self.is_fused = True

    def _first_run(self) -> Tensor:
        try:
            return self._run()
        except Exception as error:  # of a compiler or what it needs; torch's own kernels need none
            if not self.is_fused:
                raise
            _say_once(f"our own kernels could not be compiled ({_first_line(error)})")
        self._run, self.is_fused = self._forward, False
        self._static.width = _width(self._cache.length, self._cache.max_length)
        return self._run()

    @property
    def is_captured(self) -> bool:
        """Whether the next step of this width replays a graph."""
        return self._graph is not None

    def close(self) -> None:
        """Let go of the graph, after its last replay is done."""
        if self._graph is not None:
            torch.cuda.synchronize(self._tokens.device)
            self._graph = self._found = None

    def _forward(self) -> Tensor:
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
        likeliest = logits.argmax(dim=-1)
        largest = logits.amax(dim=-1, keepdim=True).to(self._largest.dtype)  # autocast's is another
        self._largest.index_copy_(1, position, largest)
        self._likeliest.index_copy_(1, position, likeliest[:, None])
        self._tokens.copy_(likeliest)
        position.add_(1)
        return logits

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
            _say_once(f"the step could not be captured as a CUDA graph ({_first_line(error)})")
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


def cuda_graph_unsupported_reason(model: GPTModel) -> str | None:
    """None on CUDA, but that a replay runs no hooks, such as gather sharded weights, and autocast's copies of
    weights do not last."""
    kind = model.tok_emb.weight.device.type
    if kind != "cuda":
        return f"the model is on {kind}"
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return "it has hooks"
    return "autocast is on" if torch.is_autocast_enabled("cuda") else None


def fused_decode_unsupported_reason(model: GPTModel, rows: int) -> str | None:
    """None where our own kernels are made for the GPU, the model and so many rows."""
    if obstacle := kernels_unsupported_reason(model.tok_emb.weight.device):
        return obstacle
    if obstacle := cuda_graph_unsupported_reason(model):
        return obstacle  # what torch's modules are asked to do besides is not done
    config = model.config
    if rows > MOST_FUSED_ROWS:
        return f"{rows} rows are more than {MOST_FUSED_ROWS}"
    if config.emb_dim > WIDEST_FUSED:
        return f"emb_dim {config.emb_dim} is more than {WIDEST_FUSED}"
    if config.emb_dim // config.n_heads > WIDEST_FUSED_HEAD:
        return f"its heads are wider than {WIDEST_FUSED_HEAD}"
    for block in model.trf_blocks:
        layers: tuple[nn.Module, ...] = ()
        if isinstance(block, TransformerBlock):
            layers = (block.att.qkv, block.att.out_proj, block.ff.layers[0], block.ff.layers[2])
        if not layers or not all(isinstance(layer, nn.Linear) for layer in layers):
            return "its layers are not the model's own"
    kinds = {p.dtype for p in model.parameters()}
    if len(kinds) > 1 or not all(p.is_contiguous() for p in model.parameters()):
        return "its weights are not all alike"
    if not kinds <= {torch.float32, torch.bfloat16, torch.float16}:
        return f"its weights are {str(kinds.pop()).removeprefix('torch.')}"
    return None


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for each stream it has seen."""
    return torch.cuda.Stream(device)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@functools.cache
def _say_once(what: str) -> None:
    logger.warning(f"generate: {what}; it runs without, slower")
