"""The API: pictures, jobs, models, health and metrics. Each route checks, calls a service and formulates the
answer.
"""

from __future__ import annotations

import asyncio
import posixpath
import urllib.parse
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from resshift.config import MAX_OUTSCALE
from resshift.output_names import CONTENT_TYPES
from serve.encode import extension
from serve.http.body import Body, Reader
from serve.http.keys import Caller
from serve.http.limits import LEAST_TIMEOUT_S, Deadline
from serve.http.metrics import CONTENT_TYPE as METRICS_TYPE
from serve.http.options import BulkBody, PictureOptions, negotiated_format
from serve.http.problems import KINDS, MEDIA_TYPE, Problem, option_problem
from serve.jobs import JobView
from serve.models import find_model
from serve.pictures import Result
from serve.services import caller, services, unless_gone

router = APIRouter()
Asking = Annotated[Caller, Depends(caller)]
IdempotencyKey = Annotated[str, Header(max_length=256, description="the same key again gives the same job")]

_PROBLEM = {"description": "a problem (RFC 9457)", "content": {MEDIA_TYPE: {"schema": {"type": "object"}}}}
_PROBLEMS: dict[int | str, dict[str, Any]] = dict.fromkeys(("4XX", "5XX"), _PROBLEM)
_PICTURE = {"type": "string", "format": "binary"}
_UPSCALE_DOC: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The encoded picture (JPEG, PNG, WebP, TIFF, GIF, BMP, HEIC, AVIF or JPEG XL: "
        "recognised by content), or a form with it in the field `image` and options in the others. For a "
        "model that fills holes, `mask` has a mask, bright or transparent in the hole; without one the "
        "hole is what is transparent in the picture.",
        "content": {
            "application/octet-stream": {"schema": _PICTURE},
            "image/*": {"schema": _PICTURE},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": _PICTURE, "mask": _PICTURE},
                    "required": ["image"],
                }
            },
        },
    },
    "parameters": [
        {
            "name": "X-Request-Timeout",
            "in": "header",
            "schema": {"type": "number", "minimum": LEAST_TIMEOUT_S},
            "description": "seconds that the answer may take",
        },
        {
            "name": "Prefer",
            "in": "header",
            "schema": {"type": "string"},
            "description": "`respond-async`: 202 and a job",
        },
    ],
}


@router.post(
    "/v1/upscale",
    summary="Upscale a picture",
    openapi_extra=_UPSCALE_DOC,
    response_class=Response,
    responses=_PROBLEMS
    | {
        200: {
            "description": "the picture",
            "content": {kind: {"schema": _PICTURE} for kind in (*CONTENT_TYPES.values(), "application/zip")},
        },
        202: {
            "description": "a job that will have the picture",
            "content": {"application/json": {"schema": {"type": "object"}}},
        },
    },
)
async def upscale(
    request: Request,
    asking: Asking,
    options: Annotated[PictureOptions, Query()],
    idempotency_key: IdempotencyKey = "",
) -> Response:
    """Upscale one picture.

    The answer is the picture in the asked format; `Server-Timing` tells where the time went. Too many at once
    are refused with 503 and `Retry-After`; a key that used up its share with 429. If the client goes away,
    its work is dropped.
    """
    service, limits = services(request), services(request).settings.limits
    deadline = Deadline.asked(
        request.headers.get("x-request-timeout"), limits.timeout_s, limits.max_timeout_s
    )
    is_async = "respond-async" in request.headers.get("prefer", "").lower()
    if not is_async:
        service.pictures.admission.check(deadline.left_s)
    reader = Reader(limits, service.budget)
    try:
        body = await reader.read(request)
        options = merged(options, body.options)
        accept = "" if options.trajectory else request.headers.get("accept", "")
        format = negotiated_format(options.format, accept)
        if is_async:
            return await _later(request, asking, body, options, format, idempotency_key)
        work = service.pictures.upscale(
            body.picture, options, format, deadline, asking.quota.take_pixels, body.mask
        )
        result = await unless_gone(request, work)
    finally:
        reader.close()
    service.metrics.megapixels.labels("in").inc(result.sizes[0][0] * result.sizes[0][1] / 1e6)
    service.metrics.megapixels.labels("out").inc(result.sizes[1][0] * result.sizes[1][1] / 1e6)
    for phase, seconds in result.seconds.items():
        service.metrics.phases.labels(phase).observe(seconds)
    return Response(
        result.data, media_type=result.content_type, headers=result_headers(result, body.filename)
    )


