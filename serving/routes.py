"""The routes: what each takes, who may use it, and how it fails. Runs over any `Gateway`."""

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serving.admission import Admission
from serving.border import Access, Border, Endpoint, error_response, needs, open_to_all
from serving.classification import Classification, parse_classification, parse_form
from serving.completion import (
    Completion,
    parse_chat,
    parse_completion,
    parse_detokenize,
    parse_tokenize,
)
from serving.schema import RequestError
from serving.service import Service

JSON = "application/json"
FORM = "multipart/form-data"


@dataclass(frozen=True)
class Bounds:
    """See `Border`."""

    max_body_bytes: int = 8 << 20
    max_requests: int = 1000


def create_app(service: Service, access: Access, admission: Admission, bounds: Bounds) -> Border:
    # Its own documentation pages would load scripts from elsewhere.
    app = FastAPI(title="Heliostat", openapi_url=None, docs_url=None, redoc_url=None)
    # `/v1/models/` is not redirected: the answer would name a host that the client chose.
    app.router.redirect_slashes = False
    _add_errors(app)
    # The router takes the first route that fits, and this is where the calls are.
    _add_asking(app, service, admission)
    _add_looking(app, service)
    _add_page(app)
    return Border(
        app,
        access,
        max_body_bytes=bounds.max_body_bytes,
        body_seconds=service.deadline_seconds,
        max_requests=bounds.max_requests,
    )


def _add_looking(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    @open_to_all
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def models() -> Response:
        cards = [card.body() for card in service.gateway.models()]
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        return JSONResponse(service.card(name).body())


def _add_asking(app: FastAPI, service: Service, admission: Admission) -> None:
    def post(path: str) -> Callable[[Endpoint], Endpoint]:
        # Without FastAPI's own reading of parameters, of which these have none.
        def add(endpoint: Endpoint) -> Endpoint:
            app.add_route(path, endpoint, ["POST"])
            return endpoint

        return add

    @post("/v1/completions")
    @needs("generate")
    async def completions(request: Request) -> Response:
        asked = parse_completion(await _json(request), service.limits)
        return await _complete(request, asked)

    @post("/v1/chat/completions")
    @needs("generate")
    async def chat(request: Request) -> Response:
        asked = parse_chat(await _json(request), service.limits)
        return await _complete(request, asked)

    async def _complete(request: Request, asked: Completion) -> Response:
        call = await admission.admit(request.scope, asked, service.deadline_seconds)
        return await call.answered(service.complete(asked, call.identity, call.ends, call.used))

    @post("/v1/classify")
    @needs("classify")
    async def classify(request: Request) -> Response:
        asked = await _classification(request, service)
        call = await admission.admit(request.scope, asked, service.deadline_seconds)
        return await call.answered(service.classify(asked, call.identity, call.ends))

    @post("/tokenize")
    @needs("generate")
    async def tokenize(request: Request) -> Response:
        asked = parse_tokenize(await _json(request))
        call = await admission.admit(request.scope, asked, service.deadline_seconds)
        return await call.answered(service.tokenize(asked, call.identity, call.ends))

    @post("/detokenize")
    @needs("generate")
    async def detokenize(request: Request) -> Response:
        asked = parse_detokenize(await _json(request))
        call = await admission.admit(request.scope, asked, service.deadline_seconds)
        return await call.answered(service.detokenize(asked, call.identity, call.ends))


def _add_page(app: FastAPI) -> None:
    page, policy = playground()

    @app.get("/")
    @open_to_all
    async def index() -> Response:
        headers = {
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _json(request: Request) -> bytes:
    """The body. Other content types are refused: a browser sends them from any site unasked."""
    kind = _content_type(request)
    if kind != JSON:
        raise RequestError(415, f"content-type must be {JSON}, not {kind[:80] or 'nothing'}")
    return await request.body()


async def _classification(request: Request, service: Service) -> Classification:
    kind = _content_type(request)
    if kind == FORM:
        header = request.headers["content-type"].encode("latin-1")
        return parse_form(header, await request.body(), service.limits)
    if kind != JSON:
        raise RequestError(
            415, f"content-type must be {JSON} or {FORM}, not {kind[:80] or 'nothing'}"
        )
    return parse_classification(await request.body(), service.limits)


def playground() -> tuple[bytes, str]:
    """The page, and the policy that lets exactly its own script and style run."""
    page = (resources.files("serving") / "playground" / "index.html").read_bytes()

    def digests(tag: bytes) -> str:
        blocks = re.findall(b"<%s>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(block).digest()).decode() for block in blocks)
        return " ".join(f"'sha256-{digest}'" for digest in hashes)

    return page, (
        f"default-src 'none'; script-src {digests(b'script')}; style-src {digests(b'style')}; "
        "connect-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.scope['path'][:200]}: {error.detail}"
        response = error_response(RequestError(error.status_code, message))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def fault(_: Request, __: Exception) -> Response:
        return error_response(RequestError(500, "the service failed on this request"))
