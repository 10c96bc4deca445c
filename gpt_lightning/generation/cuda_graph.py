"""Decoding step of fixed shapes, which a CUDA graph can replay without launching each kernel from Python.

For a small model, a step on a GPU takes less time than Python needs to launch its two hundred kernels. For few
rows the step can also run fewer kernels, our own (:mod:`gpt_lightning.generation.fused_decode`).

Shapes: B rows, V ``vocab_size``.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gpt_lightning.kernels.support import kernels_unsupported_reason, log_unsupported_once
from gpt_lightning.model.gpt import GPTModel, TransformerBlock, has_hooks
from gpt_lightning.model.kv_cache import KVCache

logger = logging.getLogger(__name__)

# Positions that a step attends over, filled or not. When they are full the width is doubled and a new graph is
# captured, so there are few captures.
FIRST_WIDTH = 256
# limits of our kernels; for more rows torch's matrix products are as fast
MAX_FUSED_ROWS, MAX_FUSED_EMB_DIM, MAX_FUSED_HEAD_DIM = 4, 4096, 256


class GraphedDecodeStep:
    """Decoding step of a model over a cache that contains the prompts.

    On CUDA the first step of each width runs eagerly, as warm-up, and is then captured as a graph; later steps
    replay it. If a capture is not possible or fails, one warning is logged and all steps run eagerly. The
    caller may continue with the model and the same cache at any time.

    Args:
        cache: Its first ``length`` positions are filled. Each step adds one.
        padding: ``(B,)``, see :meth:`GPTModel.features`.
        fused: Whether to use our Triton kernels. Their first use on a machine compiles them, which takes some
            seconds. If they cannot be used, one warning is logged and torch's kernels run.

    Attributes:
        max_logits: ``(B,)``, maximum logit of each row in the last step.
        argmax_ids: ``(B,)``, the ids of these maxima; of equal logits the lowest id.
        is_fused: Whether our Triton kernels are used.
    """

    max_logits: Tensor
    argmax_ids: Tensor

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
        # unfilled positions are masked, but 0 × NaN would still be NaN
        for tensor in (*cache.keys, *cache.values):
            tensor[:, :, cache.length :] = 0
        # a view of the same tensors whose position is on the device
        self._static_cache = KVCache(cache.keys, cache.values)
        self._static_cache.position = torch.full(
            (1,), cache.length, dtype=torch.int64, device=device
        )
        # (B, max_length): each step writes its own column, so results need no copy before the next step
        self._max_logits = cache.keys[0].new_zeros(len(self._tokens), cache.max_length)
        self._argmax_ids = torch.zeros_like(self._max_logits, dtype=torch.int64)
        self._forward: Callable[[], Tensor] = self._eager_forward
        self.is_fused = False
        if fused:
            if (reason := fused_decode_unsupported_reason(model, len(self._tokens))) is None:
                self._use_fused_kernels()
            else:
                _warn_once(f"the Triton kernels could not be used ({reason})")
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_logits: Tensor | None = None
        reason = cuda_graph_unsupported_reason(model)
        self._can_capture = reason is None
        if reason is not None:
            _warn_once(f"the step could not be captured as a CUDA graph ({reason})")

    def __call__(self, ids: Tensor | None = None) -> Tensor:
        """Newest ids ``(B,)`` → logits of the next tokens ``(B, V)``. The next call overwrites the logits.

        ``ids`` is by default the ``argmax_ids`` of the last call. A row that has ended has a negative id; its
        logits have no meaning.
        """
        cache = self._cache
        if cache.length >= self._static_cache.width:
            self.close()  # a graph is valid for one width only
            self._static_cache.width = _width(cache.length + 1, cache.max_length)
        if ids is not None:
            self._tokens.copy_(ids)
        self.max_logits = self._max_logits[:, cache.length]
        self.argmax_ids = self._argmax_ids[:, cache.length]
        cache.length += 1
        if self._graph is not None:
            self._graph.replay()
            assert self._graph_logits is not None
            return self._graph_logits
        logits = self._first_run()
        if self._can_capture:
            self._capture()
        return logits

    def _use_fused_kernels(self) -> None:
        try:
            from gpt_lightning.generation.fused_decode import FusedDecodeForward

            self._forward = FusedDecodeForward(
                self._model,
                self._static_cache,
                self._tokens,
                self._padding,
                self._max_logits,
                self._argmax_ids,
            )
        except Exception as error:  # an incompatible version of Triton, or not enough memory
            _warn_once(f"the Triton kernels could not be used ({_first_line(error)})")
            return
        # these kernels read filled positions only, so one width is enough
        self._static_cache.width = self._cache.max_length
        self.is_fused = True

    def _first_run(self) -> Tensor:
        try:
            return self._forward()
        except Exception as error:  # Triton's compiler and its tools raise errors of many types
            if not self.is_fused:
                raise
            _warn_once(f"the Triton kernels could not be compiled ({_first_line(error)})")
        self._forward, self.is_fused = self._eager_forward, False
        self._static_cache.width = _width(self._cache.length, self._cache.max_length)
        return self._forward()

    @property
    def is_captured(self) -> bool:
        """Whether the next step of this width replays a graph."""
        return self._graph is not None

    def close(self) -> None:
        """Wait for the last replay and free the graph."""
        if self._graph is not None:
            torch.cuda.synchronize(self._tokens.device)
            self._graph = self._graph_logits = None

    def _eager_forward(self) -> Tensor:
        """The step with torch's kernels. All state is in tensors on the device, so that it can be captured."""
        model, cache, padding = self._model, self._static_cache, self._padding
        position = cache.position
        assert position is not None
        columns = torch.arange(cache.width, device=position.device)
        visible = (columns <= position)[None]  # (1, width)
        token_positions = position
        if padding is not None:
            visible = visible & (columns >= padding[:, None])  # (B, width)
            token_positions = (position - padding)[:, None]  # (B, 1)
        x = model.tok_emb(self._tokens.clamp(min=0)[:, None]) + model.pos_emb(token_positions)
        # attention kernels with a mask need it as numbers in the dtype of the queries
        mask = torch.zeros(visible.shape, dtype=x.dtype, device=x.device)
        mask = mask.masked_fill(~visible, -torch.inf)[:, None, None]  # (B or 1, 1, 1, width)
        for block in model.trf_blocks:
            x = block(x, cache, mask)
        logits = model.head(model.final_norm(x)[:, -1])
        argmax_ids = logits.argmax(dim=-1)
        # under autocast the logits have another dtype than the cache
        max_logits = logits.amax(dim=-1, keepdim=True).to(self._max_logits.dtype)
        self._max_logits.index_copy_(1, position, max_logits)
        self._argmax_ids.index_copy_(1, position, argmax_ids[:, None])
        self._tokens.copy_(argmax_ids)
        position.add_(1)
        return logits

    def _capture(self) -> None:
        device = self._tokens.device
        stream = torch.cuda.current_stream(device)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: other threads may use the GPU during the capture, such as to copy batches to it
            with (
                torch.cuda.device(device),
                torch.cuda.graph(
                    graph, stream=_capture_stream(device), capture_error_mode="thread_local"
                ),
            ):
                logits = self._forward()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a failed capture does not restore the stream
            self._can_capture = False
            _warn_once(f"the step could not be captured as a CUDA graph ({_first_line(error)})")
            return
        self._graph, self._graph_logits = graph, logits


