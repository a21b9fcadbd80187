"""Hostile requests, jobs and files: no 5xx, no traceback, problem documents, no file outside the roots."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import asking
import fuzz
import hostile

from bitfront.config import ConfigError, load_config
from bitfront.server import jobs as job_routes
from bitfront.server.policy import job_of
from bitfront.server.settings import MOST_BODY_BYTES
from quantization.errors import BitfrontError
from store.database import Store

JSON = {"content-type": "application/json"}
API = "/api/v1"


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """On SQLite, with a token."""
    folder = tmp_path_factory.mktemp("fuzz").resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_routes, "WATCH_S", 0.01)
        found = asking.Target(Store(f"sqlite:///{folder}/s.sqlite").open(), folder, auth=True)
        yield found
        found.close()


@pytest.fixture
def on_postgres(postgres_url, tmp_path, monkeypatch):
    """On PostgreSQL, open to everybody."""
    monkeypatch.setattr(job_routes, "WATCH_S", 0.01)
    found = asking.Target(Store(postgres_url).open(), tmp_path.resolve(), auth=False)
    yield found
    found.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def service(request):
    """The same claims hold for both."""
    names = {"sqlite": "target", "postgresql": "on_postgres"}
    return request.getfixturevalue(names[request.param])


def test_no_documented_or_undocumented_request_breaks_the_service(service):
    tally = fuzz.Tally()
    fuzz.documented_requests(service, tally, 250, 0)
    fuzz.odd_requests(service, tally, 250, 0)
    assert {"200", "404", "413", "422"} <= set(tally.statuses)


def test_no_job_makes_a_server_read_what_it_must_not(target):
    tally = fuzz.Tally()
    fuzz.names_of_files(target, tally, 200, 0)
    assert {"accepted", "refused"} <= set(tally.statuses)


def test_every_file_of_a_job_is_one_or_says_in_a_line_why_not(target):
    tally = fuzz.Tally()
    fuzz.yaml_files(target, tally, 200, 0)
    assert {"accepted", "refused"} <= set(tally.statuses)


@pytest.mark.parametrize("scrap", hostile.SCRAPS, ids=range(len(hostile.SCRAPS)))
def test_every_scrap_of_yaml_is_refused_in_a_line_or_means_something(scrap, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_bytes(scrap.encode("utf-8", "surrogatepass"))
    try:
        load_config("demo", path, {})
    except BitfrontError as error:
        assert len(str(error)) < asking.LONGEST_LINE


def test_errors_of_files_say_where(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("seed: 1\nbudgets: [2001-99-99]\n")
    with pytest.raises(ConfigError, match="this is no timestamp .* line 2, column 11"):
        load_config("demo", path, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [("refinement", {"minutes": float("inf"), "measurements": 1}), ("seed", -1), ("seed", 2**32),
     ("serving", {"context": 10**12}), ("budgets", [1e300]), ("budgets_bytes", [2**63]),
     ("serving", {"engine": "llama.cpp", "max_decode_s": 1e300}), ("menu", 5), ("menu", ["a,.yaml"]),
     ("revision", "../../outside"), ("dtype", "float17"), ("quantizer", "x" * 5000),
     ("estimators", ["fisher"] * 50), ("texts", {"search": {"source": "datasets:text"}})],
)  # fmt: skip
def test_jobs_that_no_driver_could_run_are_refused_at_once(target, field, value):
    answer = _post(target, "/jobs", {"model": "demo", field: value})
    assert (answer.status, asking.faults(answer)) == (422, [])


@pytest.mark.parametrize("model", ["~nobody-such/x", "a" * 5000, "loop", "\0", "outside/model"])
def test_models_that_can_be_no_file_are_refused(target, model, monkeypatch):
    monkeypatch.chdir(target.folder / "baits")
    answer = _post(target, "/jobs", {"model": model})
    assert (answer.status, asking.faults(answer)) == (422, [])


def test_a_list_of_schemes_names_no_file(tmp_path, monkeypatch):
    (tmp_path / "a,.yaml").write_text("schemes: [int4-g64, bf16]\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BitfrontError, match="unknown format 'a'"):
        job_of({"model": "demo", "menu": ["a", ".yaml"]}, ())


def test_menus_are_the_same_as_lists_and_as_text():
    listed, _ = job_of({"model": "demo", "menu": ["int4-g64", "bf16"]}, ())
    told, _ = job_of({"model": "demo", "menu": "int4-g64,bf16"}, ())
    assert listed == told


def test_bodies_that_are_too_large_are_refused_with_and_without_their_length(target):
    body = b'{"model": "demo"' + b" " * MOST_BODY_BYTES + b"}"
    for length in ({"content-length": str(len(body))}, {}):
        answer = target.ask("POST", f"{API}/jobs", {**JSON, **target.bearer, **length}, body)
        assert (answer.status, asking.faults(answer)) == (413, [])


@pytest.mark.parametrize(("given", "status"), [("bytes=a", 400), ("bytes=9999999999-", 416)])
def test_ranges_that_no_file_has_are_problems(target, given, status):
    name = f"{API}/exports/1/files/map/precision_map.json"
    answer = target.ask("GET", name, {**target.bearer, "range": given})
    assert (answer.status, asking.faults(answer)) == (status, [])
    assert target.ask("GET", name, target.bearer).body == b"{}\n"


def test_a_stream_of_no_job_is_not_found(target):
    answer = target.ask("GET", f"{API}/jobs/99/events", target.bearer)
    assert (answer.status, asking.faults(answer)) == (404, [])


def test_budgets_may_be_one_or_many_but_not_too_many(target):
    one, many = (_post(target, "/jobs/1/solve", {"average_bits": x}) for x in (4.5, [4.5]))
    found = [json.loads(answer.body)["solutions"] for answer in (one, many)]
    assert found[0] == found[1]
    assert _post(target, "/jobs/1/solve", {"average_bits": [4.5] * 65}).status == 422


def test_digits_of_places_are_ascii(target):
    answer = target.ask("GET", f"{API}/compare?a=%F0%90%B5%80:1&b=1:1", target.bearer)
    assert (answer.status, asking.faults(answer)) == (422, [])


def test_a_job_between_its_model_and_its_plan_is_not_found_and_not_in_the_way(target):
    answer = target.ask("GET", f"{API}/jobs/3/front", target.bearer)
    assert (answer.status, asking.faults(answer)) == (404, [])
    assert target.ask("GET", f"{API}/query?model=org/model-0", target.bearer).status == 200


def test_errors_stay_short_however_much_is_wrong(target):
    answer = _post(target, "/tokens", {f"{'x' * 400}{i}": i for i in range(1000)})
    assert answer.status == 422
    assert len(answer.body) < asking.LONGEST_LINE


def test_no_token_has_a_name_that_no_address_can_end_in(target):
    assert _post(target, "/tokens", {"name": ".."}).status == 422


def test_the_api_document_needs_no_other(target):
    document = json.loads(target.ask("GET", "/openapi.json", {}).body)
    names = {ref.rpartition("/")[2] for ref in _refs(document)}
    assert "Job" in names
    assert names <= set(document["components"]["schemas"])


def _refs(document):
    if isinstance(document, dict):
        found = [document["$ref"]] if isinstance(document.get("$ref"), str) else []
        return found + [ref for value in document.values() for ref in _refs(value)]
    return [ref for value in document for ref in _refs(value)] if isinstance(document, list) else []


def _post(target, path, body):
    return target.ask("POST", API + path, {**JSON, **target.bearer}, hostile.encoded(body))
