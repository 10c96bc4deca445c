"""Removes stale rank variables (``RANK``, ``SLURM_PROCID``, …) before Lightning is imported and reads them."""

import os
from collections.abc import MutableMapping

# variable with a process's rank → variable with the number of processes, which every real launcher sets too
COUNT_OF_RANK = {
    "RANK": "WORLD_SIZE",
    "LOCAL_RANK": "WORLD_SIZE",
    "SLURM_PROCID": "SLURM_NTASKS",
    "SLURM_LOCALID": "SLURM_NTASKS",
    "JSM_NAMESPACE_RANK": "JSM_NAMESPACE_SIZE",
}


def remove_stale_ranks(environment: MutableMapping[str, str] = os.environ) -> None:
    """Remove ranks that no launcher has set for this process, for example left over from an earlier session.

    Lightning takes a process with ``RANK=1`` for the second of several processes, which writes no files.
    """
    for rank, count in COUNT_OF_RANK.items():
        if count not in environment:
            environment.pop(rank, None)
