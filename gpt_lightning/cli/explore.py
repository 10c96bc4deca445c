"""``explore``: a page to look into models, and the endpoint of ``serve``."""

import webbrowser
from functools import partial

from jsonargparse import ArgumentParser

from gpt_lightning.cli.parsing import parse
from gpt_lightning.cli.serve import checked_settings, extra_packages, server_parser


def run(arguments: list[str]) -> int:
    """Show a page to look into models: next tokens, texts, models side by side, and what each layer says.

    The page is for a browser on this machine and loads nothing from the network. A run that is still training can
    be explored too: the page notices new checkpoints. The server also has the endpoint of the command serve.
    """
    settings = parse(_parser(), arguments)
    with extra_packages("explore"):
        from gpt_lightning.exploring.api import routes
        from gpt_lightning.exploring.explorer import Explorer
        from gpt_lightning.exploring.page_files import is_page_path, page_routes
        from gpt_lightning.serving.endpoint import endpoint_routes
        from gpt_lightning.serving.model_thread import ModelThread
        from gpt_lightning.serving.served_model import load_served_model, model_ids
        from gpt_lightning.serving.server import build_app, listen, run_server, url_of

    sources, rules, limits, loading = checked_settings(settings, is_page_path)
    with listen(settings.host, settings.port) as listener:
        thread = ModelThread()
        try:
            load = partial(load_served_model, settings=loading, thread=thread, limits=limits)
            explorer = Explorer(dict(zip(model_ids(sources), sources, strict=True)), load)
            explorer.load_sources()
            app = build_app(
                [*page_routes(), *routes(explorer), *endpoint_routes(explorer.models)], rules
            )
            url = f"{url_of(listener, settings.host)}/"

            def show_address() -> None:
                print(f"{url} shows {', '.join(explorer.models)}; Ctrl-C stops it", flush=True)
                if settings.open:
                    webbrowser.open_new_tab(url)

            return run_server(app, listener, show_address)
        finally:
            thread.close()


def _parser() -> ArgumentParser:
    parser = server_parser("explore", run.__doc__)
    parser.add_argument("--open", action="store_true", help="Open the page in a browser.")
    return parser
