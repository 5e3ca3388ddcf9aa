"""The ASGI application: routers, health, metrics, and errors in one shape, behind the guard."""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, FastAPI, Query
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

from moa_serve.api import admin, dashboard, openai
from moa_serve.api.context import Server, server_of
from moa_serve.api.document import describe
from moa_serve.api.errors import FAILED, JsonResponse, NotReady, error_response, response_of
from moa_serve.api.guard import CLIENT_CLOSED_REQUEST, NO_ROUTE, Guard
from moa_serve.errors import EngineError, MoaError, Overloaded
from moa_serve.model.devices import cuda_status
from moa_serve.native.library import status

router = APIRouter()

_OPENAPI = "/openapi.json"


def build_app(server: Server) -> ASGIApp:
    """The application of one server, to be given to uvicorn."""
    app = new_app(server.version)
    app.state.server = server
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(MoaError, _on_moa_error)
    app.add_exception_handler(Exception, _on_bug)

    def check_room(path: str) -> None:
        if path in openai.WORKING:
            try:
                server.check_room()
            except Overloaded:
                server.metrics.observe_unread()
                raise

    return Guard(
        app,
        server.settings,
        is_draining=lambda: server.is_draining,
        check_room=check_room,
        metrics=server.metrics,
        handler_of=handlers(),
    )


def new_app(version: str) -> FastAPI:
    """All routes and the document that tells of them, without a server."""
    app = FastAPI(title="moa_serve", version=version, openapi_url=_OPENAPI, docs_url=None, redoc_url=None, redirect_slashes=False)
    for routes in _routers():
        app.include_router(routes)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    return app


def _routers() -> tuple[APIRouter, ...]:
    return router, openai.router, admin.router, dashboard.router


def handlers() -> Callable[[str], str]:
    """Gives the template of the route that a path belongs to, as metrics name it: a client can invent paths, and no templates."""
    routes = [route for routes in _routers() for route in routes.routes if isinstance(route, APIRoute)]
    exact = {_OPENAPI, *(route.path for route in routes if "{" not in route.path)}
    patterns = [(route.path_regex, route.path.replace(":path}", "}")) for route in routes if "{" in route.path]

    def handler_of(path: str) -> str:
        if path in exact:
            return path
        return next((template for pattern, template in patterns if pattern.match(path)), NO_ROUTE)

    return handler_of


@router.get("/health/live")
async def live(request: Request) -> Response:
    """The process can still serve: restart it where this is no 200."""
    if server_of(request).engine.failure is not None:
        raise NotReady("the engine has stopped; restart the server")
    return JsonResponse({"status": "ok"})


@router.get("/health")
@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """New requests are served; a full queue changes nothing in that."""
    server_of(request).check_ready()
    return JsonResponse({"status": "ok"})


@router.get("/version")
async def version(request: Request) -> Response:
    """What this server is: versions, the base, and what computes."""
    server = server_of(request)
    engine = server.engine.engine
    return JsonResponse(
        {
            "version": server.version,
            "base": server.base_name,
            "base_digest": server.base_digest,
            "backend": engine.backend,
            "native": status(),
            "cuda": cuda_status(),
            "device": str(engine.model.device),
            "dtype": str(engine.model.dtype).removeprefix("torch."),
            "base_dtype": engine.model.base_dtype,
            "max_model_len": server.max_model_len,
        }
    )


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(
    request: Request,
    names: Annotated[list[str] | None, Query(alias="name[]", description="Families, or series of theirs, that are wanted.")] = None,
) -> Response:
    """Everything that is counted, for Prometheus; with `?name[]=`, given once or more often, only those families."""
    content, media_type = await server_of(request).metrics.page(names)
    return Response(content, media_type=media_type)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What the router says: no such path, no such method."""
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    message = {404: f"there is nothing at {request.url.path[:200]!a}", 405: f"{request.method} is not allowed here"}
    status = error.status_code
    code = codes.get(status, "invalid_request" if status < 500 else "internal_error")
    return error_response(status, code, message.get(status, str(error.detail)), headers=error.headers)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_moa_error(request: Request, error: Exception) -> Response:
    return response_of(error)


async def _on_bug(request: Request, error: Exception) -> Response:
    """The guard gets the exception after this answer, and logs it."""
    return response_of(EngineError(FAILED))
