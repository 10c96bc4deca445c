"""Many clients at once, compared with transformers and LitServe: python benchmarks/serving.py [--seconds 60] [--tiny]

A model with random weights samples texts of 32 tokens. Each client sends its next request when it has the answer to the
last one. Measured are tokens per second with one client and with 16, the time of each request, whether the answers are those
of the same requests alone, and what happens with 200 clients. Each peer's server is a separate process; the servers take turns.
--litserve PYTHON is an interpreter in which LitServe is installed. The last line is JSON.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from machine import at_least, at_most, description

from gpt_lightning import GPTConfig, GPTModel, save_model

CLIENTS, MANY_CLIENTS = 16, 200
NEW = 32
SERVER_SECONDS = 120  # until a server answers, and for a request
ENDPOINT = "/v1/completions"


@dataclass
class Load:
    """What the clients saw."""

    seconds: float
    waits: list[float] = field(default_factory=list)
    answers: list[tuple[int, list[int]]] = field(default_factory=list)  # seed and new ids
    statuses: dict[int, int] = field(default_factory=dict)
    without_retry_after: int = 0

    @property
    def tokens_per_second(self) -> float:
        return sum(len(ids) for _, ids in self.answers) / self.seconds


class Server:
    """A server process on a port of its own."""

    def __init__(self, name: str, command: list[str], port: int) -> None:
        self.name, self.port = name, port
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 — as long as the process
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=self.errors, start_new_session=True
        )
        end = time.monotonic() + SERVER_SECONDS
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1):
                    return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > end:
                    self.errors.seek(0)
                    cause = self.errors.read()[-2000:]
                    raise RuntimeError(f"{name} does not start: {cause}") from None
                time.sleep(0.2)

    def end(self) -> None:
        """End the process and its children."""
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def prompt_of(seed: int, vocab_size: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocab_size) for _ in range(rng.randrange(8, 25))]


async def ask(
    client: httpx.AsyncClient, server: Server, seed: int, vocab_size: int, load: Load
) -> None:
    """Send one request and record its answer."""
    prompt = prompt_of(seed, vocab_size)
    start = time.perf_counter()
    if server.name == "ours":
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": NEW,
            "temperature": 1,
            "seed": seed,
            "logprobs": 0,
        }
        answer = await client.post(ENDPOINT, json=body)
    else:
        answer = await client.post("/predict", json={"prompt": prompt, "max_tokens": NEW})
    load.statuses[answer.status_code] = load.statuses.get(answer.status_code, 0) + 1
    if answer.status_code == 429:
        load.without_retry_after += "retry-after" not in answer.headers
    elif answer.status_code == 200:
        load.waits.append(time.perf_counter() - start)
        content = answer.json()
        if (
            server.name == "ours"
        ):  # texts of tokens; equal texts are compared, and their number counted
            new = content["choices"][0]["logprobs"]["tokens"]
            load.answers.append((seed, new))
        else:
            load.answers.append((seed, content["ids"]))


async def run_clients(
    server: Server, clients: int, seconds: float, vocab_size: int, first_seed: int
) -> Load:
    """``clients`` clients for ``seconds`` seconds; 0: one request each."""
    load = Load(seconds)
    end = time.perf_counter() + seconds
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{server.port}", timeout=SERVER_SECONDS, limits=limits
    ) as client:

        async def one(number: int) -> None:
            request = 0
            while request == 0 or time.perf_counter() < end:
                await ask(client, server, first_seed + number + clients * request, vocab_size, load)
                request += 1

        start = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(clients)))
        load.seconds = time.perf_counter() - start
    return load


async def answers_alone(server: Server, seeds: list[int], vocab_size: int) -> dict[int, list[str]]:
    """The answers to the same requests, one after the other."""
    load = Load(0)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{server.port}", timeout=SERVER_SECONDS
    ) as client:
        for seed in seeds:
            await ask(client, server, seed, vocab_size, load)
    return dict(load.answers)  # type: ignore[arg-type]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=60, help="of the 16 clients, in all rounds together"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--compared", type=int, default=300, help="answers that are asked for again, alone"
    )
    parser.add_argument("--litserve", metavar="PYTHON")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.seconds, options.rounds, options.compared = 2, 1, 20
    width, layers = (32, 2) if options.tiny else (256, 6)
    config = GPTConfig(
        vocab_size=50257, context_length=128, emb_dim=width, n_heads=4, n_layers=layers,
        qkv_bias=True, tied_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        source = str(Path(folder) / "model")
        save_model(GPTModel(config), source)
        peer = str(Path(__file__).parent / "serving_peer.py")
        commands = {
            "ours": [sys.executable, "-m", "gpt_lightning", "serve", "--from", source, "--port"],
            "loop over transformers' generate": [sys.executable, peer, "loop", source],
        }
        if options.litserve:
            commands["LitServe, transformers"] = [options.litserve, peer, "litserve", source]
        servers: dict[str, Server] = {}
        try:
            for name, command in commands.items():
                port = free_port()
                servers[name] = Server(name, [*command, str(port)], port)
            result = measure(servers, options, config.vocab_size)
        finally:
            for server in servers.values():
                server.end()
    peers = {"litserve": options.litserve} if options.litserve else {}
    machine = description("starlette", "uvicorn", "transformers", **peers)
    print(
        json.dumps({"machine": machine, "emb_dim": width, "n_layers": layers, "new": NEW, **result})
    )
    for target in result["targets"]:
        print(
            f"{'passed' if target['passed'] else 'MISSED'}  {target['name']}: {target['value']}",
            file=sys.stderr,
        )


def measure(
    servers: dict[str, Server], options: argparse.Namespace, vocab_size: int
) -> dict[str, Any]:
    """Tokens per second of all servers with one and with 16 clients, and what 200 clients see."""
    speed: dict[str, dict[int, list[float]]] = {name: {1: [], CLIENTS: []} for name in servers}
    waits: list[float] = []
    statuses: dict[int, int] = {}
    answers: dict[int, list[Any]] = {}
    seconds = options.seconds / options.rounds
    for number in range(options.rounds + 1):  # the first round is warm-up
        for name, server in servers.items():
            for clients in (1, CLIENTS):
                duration = (
                    min(2.0, seconds) if number == 0 else seconds if clients > 1 else seconds / 2
                )
                load = asyncio.run(
                    run_clients(server, clients, duration, vocab_size, 1_000_000 * number)
                )
                if number == 0:
                    continue
                speed[name][clients].append(load.tokens_per_second)
                if name == "ours" and clients > 1:
                    waits += load.waits
                    answers |= dict(load.answers)
                    for status, count in load.statuses.items():
                        statuses[status] = statuses.get(status, 0) + count
                print(
                    f"{name}, {clients} clients: {load.tokens_per_second:.0f} tokens/s",
                    file=sys.stderr,
                )
    compared = dict(list(answers.items())[: options.compared])
    alone = asyncio.run(answers_alone(servers["ours"], list(compared), vocab_size))
    different = sum(alone[seed] != tokens for seed, tokens in compared.items())
    many = asyncio.run(run_clients(servers["ours"], MANY_CLIENTS, 0, vocab_size, 5_000_000))
    own = speed["ours"]
    gain = statistics.median(a / b for a, b in zip(own[CLIENTS], own[1], strict=True))
    median = statistics.median(waits)
    not_ok = sum(count for status, count in statuses.items() if status != 200)
    targets = [
        at_least(f"tokens/s of {CLIENTS} clients / of one client", gain, 3.0),
        at_most(f"longest wait / median wait of {CLIENTS} clients", max(waits) / median, 3.0),
        # rounding differs with the batch, so a text differs where two tokens are nearly equally good
        at_most("share of answers that differ from those alone", different / len(compared), 0.01),
        at_most(f"requests of {CLIENTS} clients without an answer", not_ok, 0),
        at_most(f"of {MANY_CLIENTS} clients, those with neither 200 nor 429",
                MANY_CLIENTS - many.statuses.get(200, 0) - many.statuses.get(429, 0), 0),
        at_least(f"of {MANY_CLIENTS} clients, those with 429", many.statuses.get(429, 0), 1),
        at_most("answers 429 without Retry-After", many.without_retry_after, 0),
    ]  # fmt: skip
    for name in servers:
        if name != "ours":
            ratios = [a / b for a, b in zip(own[CLIENTS], speed[name][CLIENTS], strict=True)]
            targets.append(
                at_least(f"{CLIENTS} clients, ours / {name}", statistics.median(ratios), 1.0)
            )
    return {
        "tokens_per_second": {
            name: {
                str(clients): [round(f(values), 1) for f in (statistics.median, min, max)]
                for clients, values in by_clients.items()
            }
            for name, by_clients in speed.items()
        },
        "requests": len(waits),
        "wait_seconds": {"median": round(median, 3), "max": round(max(waits), 3)},
        "statuses_of_many": many.statuses,
        "targets": targets,
        "compared": len(compared),
        "different": different,
    }


if __name__ == "__main__":
    main()
