"""Servers of the tests: ``serve`` and ``explore`` as processes, and a tiny model for them."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt_lightning import GPTConfig, GPTModel, save_model
from gpt_lightning.data.tokenizer import GPT2
from helpers import ENVIRONMENT

SECONDS_TO_START = 120


@dataclass(frozen=True)
class RunningServer:
    """A server that is ready.

    Attributes:
        url: Without a slash at the end.
        ready_line: What it printed.
    """

    url: str
    ready_line: str
    process: "subprocess.Popen[str]"

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def stop(self, signum: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; returns the exit code and standard error."""
        self.process.send_signal(signum)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


@contextmanager
def running_server(command: str, *arguments: str, **environment: str) -> Iterator[RunningServer]:
    """``gpt_lightning serve`` or ``explore`` on a free port, stopped at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt_lightning", command, "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | environment,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://[^\s/]+", line)
        if address is None:
            _, err = process.communicate(timeout=SECONDS_TO_START)
            raise AssertionError(f"exit code {process.returncode}: {line}{err}")
        yield RunningServer(address[0], line, process)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def write_tiny_model(folder: Path, seed: int = 1, *, ends: bool = False, **changes: int) -> Path:
    """A tiny model with GPT-2's tokenizer and random weights, in Hugging Face's form.

    Args:
        ends: It predicts the end of the text after every token.
    """
    sizes = {"context_length": 48, "emb_dim": 16, "n_heads": 2, "n_layers": 2, **changes}
    torch.manual_seed(seed)
    model = GPTModel(GPTConfig(**sizes, qkv_bias=True)).eval()
    with torch.no_grad():  # a few tokens have most of the probability, as in a trained model
        model.head_weight.mul_(30 / sizes["emb_dim"] ** 0.5)
        if ends:
            model.final_norm.bias.fill_(1.0)
            model.head_weight[GPT2.end_of_text_id] = 1000.0
            model.final_norm.weight.zero_()
    save_model(model, folder)
    return folder