def merged(options: PictureOptions, fields: Mapping[str, Any]) -> PictureOptions:
    """Return the options of the query with those of a form, which win.

    Raises:
        Problem: bad_option.
    """
    if not fields:
        return options
    try:
        return PictureOptions.model_validate(options.model_dump(exclude_unset=True) | dict(fields))
    except ValidationError as error:
        raise option_problem(error, PictureOptions.model_fields) from None


async def _later(
    request: Request, asking: Caller, body: Body, options: PictureOptions, format: Any, idempotency_key: str
) -> Response:
    pictures = services(request).pictures
    find_model(pictures.models, options.model)
    header = await pictures.decoding.header(body.picture)
    asking.quota.take_pixels(header.width * header.height)
    view = await services(request).jobs.submit_picture(
        body.picture, options, format, asking.name, idempotency_key, body.mask
    )
    return JSONResponse(
        view, 202, {"Location": f"/v1/jobs/{view['id']}", "Preference-Applied": "respond-async"}
    )


def result_headers(result: Result, filename: str) -> dict[str, str]:
    """Return the headers that go with a result."""
    stem = posixpath.splitext(posixpath.basename(filename.replace("\\", "/")))[0] or "picture"
    factor = result.sizes[1][0] / result.sizes[0][0]
    ending = "_steps.zip" if result.has_steps else f".{extension(result.format)}"
    name = urllib.parse.quote(f"{stem[:120]}_x{factor:.3g}{ending}")
    timing = ", ".join(f"{phase};dur={1000 * seconds:.1f}" for phase, seconds in result.seconds.items())
    return {
        "Server-Timing": timing,
        "Content-Disposition": f"inline; filename*=UTF-8''{name}",
        "X-Model": urllib.parse.quote(result.model[0]),
        "X-Model-Identity": result.model[1],
        "X-Picture-Size": f"{result.sizes[0][0]}x{result.sizes[0][1]}",
        "X-Result-Size": f"{result.sizes[1][0]}x{result.sizes[1][1]}",
        # Percent-encoded: notes contain names from files.
        "X-Notes": urllib.parse.quote("; ".join(result.notes), safe=" ;,.()x"),
    }


@router.head("/v1/models", include_in_schema=False)
@router.get("/v1/models", summary="List the models", responses=_PROBLEMS)
async def models(request: Request, asking: Asking) -> dict[str, Any]:
    """Return the models and what a request may ask of them."""
    del asking
    service = services(request)
    limits = service.settings.limits
    listed = [
        {
            "name": name,
            "identity": model.facts.identity,
            "scale": model.facts.scale,
            "outscale": [model.facts.scale] if model.facts.has_one_scale else f"(0, {MAX_OUTSCALE}]",
            "steps": model.facts.steps,
            "seed": model.facts.draws_noise,
            "fidelity": model.facts.has_estimate,
            "mask": model.facts.fills_holes,
            "faces": bool(service.pictures.detector) and model.facts.takes_faces,
            "ready": service.pictures.readiness[name].is_ready,
        }
        for name, model in service.pictures.models.items()
    ]
    allowed = {
        "body_bytes": limits.max_body_bytes,
        "megapixels": limits.megapixels,
        "output_megapixels": limits.output_megapixels,
    }
    return {"models": listed, "limits": allowed, "formats": list(CONTENT_TYPES)}


# The body is not a parameter: FastAPI would read it, without limits of size or time, before it checks the
# key.
_JOB_DOC = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": BulkBody.model_json_schema()}},
    }
}


@router.post(
    "/v1/jobs", status_code=202, summary="Submit a bulk job", responses=_PROBLEMS, openapi_extra=_JOB_DOC
)
async def submit(
    request: Request, response: Response, asking: Asking, idempotency_key: IdempotencyKey = ""
) -> JobView:
    """Upscale everything below `source` into `target`: the engine, ledger and report of `jobs/upscale.py`.

    Submitting the same places and options again continues: what the ledger at the target has is not done
    twice.
    """
    service = services(request)
    reader = Reader(service.settings.limits, service.budget)
    try:
        job = await reader.read_json(request, BulkBody)
    finally:
        reader.close()
    view = await service.jobs.submit_bulk(job, asking.name, idempotency_key)
    response.headers["Location"] = f"/v1/jobs/{view['id']}"
    return view