def padded_length(length: int) -> int:
    """Cache length for ``length`` positions, rounded up to a multiple of 64 so that kernels find it aligned."""
    return -(-length // 64) * 64


def _width(min_width: int, max_width: int) -> int:
    width = FIRST_WIDTH
    while width < min_width:
        width *= 2
    return min(width, max_width)


def cuda_graph_unsupported_reason(model: GPTModel) -> str | None:
    """Why a decoding step cannot be captured as a CUDA graph; ``None`` if it can.

    A replay runs no Python hooks, such as those that gather sharded weights. Autocast frees its copies of the
    weights, which the graph would still read.
    """
    device_type = model.tok_emb.weight.device.type
    if device_type != "cuda":
        return f"the model is on {device_type}"
    if has_hooks(model):
        return "it has hooks"
    return "autocast is on" if torch.is_autocast_enabled("cuda") else None


def fused_decode_unsupported_reason(model: GPTModel, rows: int) -> str | None:
    """Why our Triton kernels cannot run this model on its device with ``rows`` rows; ``None`` if they can."""
    device = model.tok_emb.weight.device
    if reason := kernels_unsupported_reason(device):
        log_unsupported_once(device.type, reason)
        return reason
    if reason := cuda_graph_unsupported_reason(model):
        return reason  # our kernels run neither hooks nor autocast
    config = model.config
    if rows > MAX_FUSED_ROWS:
        return f"{rows} rows are more than {MAX_FUSED_ROWS}"
    if config.emb_dim > MAX_FUSED_EMB_DIM:
        return f"emb_dim {config.emb_dim} is more than {MAX_FUSED_EMB_DIM}"
    if config.emb_dim // config.n_heads > MAX_FUSED_HEAD_DIM:
        return f"its heads are wider than {MAX_FUSED_HEAD_DIM}"
    for block in model.trf_blocks:
        layers: tuple[nn.Module, ...] = ()
        if isinstance(block, TransformerBlock):
            layers = (block.att.qkv, block.att.out_proj, block.ff.layers[0], block.ff.layers[2])
        if not layers or not all(isinstance(layer, nn.Linear) for layer in layers):
            return "it has layers of other types than GPTModel"
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) > 1 or not all(p.is_contiguous() for p in model.parameters()):
        return "its weights differ in dtype or are not contiguous"
    if not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        return f"its weights are {str(dtypes.pop()).removeprefix('torch.')}"
    return None


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS keeps a workspace for each stream on which it has run."""
    return torch.cuda.Stream(device)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@functools.cache
def _warn_once(problem: str) -> None:
    logger.warning(f"generate: {problem}; decoding continues without it, more slowly")
