"""Peers of serving.py as servers: python benchmarks/serving_peer.py loop|litserve MODEL PORT

``loop`` calls transformers' generate for one request after the other. ``litserve`` calls it for up to 16 requests that
LitServe has collected. Both answer POST /predict with {"prompt": [ids], "max_tokens": n} → {"ids": [ids]}.
"""

import sys
import threading
from typing import Any

import torch
from transformers import GenerationConfig, GPT2LMHeadModel

BATCH, WAIT_SECONDS = 16, 0.01


class Generator:
    """Sampling with transformers: a batch of prompts → new ids of each."""

    def __init__(self, folder: str) -> None:
        self.model = GPT2LMHeadModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def __call__(self, requests: list[dict[str, Any]]) -> list[list[int]]:
        width = max(len(request["prompt"]) for request in requests)
        count = max(request["max_tokens"] for request in requests)
        padding = [width - len(request["prompt"]) for request in requests]
        ids = torch.tensor([[0] * p + r["prompt"] for p, r in zip(padding, requests, strict=True)])
        mask = torch.tensor([[0] * p + [1] * (width - p) for p in padding])
        settings = GenerationConfig(
            do_sample=True, top_k=0, min_new_tokens=count, max_new_tokens=count, pad_token_id=0
        )
        answer = self.model.generate(ids, attention_mask=mask, generation_config=settings)
        return [
            row[width : width + r["max_tokens"]].tolist()
            for row, r in zip(answer, requests, strict=True)
        ]


def serve_loop(folder: str, port: int) -> None:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    generator, lock = Generator(folder), threading.Lock()

    def one(request: dict[str, Any]) -> list[int]:
        with lock:
            return generator([request])[0]

    async def predict(request: Request) -> Response:
        body = await request.json()
        return JSONResponse({"ids": await run_in_threadpool(one, body)})

    app = Starlette(routes=[Route("/predict", predict, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def serve_litserve(folder: str, port: int) -> None:
    import litserve
    from litserve_api import GenerateAPI

    api = GenerateAPI(max_batch_size=BATCH, batch_timeout=WAIT_SECONDS)
    api.folder = folder
    server = litserve.LitServer(api, accelerator="cpu", timeout=120)
    server.run(host="127.0.0.1", port=port, log_level="error", generate_client_file=False)


if __name__ == "__main__":
    {"loop": serve_loop, "litserve": serve_litserve}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
