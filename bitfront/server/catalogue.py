"""Routes of what there is to choose from: models, devices, engines, formats, menus."""

from functools import cache
from importlib.resources import files
from typing import Annotated, Any

import yaml
from fastapi import APIRouter, Query

from bitfront.device_views import document as device_document
from bitfront.engine_views import document as engine_document
from bitfront.querying import format_document, matching, parse_shape
from bitfront.server.context import Here
from bitfront.server.problems import responses
from bitfront.server.security import READ, Known
from cost_models.devices import DEVICES
from engines import ENGINES, load_engine
from store.queries import list_models

router = APIRouter(tags=["catalogue"], dependencies=[READ], responses=responses(401, 403, 422))


@router.get("/whoami")
def whoami(context: Here, who: Known) -> dict[str, Any]:
    """Who asks, and what that one may do."""
    return {
        "name": who.name, "role": who.role, "authenticated": who.name is not None,
        "version": context.settings.version,
    }  # fmt: skip


@router.get("/models", responses=responses(503))
def models(context: Here) -> dict[str, Any]:
    """Models that jobs have measured."""
    return {
        "models": [
            {"name": name, "weights_hash": weights_hash, "jobs": jobs}
            for name, weights_hash, jobs in list_models(context.store)
        ]
    }


@router.get("/devices")
def devices() -> dict[str, Any]:
    """The catalogue of devices, with its sources."""
    return {"devices": [device_document(DEVICES[name]) for name in DEVICES]}


@router.get("/engines")
def engines() -> dict[str, Any]:
    """Who serves maps, and what each has kernels for."""
    return {"engines": [engine_document(load_engine(name)) for name in ENGINES]}


@router.get("/formats")
def formats(
    pattern: Annotated[str, Query(max_length=80)] = "*",
    shape: Annotated[str, Query(max_length=40)] = "4096x4096",
) -> dict[str, Any]:
    """Weight formats by name or family, with their exact bytes for a shape."""
    from quantization.formats import FORMATS  # torch

    size = parse_shape(shape)
    return {"formats": [format_document(FORMATS[name], size) for name in matching(pattern)]}


@router.get("/menus")
def menus() -> dict[str, Any]:
    """The shipped menus: schemes, and what is pinned."""
    return {"menus": _menus()}


@cache
def _menus() -> dict[str, Any]:
    found = sorted(files("configs").joinpath("menus").iterdir(), key=lambda file: file.name)
    return {
        file.name.removesuffix(".yaml"): yaml.safe_load(file.read_text())
        for file in found
        if file.name.endswith(".yaml")
    }
