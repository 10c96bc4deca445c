"""``serve``: OpenAI's completions endpoint for one or more models."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from gpt_lightning.cli.generate import (
    DEVICE_HELP,
    DTYPE_HELP,
    N_HEADS_HELP,
    SOURCE_HELP,
    DType,
    resolve_device,
)
from gpt_lightning.cli.options import CONFIG_HELP
from gpt_lightning.cli.parsing import parse
from gpt_lightning.cli.text_options import TextList

if TYPE_CHECKING:
    from gpt_lightning.serving.access import AccessRules
    from gpt_lightning.serving.served_model import LoadSettings
    from gpt_lightning.serving.worker import WorkerLimits


def run(arguments: list[str]) -> int:
    """Serve models through POST /v1/completions, as OpenAI's API does, until Ctrl-C or SIGTERM.

    Requests that come at the same time are decoded together. Only this machine reaches the server, unless --host
    says otherwise; then every request needs a token.
    """
    settings = parse(_parser(), arguments)
    with extra_packages("serve"):
        from gpt_lightning.serving.endpoint import endpoint_routes
        from gpt_lightning.serving.model_thread import ModelThread
        from gpt_lightning.serving.served_model import load_served_model, model_ids
        from gpt_lightning.serving.server import build_app, listen, run_server, url_of

    sources, rules, limits, loading = checked_settings(settings)
    with listen(settings.host, settings.port) as listener:
        thread = ModelThread()
        try:
            models = {
                name: load_served_model(source, name, loading, thread, limits)
                for source, name in zip(sources, model_ids(sources), strict=True)
            }
            app = build_app(endpoint_routes(models), rules)
            url = url_of(listener, settings.host)
            ready = f"{url}/v1 serves {', '.join(models)}; Ctrl-C stops it"
            return run_server(app, listener, lambda: print(ready, flush=True))
        finally:
            thread.close()


def checked_settings(
    settings: Namespace, public_paths: Callable[[str], bool] = lambda path: False
) -> "tuple[list[str], AccessRules, WorkerLimits, LoadSettings]":
    """SOURCEs, access rules, limits and how models are loaded, from the options of :func:`server_parser`."""
    import torch

    from gpt_lightning.serving.access import access_rules, read_token
    from gpt_lightning.serving.served_model import LoadSettings
    from gpt_lightning.serving.worker import WorkerLimits

    sources: list[str] = settings["from"] or []
    if not all(sources) or not sources:
        raise ValueError("from: is missing; give the model with --from SOURCE")
    limits = WorkerLimits(settings.max_batch, settings.max_queue, settings.timeout)
    file = settings.token_file
    content = Path(os.path.expanduser(file)).read_bytes() if file else None
    token = read_token(os.environ.get("GPT_LIGHTNING_TOKEN"), content)
    rules = access_rules(settings.host, token, public_paths)
    dtype: torch.dtype | None = getattr(torch, settings.dtype) if settings.dtype else None
    return (
        sources,
        rules,
        limits,
        LoadSettings(resolve_device(settings.device), dtype, settings.n_heads),
    )


@contextmanager
def extra_packages(command: str) -> Iterator[None]:
    """Say which extra to install if a package of the server is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("gpt_lightning"):
            raise
        raise ValueError(
            f"{command}: needs the package {error.name}; pip install 'gpt-lightning[explore]'"
        ) from error


def server_parser(command: str, description: str | None) -> ArgumentParser:
    """Parser of the options that serve and explore share."""
    parser = ArgumentParser(
        prog=f"gpt_lightning {command}", description=description, exit_on_error=False
    )
    add = parser.add_argument
    add("--config", action="config", help=CONFIG_HELP)
    add(
        "--from",
        action=TextList,
        nargs="+",
        metavar="SOURCE",
        help=f"The models. {SOURCE_HELP}",
    )
    add("--n_heads", type=int | None, help=N_HEADS_HELP)
    add("--port", type=int, default=8501, help="Port; 0 = a free one.")
    add(
        "--host",
        type=str,
        default="127.0.0.1",
        help="Address that is listened on. Any other than this machine's own, such as 0.0.0.0, needs a token.",
    )
    add(
        "--token_file",
        type=str | None,
        metavar="FILE",
        help="File with the token that clients send as 'Authorization: Bearer TOKEN'; "
        "null = the environment variable GPT_LIGHTNING_TOKEN, and no token without it.",
    )
    add("--max_batch", type=int, default=16, help="Texts that are decoded together.")
    add(
        "--max_queue",
        type=int,
        default=64,
        help="Requests that may wait; further ones get the status 429.",
    )
    add("--timeout", type=float, default=600.0, help="Seconds after which a request is given up.")
    add("--device", type=str | None, help=DEVICE_HELP)
    add("--dtype", type=DType | None, help=DTYPE_HELP)
    return parser


def _parser() -> ArgumentParser:
    return server_parser("serve", run.__doc__)
