"""What a launcher of several processes says in the environment, before Lightning is imported and reads it."""

import os
from collections.abc import MutableMapping

# a process's place among others → what a launcher that means it sets too
_PLACES = {
    "RANK": "WORLD_SIZE",
    "LOCAL_RANK": "WORLD_SIZE",
    "SLURM_PROCID": "SLURM_NTASKS",
    "SLURM_LOCALID": "SLURM_NTASKS",
    "JSM_NAMESPACE_RANK": "JSM_NAMESPACE_SIZE",
}


def forget_leftover_ranks(environment: MutableMapping[str, str] = os.environ) -> None:
    """Remove ranks that no launcher has set for this process, as an earlier session or a shell's profile leaves them.

    Lightning takes a process with ``RANK=1`` for the second of several, which writes nothing.
    """
    for place, count in _PLACES.items():
        if count not in environment:
            environment.pop(place, None)
