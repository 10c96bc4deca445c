"""The optimizer of a run: which one, its parameter groups, and what it saves."""

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.flops import block_matrix_parameters, parameters
from gpt_lightning.model.precision import PRECISIONS
from gpt_lightning.suggestions import nearest
from gpt_lightning.training.muon import AdjustLR, Muon

# matrices of a block that Muon orthogonalizes, and how many each parameter holds
_MUON_MATRICES = {
    "att.qkv.weight": 3,  # query, key, value
    "att.out_proj.weight": 1,
    "ff.layers.0.weight": 1,
    "ff.layers.2.weight": 1,
}
_REFUSED = {
    "LBFGS": "needs a closure that computes the loss several times per step; give another class",
    "Muon": "orthogonalizes query, key and value as one matrix; give model.optimizer muon",
    "Optimizer": "is not an optimizer itself; give one of its subclasses, as torch.optim.SGD",
    "SparseAdam": "needs sparse gradients, which this model does not have; give another class",
}
# arguments that settings of the run give
_SET_BY_MODEL = ("lr", "weight_decay", "betas")
_SET_BY_RUN = ("params", "fused", "capturable", "differentiable", "maximize")
# classes whose steps torch cannot compute on sharded matrices
_NOT_SHARDED = ("Adafactor", "Rprop")
_ADAMW_STATE = frozenset({"step", "exp_avg", "exp_avg_sq"})
_EXAMPLE = "{class_path: torch.optim.SGD, init_args: {momentum: 0.9}}"
MUON_MOMENTUM = 0.95  # the default of Muon's author


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of the optimizer, checked.

    Attributes:
        optimizer: 'adamw', 'muon', or a class of ``torch.optim``: its name, or a dict with ``class_path`` and
            ``init_args``.
        lr: Learning rate after the warmup; each step's is set before the step.
        betas: For AdamW, and for classes that have them.
        muon_lr: As ``lr``, for Muon's matrices; ``None``: ``lr``.
        muon_momentum: ``None``: 0.95.
        muon_adjust_lr: ``None``: match_rms_adamw.

    Raises:
        ValueError: A setting cannot be used; one line.
    """

    optimizer: str | Mapping[str, Any] = "adamw"
    lr: float = 4e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    decay_matrices_only: bool = False
    muon_lr: float | None = None
    muon_momentum: float | None = None
    muon_adjust_lr: AdjustLR | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"model.weight_decay: {self.weight_decay} is out of range; give 0 or more"
            )
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(
                f"model.betas: {self.betas} are not in [0, 1); the book has 0.9 and 0.999"
            )
        self._check_muon()
        if self.optimizer not in ("adamw", "muon"):
            self._example_state(1, 1)

    def _check_muon(self) -> None:
        given = {
            name: value
            for name in ("muon_lr", "muon_momentum", "muon_adjust_lr")
            if (value := getattr(self, name)) is not None
        }
        if self.optimizer != "muon":
            for name, value in given.items():
                raise ValueError(
                    f"model.{name}: {value} has no effect with model.optimizer {self.name}; leave it out, or give "
                    "model.optimizer muon"
                )
            return
        if not self.lr:
            raise ValueError(
                "model.lr: 0 is too small for Muon, whose learning rate is a multiple of it; give more than 0"
            )
        if self.muon_lr is not None and not 0.0 < self.muon_lr < math.inf:
            raise ValueError(f"model.muon_lr: {self.muon_lr} is out of range; give more than 0")
        if self.muon_momentum is not None and not 0.0 <= self.muon_momentum < 1.0:
            raise ValueError(
                f"model.muon_momentum: {self.muon_momentum} is not in [0, 1); 0.95 is usual"
            )
        choices = get_args(AdjustLR)
        if self.muon_adjust_lr is not None and self.muon_adjust_lr not in choices:
            raise ValueError(
                f"model.muon_adjust_lr: {self.muon_adjust_lr} is unknown; give {' or '.join(choices)}"
            )
        if self.muon_adjust_lr == "original" and self.muon_lr is None:
            raise ValueError(
                "model.muon_lr: must be given with model.muon_adjust_lr original, whose learning rate is not "
                "AdamW's; 0.02 is usual"
            )

    @property
    def name(self) -> str:
        """'adamw', 'muon' or the class's path; two runs with equal names have optimizer states of one form."""
        if self.optimizer in ("adamw", "muon"):
            return str(self.optimizer)
        return f"torch.optim.{self._class_and_arguments()[0].__name__}"

    def build(self, model: nn.Module, *, precision: str = "32-true") -> Optimizer:
        """Build the optimizer over the named parameters of a model.

        With ``decay_matrices_only`` biases and norms have no weight decay. AdamW's groups come before Muon's.

        Args:
            precision: Lightning's name. Muon's products are in bfloat16 if training is, else in float32 or float64.
        """
        # a fused step unscales fp16 gradients itself, after clipping and logging
        fused = precision != "16-mixed"
        if self.optimizer == "adamw":
            return build_adamw(
                model,
                lr=self.lr,
                weight_decay=self.weight_decay,
                betas=self.betas,
                decay_matrices_only=self.decay_matrices_only,
                fused=fused,
            )
        named = list(model.named_parameters())
        if self.optimizer != "muon":
            return self._build_class(self._groups(named))
        chunks = {name: _muon_chunks(name) for name, _ in named}
        groups = [
            {**group, "lr": self.lr}
            for group in self._groups([(n, p) for n, p in named if not chunks[n]])
        ]
        muon_lr = self.lr if self.muon_lr is None else self.muon_lr
        groups += [
            {
                "params": [(n, p) for n, p in named if chunks[n] == count],
                "lr": muon_lr,
                "lr_factor": muon_lr / self.lr,
                "weight_decay": self.weight_decay,
                "chunks": count,
                "momentum": MUON_MOMENTUM if self.muon_momentum is None else self.muon_momentum,
                "adjust_lr": self.muon_adjust_lr or "match_rms_adamw",
            }
            for count in sorted({count for count in chunks.values() if count})
        ]
        dtype = product_dtype(precision)
        return Muon(groups, product_dtype=dtype, betas=self.betas, fused=fused)

    def _groups(self, named: list[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        return parameter_groups(named, self.weight_decay, self.decay_matrices_only)

    def state_values(self, config: GPTConfig) -> int:
        """Number of values that the optimizer saves for a model, without step counts."""
        total = parameters(config)
        if (
            self.optimizer == "muon"
        ):  # one for each value of a matrix, and AdamW's two for the others
            return 2 * total - block_matrix_parameters(config)
        if self.optimizer == "adamw":
            return 2 * total
        values = sum(
            value.numel()
            for value in self._example_state(64, 64).values()
            if isinstance(value, torch.Tensor) and value.dim()
        )
        return total * values // 64**2

    def state_keys(self, name: str = "", dim: int = 2) -> frozenset[str]:
        """Names of what the optimizer saves for a parameter with this name and number of dimensions."""
        if self.optimizer == "muon" and _muon_chunks(name):
            return frozenset({"momentum_buffer"})
        if self.optimizer in ("adamw", "muon"):
            return _ADAMW_STATE
        return frozenset(self._example_state(*[1] * dim))

    def check_sharding(self) -> None:
        """Refuse a class that does not work with FSDP2, with a ``ValueError``."""
        if not self.can_shard:
            raise ValueError(
                f"model.optimizer: {self.name} does not work with FSDP2, whose matrices are sharded; give another "
                "class, or --config configs/ddp.yaml"
            )

    @property
    def can_shard(self) -> bool:
        """Whether it works with FSDP2."""
        return self.name.removeprefix("torch.optim.") not in _NOT_SHARDED

    @property
    def is_fused(self) -> bool:
        """Whether one operation updates a parameter, without a copy of it."""
        return self.optimizer in ("adamw", "muon")

    def _class_and_arguments(self) -> tuple[type[Optimizer], dict[str, Any]]:
        given = self.optimizer
        path: Any = given
        arguments: Any = {}
        if isinstance(given, Mapping):
            path = given.get("class_path")
            arguments = given.get("init_args") or {}
            if unknown := given.keys() - {"class_path", "init_args"}:
                raise ValueError(
                    f"model.optimizer: {min(map(str, unknown))} is not a key; give class_path and init_args, as "
                    f"{_EXAMPLE}"
                )
            if path is None:
                raise ValueError(f"model.optimizer: has no class_path; give it, as {_EXAMPLE}")
            if path in ("adamw", "muon"):
                raise ValueError(
                    f"model.optimizer: {path} is not a class_path; give model.optimizer {path}"
                )
        classes = {
            name: value
            for name, value in vars(torch.optim).items()
            if isinstance(value, type) and issubclass(value, Optimizer)
        }
        name = str(path).removeprefix("torch.optim.")
        if name not in classes:
            near = nearest(name, ("adamw", "muon", *(c for c in classes if c not in _REFUSED)))
            remedy = f"did you mean {near}?" if near else "give adamw, muon or torch.optim.NAME"
            raise ValueError(f"model.optimizer: {path} is not an optimizer of torch; {remedy}")
        if name in _REFUSED:
            raise ValueError(f"model.optimizer: torch.optim.{name} {_REFUSED[name]}")
        if not isinstance(arguments, Mapping):
            raise ValueError(
                f"model.optimizer.init_args: {arguments} is not a mapping of arguments to values; give as "
                "{momentum: 0.9}"
            )
        return classes[name], dict(arguments)

    def _build_class(self, groups: list[Any]) -> Optimizer:
        optimizer_class, given = self._class_and_arguments()
        known = inspect.signature(optimizer_class).parameters
        for name in given:
            if name in _SET_BY_MODEL:
                raise ValueError(
                    f"model.optimizer.init_args.{name}: is set by model.{name}; leave it out"
                )
            if name in _SET_BY_RUN:
                raise ValueError(f"model.optimizer.init_args.{name}: is set by fit; leave it out")
            if name not in known:
                near = nearest(str(name), known)
                remedy = (
                    f"did you mean {near}?"
                    if near
                    else f"see torch.optim.{optimizer_class.__name__}"
                )
                raise ValueError(f"model.optimizer.init_args.{name}: is not an argument; {remedy}")
        own = {name: getattr(self, name) for name in _SET_BY_MODEL if name in known}
        with self._refused_arguments():
            return optimizer_class(groups, **own, **given)

    def _example_state(self, *shape: int) -> dict[str, Any]:
        """Return what the class saves for a parameter; raise a ``ValueError`` if its steps refuse the arguments."""
        parameter = nn.Parameter(torch.zeros(shape))
        optimizer = self._build_class([parameter])
        with self._refused_arguments():
            for _ in range(2):  # the second step uses more arguments than the first
                parameter.grad = torch.zeros_like(parameter)
                optimizer.step()
        return dict(optimizer.state[parameter])

    @contextmanager
    def _refused_arguments(self) -> Iterator[None]:
        try:
            yield
        except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise ValueError(
                f"model.optimizer: {self.name} refuses its arguments ({' '.join(str(error).split())}); give other "
                "init_args"
            ) from error


def build_adamw(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    decay_matrices_only: bool,
    fused: bool = True,
) -> AdamW:
    """Build AdamW over the named parameters; with ``decay_matrices_only`` biases and norms have no weight decay."""
    groups = parameter_groups(list(model.named_parameters()), weight_decay, decay_matrices_only)
    return AdamW(groups, lr=lr, betas=betas, fused=fused)


def parameter_groups(
    named: list[tuple[str, nn.Parameter]], weight_decay: float, decay_matrices_only: bool
) -> list[dict[str, Any]]:
    """Return one parameter group, or with ``decay_matrices_only`` one with and one without weight decay."""
    if not decay_matrices_only:
        return [{"params": named, "weight_decay": weight_decay}]
    return [
        {"params": [(n, p) for n, p in named if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]


def _muon_chunks(name: str) -> int:
    """Return how many matrices a parameter holds that Muon orthogonalizes; 0: it belongs to AdamW."""
    for suffix, chunks in _MUON_MATRICES.items():
        if name.endswith(f".{suffix}"):
            return chunks
    return 0


def product_dtype(precision: str) -> torch.dtype:
    """Return the type of Muon's matrix products in a training of this precision."""
    weights, autocast = PRECISIONS[precision]
    computed = autocast or weights
    return torch.float32 if computed == torch.float16 else computed
