"""The JSON Schema of a submitted job: that of the YAML and the command line, with their defaults."""

import re
from functools import cache
from inspect import getdoc
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from bitfront import config
from bitfront.config import JobConfig, config_of

COMPONENTS = "#/components/schemas/"
JOB = "Job"
ARGUMENT = re.compile(r"^    (\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)
WORDS = {
    "model": "A hub id, `demo`, or a whole path in a folder that the server allows.",
    "quantizer": "rtn, rtn-mse, rtn-weighted, gptq, hqq or autoround.",
    "estimators": "What predicts losses; auto is the best of the model's audit.",
    "texts": "Three texts: for calibration, for the search, and held out for the published figures.",
    "refinement": "How long maps are refined by measurement, and how.",
    "random_controls": "Random maps that are measured for comparison.",
    "revision": "Of the hub.",
    "seed": "Of random controls and refinement.",
}


class Workers(BaseModel):
    """Workers of a job, and what each needs of the cluster, by Ray's names."""

    model_config = ConfigDict(extra="forbid")

    workers: int | None = Field(None, ge=1, le=1024, description="Model replicas.")
    cpus: float | None = Field(None, ge=0, le=4096, description="Cores of each.")
    gpus: float | None = Field(None, ge=0, le=64, description="GPUs of each.")
    accelerator_type: str | None = Field(
        None, pattern=r"^[\w.:-]{1,64}$", description="Such as H100, where nodes differ."
    )
    memory_bytes: int | None = Field(
        None, ge=1, le=2**50, description="Of each, which Ray reserves."
    )


@cache
def job_schema() -> dict[str, Any]:
    """Of the body of `POST /jobs`: all that isn't given is taken from the preset."""
    schema = JobConfig.model_json_schema()
    definitions = schema["$defs"]
    for name, part in (("JobConfig", schema), *definitions.items()):
        part.pop("required", None)
        part["description"] = part["description"].partition("\n\nArgs:")[0]
        for field, text in _described(getattr(config, name)).items():
            if field in part["properties"]:
                part["properties"][field].setdefault("description", text)
    fields = schema["properties"]
    for field in ("trust_remote_code",):  # a server refuses it
        fields.pop(field)
    for field, text in WORDS.items():
        fields[field]["description"] = text
    preset = config_of("MODEL", {}).model_dump(mode="json")
    for field in ("quantizer", "estimators", "random_controls"):
        fields[field]["default"] = preset[field]
    for role, text in preset["texts"].items():
        definitions["Texts"]["properties"][role]["default"] = text
    fields["menu"] = {
        "description": "What the search chooses from: a shipped menu (GET /menus), a list of "
        "schemes, or its fields.",
        "anyOf": [
            {"type": "string", "examples": ["int-sym-g64"]},
            {"type": "array", "items": {"type": "string"}, "minItems": 1},
            fields["menu"],
        ],
    }
    definitions["Workers"] = Workers.model_json_schema()
    fields["workers"] = {"$ref": "#/$defs/Workers"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Job",
        "description": "A search job: everything but the model has a default.",
        "required": ["model"],
    }


def with_job(document: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI document with the job's schema among its components: one that needs no other."""
    schema = _moved(job_schema())
    own = {name: schema.pop(name) for name in ("$schema", "$defs")}
    parts = document.setdefault("components", {}).setdefault("schemas", {})
    parts |= {**own["$defs"], JOB: schema}
    return document


def _moved(schema: Any) -> Any:
    """The same, with references that hold in an OpenAPI document."""
    if isinstance(schema, list):
        return [_moved(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: value.replace("#/$defs/", COMPONENTS)
        if name == "$ref" and isinstance(value, str)
        else _moved(value)
        for name, value in schema.items()
    }


def _described(model: type[BaseModel]) -> dict[str, str]:
    """What a class's docstring says of its fields."""
    text = getdoc(model) or ""
    _, _, arguments = text.partition("Args:\n")
    return {name: " ".join(said.split()) for name, said in ARGUMENT.findall(arguments)}
