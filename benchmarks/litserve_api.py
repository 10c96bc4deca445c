"""LitServe's interface for serving_peer.py: a module, since LitServe's worker process imports it."""

from typing import Any

import litserve
from serving_peer import Generator


class GenerateAPI(litserve.LitAPI):  # type: ignore[misc]
    """Requests that LitServe has collected, as one batch of transformers' generate."""

    folder: str

    def setup(self, device: str) -> None:
        self.generator = Generator(self.folder)

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        return request

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, requests: list[dict[str, Any]]) -> list[list[int]]:
        return self.generator(requests)

    def unbatch(self, output: list[list[int]]) -> list[list[int]]:
        return output

    def encode_response(self, output: list[int]) -> dict[str, Any]:
        return {"ids": output}
