"""The book's chapters 4 and 5 and its appendix D in plain torch: the reference for our digits.

It has a dataset that is a list of tensors, torch's own ``DataLoader``, and one global generator for initial
weights, shuffling and dropout. The model is the package's plain one, which imports nothing but torch; this file
imports nothing else of the package.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gpt_lightning.reports.book_model import BookGPT


class BookDataset(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, token_ids: list[int], length: int, stride: int) -> None:
        starts = range(0, len(token_ids) - length, stride)
        self.inputs = [torch.tensor(token_ids[i : i + length]) for i in starts]
        self.targets = [torch.tensor(token_ids[i + 1 : i + length + 1]) for i in starts]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.inputs[i], self.targets[i]


@dataclass
class AppendixD:
    """Appendix D: warmup, cosine decay and clipping, and what each step had of them.

    ``clip_from`` is the first step that is clipped: ``warmup`` in the repository, one more in the printed editions.
    """

    peak_lr: float
    initial_lr: float
    min_lr: float
    warmup: int
    total: int
    max_norm: float
    clip_from: int
    lrs: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step < self.warmup:
            lr = self.initial_lr + step * (self.peak_lr - self.initial_lr) / self.warmup
        else:
            progress = (step - self.warmup) / (self.total - self.warmup)
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            lr = self.min_lr + (self.peak_lr - self.min_lr) * cosine
        for group in optimizer.param_groups:
            group["lr"] = lr
        self.lrs.append(lr)

    def clip(self, model: nn.Module, step: int) -> None:
        if step >= self.clip_from:
            norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=self.max_norm)
            self.norms.append(norm.item())


@dataclass
class BookRun:
    """What ``train_model_simple`` returns, with the model and the optimizer."""

    model: BookGPT
    optimizer: torch.optim.Optimizer
    train_losses: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    tokens_seen: list[int] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def loaders(
    text: str, encode: Any, *, length: int, stride: int, batch_size: int, train_ratio: float
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    split = int(train_ratio * len(text))
    train = BookDataset(encode(text[:split]), length, stride)
    val = BookDataset(encode(text[split:]), length, stride)
    return (
        DataLoader(train, batch_size=batch_size, shuffle=True, drop_last=True),
        DataLoader(val, batch_size=batch_size, shuffle=False, drop_last=False),
    )


def batch_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = model(inputs)
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def loader_loss(model: nn.Module, loader: DataLoader[Any], num_batches: int | None) -> float:
    n = len(loader) if num_batches is None else min(num_batches, len(loader))
    total = 0.0
    for i, (inputs, targets) in enumerate(loader):
        if i >= n:
            break
        total += batch_loss(model, inputs, targets).item()
    return total / n


def train(
    run: BookRun,
    train_loader: DataLoader[Any],
    val_loader: DataLoader[Any],
    *,
    epochs: int,
    eval_freq: int,
    eval_iter: int,
    appendix: AppendixD | None = None,
    say: Any = None,
    sample: Any = None,
) -> BookRun:
    """The book's loop: an optimizer step, then every ``eval_freq`` steps an evaluation on new passes.

    ``sample`` is called with the model after each epoch. With ``appendix`` it is the loop of appendix D.
    """
    tokens_seen, step = 0, -1
    for epoch in range(epochs):
        run.model.train()
        for inputs, targets in train_loader:
            run.optimizer.zero_grad()
            step += 1
            if appendix:
                appendix.set_learning_rate(run.optimizer, step)
            batch_loss(run.model, inputs, targets).backward()
            if appendix:
                appendix.clip(run.model, step)
            run.optimizer.step()
            tokens_seen += inputs.numel()
            if step % eval_freq == 0:
                run.model.eval()
                with torch.no_grad():
                    train_loss = loader_loss(run.model, train_loader, eval_iter)
                    val_loss = loader_loss(run.model, val_loader, eval_iter)
                run.model.train()
                run.train_losses.append(train_loss)
                run.val_losses.append(val_loss)
                run.tokens_seen.append(tokens_seen)
                run.lines.append(
                    f"Ep {epoch + 1} (Step {step:06d}): "
                    f"Train loss {train_loss:.3f}, Val loss {val_loss:.3f}"
                )
                if say:
                    say(run.lines[-1])
        if sample:
            sample(run.model)
    return run


def new_run(cfg: dict[str, Any], *, lr: float, weight_decay: float, seed: int) -> BookRun:
    torch.manual_seed(seed)
    model = BookGPT(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    return BookRun(model, optimizer)


@torch.no_grad()
def generate(
    model: BookGPT,
    idx: Tensor,
    max_new_tokens: int,
    context_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
) -> Tensor:
    """The book's ``generate``: for each token it crops the window and reads all of it again."""
    model.eval()
    for _ in range(max_new_tokens):
        logits = model(idx[:, -context_size:])[:, -1, :]
        if top_k is not None:
            top, _ = torch.topk(logits, top_k)
            logits = torch.where(logits < top[:, -1:], torch.tensor(-torch.inf), logits)
        if temperature > 0.0:
            chosen = torch.multinomial(torch.softmax(logits / temperature, dim=-1), num_samples=1)
        else:
            chosen = torch.argmax(logits, dim=-1, keepdim=True)
        idx = torch.cat((idx, chosen), dim=1)
    return idx
