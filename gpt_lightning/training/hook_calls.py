"""Lightning's calls of hooks, without what they do for nothing: a step has six for each callback, and twenty more."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from lightning.pytorch import Callback
from lightning.pytorch.profilers import PassThroughProfiler

_OF_A_STEP = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
_NOTHING = nullcontext()


class Unprofiled(PassThroughProfiler):
    """As Lightning's, which makes a generator for each call that it does not measure."""

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return _NOTHING


def pass_over_idle_hooks(callbacks: Iterable[Callback]) -> None:
    """Of a step, those that a callback has not made its own: Lightning calls nothing that is no function."""
    for callback in callbacks:
        for hook in _OF_A_STEP:
            own = hook in vars(callback)  # as LambdaCallback's
            if not own and getattr(type(callback), hook) is getattr(Callback, hook):
                setattr(callback, hook, None)
