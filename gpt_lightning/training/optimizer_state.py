"""An optimizer's state from another run or a file, with which a run starts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from gpt_lightning.training.distributed import load_optimizer_state
from gpt_lightning.training.optimizer import OptimizerConfig


def check_moments(config: OptimizerConfig, saved: dict[str, Any], dims: Mapping[str, int]) -> None:
    """Check that an optimizer state has what the optimizer of a run needs for each parameter.

    Args:
        dims: Number of dimensions of each parameter, by name.

    Raises:
        ValueError: ``saved`` lacks a parameter, or is the state of another optimizer.
    """
    by_name = _state_by_name(saved)
    for name, dim in dims.items():
        keys = config.state_keys(name, dim)
        if not keys:
            raise ValueError(
                f"init_optimizer: {config.name} has no state with its settings; leave --init_optimizer out"
            )
        state = by_name.get(name)
        if state is None:
            raise ValueError(
                f"init_optimizer: the source has no optimizer state for {name}; "
                "leave --init_optimizer out"
            )
        if not keys <= state.keys():
            raise ValueError(
                f"init_optimizer: the source was trained with another optimizer: for {name} it has "
                f"{', '.join(state) or 'nothing'}, this run needs {', '.join(sorted(keys))}; leave "
                "--init_optimizer out, or give its --model.optimizer"
            )


def load_optimizer_moments(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load the state of ``saved``, which is checked, by parameter name; keep the learning rate and weight decay."""
    by_name = _state_by_name(saved)
    own = optimizer.state_dict()
    for group in own["param_groups"]:
        for index, name in zip(group["params"], group["param_names"], strict=True):
            own["state"][index] = {
                key: value.clone() if isinstance(value, torch.Tensor) else value
                for key, value in by_name[name].items()
            }
    load_optimizer_state(optimizer, own)


def _state_by_name(saved: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what an optimizer state has for each parameter."""
    return {
        name: saved["state"][index]
        for group in saved["param_groups"]
        for index, name in zip(group["params"], group.get("param_names", ()), strict=True)
        if index in saved["state"]
    }
