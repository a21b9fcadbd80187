"""Routes of exports: order, look, download. What is ordered is made by a driver, beside the server."""

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field

from bitfront.documents import export_document
from bitfront.server.context import ExportId, Here, JobId, PointId
from bitfront.server.policy import check_again
from bitfront.server.problems import responses
from bitfront.server.security import READ, Submitter
from engines import ENGINES, LOADS, TARGETS, load_target
from store.errors import ConflictError, NotFoundError
from store.queries import find_job
from store.submissions import DONE, exports_of, find_export, order_export

router = APIRouter(
    tags=["exports"], dependencies=[READ], responses=responses(401, 403, 404, 422, 503)
)


class Order(BaseModel):
    """Targets to write a point for."""

    model_config = ConfigDict(extra="forbid")

    targets: list[Annotated[str, Field(max_length=40)]] = Field(min_length=1, max_length=12)


@router.get("/exports/targets")
def targets() -> dict[str, Any]:
    """What points can be exported to, and which engines load it."""
    return {
        "targets": [
            {
                "name": name,
                "needs_model": load_target(name).needs_model,
                "what": _what(name),
                "engines": [engine for engine in ENGINES if LOADS[engine] == name],
            }
            for name in TARGETS
        ]
    }


@router.post("/jobs/{job}/points/{point}/exports", status_code=202, responses=responses(400, 413))
def order(context: Here, who: Submitter, job: JobId, point: PointId, wanted: Order) -> Any:
    """Order an export: written, reloaded by the target's own loader and compared."""
    if context.service.fronts.get(job).point(point) is None:
        raise NotFoundError(f"job {job} has no measured point {point}")
    targets = [load_target(name) for name in wanted.targets]
    if any(target.needs_model for target in targets):
        check_again(find_job(context.store, job).config, context.settings.roots)
    names = [target.name for target in targets]
    return export_document(order_export(context.store, job, point, names, who.name))


@router.get("/jobs/{job}/exports")
def of_job(context: Here, job: JobId) -> dict[str, Any]:
    """The exports of a job, newest first."""
    find_job(context.store, job)
    return {"exports": [export_document(found) for found in exports_of(context.store, job)]}


@router.get("/exports/{export}")
def show(context: Here, export: ExportId) -> dict[str, Any]:
    """An export: its state, its files, and how each reload compared."""
    return export_document(find_export(context.store, export))


@router.get(
    "/exports/{export}/files/{name:path}",
    response_class=FileResponse,
    responses={206: {"description": "A range"}, **responses(400, 409, 416)},
)
def download(context: Here, export: ExportId, name: str) -> FileResponse:
    """A file of an export."""
    found = find_export(context.store, export)
    if found.state != DONE:
        raise ConflictError(f"export {export} is {found.state}; wait until it is done")
    if name not in {file["name"] for file in found.files}:  # no name leaves its folder
        raise NotFoundError(f"export {export} has no file '{name}'; GET /api/v1/exports/{export}")
    path = context.settings.data / "exports" / str(export) / name
    if not path.is_file():
        raise NotFoundError(f"the file '{name}' of export {export} is gone; order it again")
    return FileResponse(path, filename=f"{export}-{Path(name).name}")


def _what(name: str) -> str:
    text = type(load_target(name)).__doc__ or ""
    return text.strip().partition("\n")[0]
