"""The layout of a model's matrices in which its device decodes fastest."""

import torch

from gpt_lightning.model.cpu_decode import cpu_decode_unsupported_reason
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.packed_linear import pack_weights
from gpt_lightning.model.quantize import QUANTIZED_DTYPES, quantize_weights


def prepare_for_decoding(
    model: GPTModel, dtype: torch.dtype | None = None, *, rows: int | None = None
) -> None:
    """Change the matrices to the fastest layout, in place. The model can no longer be trained.

    Args:
        dtype: ``torch.int8`` or ``torch.int4`` for quantized matrices of a float32 model, see :func:`quantize_weights`.
            Another dtype, or ``None``, changes nothing.
        rows: Number of texts that are decoded at once, ``None`` if it varies. A few are decoded in C if they can be, see
            :mod:`gpt_lightning.model.cpu_decode`. Otherwise a CPU has packed matrices.
    """
    model.requires_grad_(False)
    in_c = rows is not None and cpu_decode_unsupported_reason(model, rows) is None
    if dtype is not None and dtype in QUANTIZED_DTYPES:
        quantize_weights(model, dtype, keep_codes=in_c)
    if not in_c:
        pack_weights(model)
        return
    # weights may lie in a mapped file; Linux gives huge pages, which are read faster, for other memory only
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
