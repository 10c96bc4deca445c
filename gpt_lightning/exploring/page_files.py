"""The files of the page, read once and served from memory."""

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


def page_routes() -> list[Route]:
    """``/`` is the page, ``/page/NAME`` its other files."""
    folder = files("gpt_lightning.exploring") / "page"
    routes = [_file_route("/", (folder / "index.html").read_bytes(), "html")]
    for file in folder.iterdir():
        suffix = file.name.rpartition(".")[2]
        if suffix in _TYPES and file.name != "index.html":
            routes.append(_file_route(f"/page/{file.name}", file.read_bytes(), suffix))
    return routes


def is_page_path(path: str) -> bool:
    """Whether ``path`` is one of the page's files, which hold nothing of a model and need no token."""
    return path == "/" or path.startswith("/page/")


def _file_route(path: str, content: bytes, suffix: str) -> Route:
    async def answer(request: Request) -> Response:
        return Response(content, media_type=_TYPES[suffix])

    return Route(path, answer)