@router.head("/v1/jobs", include_in_schema=False)
@router.get("/v1/jobs", summary="List your jobs", responses=_PROBLEMS)
async def jobs(request: Request, asking: Asking) -> dict[str, list[JobView]]:
    """Return the caller's jobs, the latest first."""
    return {"jobs": await services(request).jobs.list(asking.name)}


@router.head("/v1/jobs/{id}", include_in_schema=False)
@router.get("/v1/jobs/{id}", summary="See how a job stands", responses=_PROBLEMS)
async def job(request: Request, asking: Asking, id: str) -> JobView:
    """Return a job: its state, and for one that runs the counts, rates and seconds left
    (`progress.eta_s`).
    """
    return await services(request).jobs.get(id, asking.name)


@router.delete(
    "/v1/jobs/{id}",
    summary="Cancel or forget a job",
    responses=_PROBLEMS | {204: {"description": "forgotten"}},
)
async def cancel(request: Request, asking: Asking, id: str) -> Response:
    """Cancel a job that has not ended (200 and the job); forget one that has (204). What a bulk job wrote
    stays.
    """
    view = await services(request).jobs.cancel(id, asking.name)
    return Response(status_code=204) if view is None else JSONResponse(view)


@router.get(
    "/v1/jobs/{id}/report",
    summary="Get the report of a bulk job",
    response_class=Response,
    responses=_PROBLEMS,
)
async def report(request: Request, asking: Asking, id: str, format: str = "json") -> Response:
    """Return the report: `format` is json, csv or html."""
    data, content_type = await services(request).jobs.report(id, asking.name, format)
    # The page of the report runs nothing and needs its own style sheet.
    policy = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
    return Response(data, headers={"Content-Type": content_type, "Content-Security-Policy": policy})


@router.get(
    "/v1/jobs/{id}/result", summary="Get the picture of a job", response_class=Response, responses=_PROBLEMS
)
async def result(request: Request, asking: Asking, id: str) -> Response:
    """Return the picture of a job that was asked for with `Prefer: respond-async`; 409 with `Retry-After`
    until it is done.
    """
    data, content_type = await services(request).jobs.result(id, asking.name)
    return Response(data, headers={"Content-Type": content_type})


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", summary="Does the gateway run?")
async def healthz() -> dict[str, str]:
    """Answer that the process runs and its event loop turns."""
    await asyncio.sleep(0)
    return {"status": "ok"}


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz", summary="Can pictures be upscaled?", responses={503: {"description": "not at the moment"}}
)
async def readyz(request: Request) -> Response:
    """Return 200 when every model had a forward pass in the last seconds or may sleep, else 503; the body
    says which.
    """
    readiness = services(request).pictures.readiness
    body = {
        "ready": all(one.is_ready for one in readiness.values()),
        "models": {
            name: {
                "ready": one.is_ready,
                "asleep": one.is_asleep,
                "replicas": one.num_replicas,
                "last_pass_s": None if one.pass_age_s is None else round(one.pass_age_s, 2),
            }
            for name, one in readiness.items()
        },
    }
    return JSONResponse(body, 200 if body["ready"] else 503, {} if body["ready"] else {"Retry-After": "2"})


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", summary="Figures for Prometheus", response_class=Response)
async def metrics(request: Request) -> Response:
    """Return the figures of this gateway."""
    service = services(request)
    service.count()
    return Response(service.metrics.text(), headers={"Content-Type": METRICS_TYPE})


@router.head("/problems/{kind}", include_in_schema=False)
@router.get("/problems/{kind}", summary="What a kind of problem means", responses=_PROBLEMS)
async def problem(kind: str) -> dict[str, Any]:
    """Return the meaning of a problem's `type`."""
    if kind not in KINDS:
        raise Problem("not_found", f"there is no kind of problem {kind[:40]!r}; kinds: {', '.join(KINDS)}")
    return {"kind": kind, "status": KINDS[kind].status, "title": KINDS[kind].title}
