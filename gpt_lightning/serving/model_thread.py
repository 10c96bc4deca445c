"""The one thread that calls models: jobs and decoding steps in turn."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar, final

import torch

from gpt_lightning.serving.generation_request import BusyError

if TYPE_CHECKING:
    from gpt_lightning.serving.worker import ModelWorker

T = TypeVar("T")

MAX_JOBS = 32  # jobs that wait


@final
class ModelThread:
    """The one thread that calls models: two at once would share the processors and each be slower.

    It takes one job, then one decoding step of every model, and begins again.

    Attributes:
        executor: Threads that help it to draw random numbers.
        text_executor: One thread for long texts: each thread that tokenizes takes 11 MB.
    """

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(torch.get_num_threads(), "draws")
        self.text_executor = ThreadPoolExecutor(1, "tokenizer")
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._workers: list[ModelWorker] = []
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)
        self._thread.start()

    async def run(self, function: Callable[[], T]) -> T:
        """Result of ``function()``, called between two decoding steps. Raises :class:`BusyError` if too many wait."""
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:  # the caller gets it
                future.set_exception(error)

        with self._changed:
            if len(self._jobs) >= MAX_JOBS or self._is_closing:
                raise BusyError(1)
            self._jobs.append(job)
            self._changed.notify()
        return await asyncio.wrap_future(future)

    def add_worker(self, worker: "ModelWorker") -> None:
        with self._changed:
            self._workers.append(worker)

    def remove_worker(self, worker: "ModelWorker") -> None:
        with self._changed:
            self._workers.remove(worker)

    def notify(self) -> None:
        """Say that a worker has something to do."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """End the thread after the step that is being computed."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()
        self.executor.shutdown()
        self.text_executor.shutdown()

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._changed:
                while not (
                    self._is_closing or self._jobs or any(w.has_work for w in self._workers)
                ):
                    self._changed.wait()
                if self._is_closing:
                    return
                job = self._jobs.popleft() if self._jobs else None
                workers = [w for w in self._workers if w.has_work]
            if job is not None:
                job()
            for worker in workers:
                worker.step()
