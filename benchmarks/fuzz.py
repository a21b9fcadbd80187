"""Hostile requests, jobs and files, many thousands: none may break the service or the command line.

Four kinds of cases, drawn by schemathesis (from the service's own OpenAPI document) and hypothesis:
requests to every route as documented and against it; requests with bodies, headers, tokens and
addresses that nobody documented; jobs that name files which a server must not read; YAML files of
jobs. None may be answered with a 5xx or raise what isn't an error of ours, every error must be a
problem document with a status that the route documents, and no file outside the roots may be
accepted or opened. The application is the real one, in process, on a store with finished jobs.

    python benchmarks/fuzz.py [--cases 10000] [--seed 0] [--json PATH]
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import chdir, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import hostile
import requests
import schemathesis
from asking import LONGEST_LINE, Target, faults
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from bitfront.config import load_config
from bitfront.server import jobs as job_routes
from bitfront.server.app import PREFIX
from bitfront.server.policy import job_of
from quantization.errors import BitfrontError
from store.database import Store

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
SHARES = {"documented": 0.5, "odd requests": 0.3, "names of files": 0.1, "YAML files": 0.1}


@dataclass
class Tally:
    """What came of the cases.

    Args:
        strict: raise on the first fault, for hypothesis to shrink.
    """

    strict: bool = True
    cases: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def note(self, kind: str, status: str, wrong: list[str], case: Any) -> None:
        """Count a case; raise where it went wrong."""
        self.cases[kind] += 1
        self.statuses[status] += 1
        if wrong and self.strict:
            raise AssertionError("\n".join([repr(case)[:1500], *wrong]))
        for fault in wrong:
            self.faults[fault] += 1
            if self.faults[fault] == 1:
                sys.stderr.write(f"{kind}: {repr(case)[:600]}\n  {fault}\n")


def repeated(function: Callable[..., None], cases: int, number: int) -> Callable[[], None]:
    """A function of hypothesis, run so many times from a seed, whatever the machine's speed."""
    return seed(number)(
        settings(
            max_examples=cases, deadline=None, database=None, derandomize=False,
            phases=(Phase.explicit, Phase.generate, Phase.shrink), print_blob=False,
            suppress_health_check=list(HealthCheck), backend="hypothesis",
        )(function)
    )  # fmt: skip


def documented_requests(target: Target, tally: Tally, cases: int, number: int) -> None:
    """Requests to every operation, as its document says and against it; ids that mostly exist."""
    schema = schemathesis.openapi.from_dict(json.loads(target.ask("GET", "/openapi.json", {}).body))
    operations = [found.ok() for found in schema.get_all_operations()]
    each = max(1, cases // len(operations) // 2)
    for place, operation in enumerate(operations):
        known = {str(status) for status in operation.definition.raw["responses"]}
        modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
        for mode in modes:
            strategy = operation.as_strategy(generation_mode=mode)
            with suppress(Unsatisfiable):  # a route that takes nothing is always asked rightly
                repeated(_documented(target, tally, strategy, known), each, number + place)()


def _documented(target: Target, tally: Tally, strategy: Any, known: set[str]) -> Any:
    @given(case=strategy, data=st.data())
    def one(case: Any, data: st.DataObject) -> None:
        for name in case.path_parameters or {}:
            if name in {"job", "point", "export"} and data.draw(st.booleans()):
                case.path_parameters[name] = data.draw(st.integers(1, 6))
        prepared = requests.Request(**case.as_transport_kwargs(base_url="http://x")).prepare()
        body = prepared.body or b""
        if not isinstance(body, bytes | str):
            body = b"".join(part if isinstance(part, bytes) else part.encode() for part in body)
        given_headers = {
            key: value if isinstance(value, str) else value.decode("latin-1")
            for key, value in prepared.headers.items()
            if key.lower() != "authorization"
        }
        line = str(prepared.url).removeprefix("http://x")
        answer = target.ask(
            str(prepared.method), line, {**given_headers, **target.bearer},
            body.encode() if isinstance(body, str) else body,
        )  # fmt: skip
        tally.note(
            "documented", str(answer.status), faults(answer, known),
            (prepared.method, line, given_headers, body[:500]),
        )  # fmt: skip

    return one


ROUTES = [
    ("POST", "/jobs"), ("POST", "/jobs"), ("POST", "/jobs"), ("POST", "/jobs/1/solve"),
    ("POST", "/jobs/1/points/1/exports"), ("POST", "/tokens"), ("GET", "/jobs"), ("GET", "/jobs/{}"),
    ("GET", "/jobs/{}/events"), ("GET", "/jobs/{}/logs"), ("GET", "/jobs/{}/front"), ("GET", "/{}"),
    ("GET", "/jobs/{}/detail"), ("POST", "/jobs/{}/resume"), ("POST", "/jobs/{}/cancel"),
    ("GET", "/exports/1/files/{}"), ("GET", "/exports/1/files/map/precision_map.json"),
    ("GET", "/query?model={}"), ("GET", "/query?kl={}"), ("GET", "/compare?a={}&b=1:1"),
    ("GET", "/formats?pattern={}"), ("GET", "/formats?shape={}"), ("GET", "/jobs?model={}"),
    ("GET", "/jobs?before={}"), ("DELETE", "/tokens/{}"), ("GET", "/whoami"), ("{}", "/jobs"),
    ("GET", "/query?engine={}&batch={}&context={}"), ("GET", "/jobs/1/points/{}/map"),
]  # fmt: skip
OTHERS = ["/web/{}", "/{}", "/docs", "/health", "/ready", "/metrics", "/", "/web/plotly.min.js"]
TRAVERSALS = [
    "../secret", "..%2f..%2fsecret", "%2e%2e/secret", "map/../../secret", "/etc/passwd", "map", ".",
    "map/precision_map.json/", "map%5cprecision_map.json", "%00", "map/precision_map.json%00", "%ff",
    "1:1", "1:99", "%F0%90%B5%81:1", "999999999:1", "1", "2", "3", "4", "5", "6", "1e5", "nan", "inf",
    "-1", "2147483647", "2147483648", "4611686018427387905", "1x1", "999999999x999999999", "0x0", "*",
    "[a", "[!a]*", "gguf-*", "%ED%A0%80", "a" * 300, "%0a", "int4*", "org/model-0",
]  # fmt: skip
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "FOO", "get"]


def odd_requests(target: Target, tally: Tally, cases: int, number: int) -> None:
    """Bodies, headers, tokens, addresses and methods that nobody documented."""
    solve = st.fixed_dictionaries(
        {}, optional={name: hostile.values() | st.just([4.5]) for name in
                      ("average_bits", "weight_bytes", "decode_s", "prefill_s", "x")},
    )  # fmt: skip
    documents = st.one_of(
        hostile.jobs(), hostile.jobs(), hostile.values(), solve,
        st.fixed_dictionaries({"targets": st.lists(st.sampled_from(hostile.WORDS), max_size=14)}),
        st.fixed_dictionaries({"name": st.sampled_from(hostile.WORDS), "role": hostile.values()}),
    )  # fmt: skip
    bodies = hostile.mostly(hostile.bodies(documents), hostile.too_large(), of=30)
    words = st.sampled_from(TRAVERSALS) | st.text(max_size=8).map(_quoted)
    places = hostile.mostly(
        st.sampled_from([(method, PREFIX + path) for method, path in ROUTES]),
        st.tuples(
            hostile.mostly(st.just("GET"), st.sampled_from(METHODS)), st.sampled_from(OTHERS)
        ),
    )
    kinds = hostile.mostly(st.just("application/json"), st.sampled_from(hostile.TYPES), of=10)

    @given(
        place=places, word=words, body=bodies, headers=hostile.headers(),
        token=hostile.tokens([f"Bearer {token}" for token in target.tokens]),
        kind=kinds, method=st.sampled_from(METHODS),
    )  # fmt: skip
    def one(
        place: tuple[str, str], word: str, body: bytes, headers: dict[str, str], token: str | None,
        kind: str, method: str,
    ) -> None:  # fmt: skip
        verb, line = (
            part.replace("{}", by) for part, by in zip(place, (method, word), strict=True)
        )
        sent = {**headers, "content-type": kind, "content-length": str(len(body))}
        if token is not None:
            sent["authorization"] = token
        answer = target.ask(verb, line, sent, body)
        wrong = faults(answer)
        if b"another's" in answer.body:
            wrong.append("a file of the server outside of the export")
        tally.note("odd requests", str(answer.status), wrong, (verb, line, sent, body[:500]))

    repeated(one, cases, number)()


def _quoted(text: str) -> str:
    return quote(text.encode("utf-8", "surrogatepass"))


def names_of_files(target: Target, tally: Tally, cases: int, number: int) -> None:
    """Jobs that name files: what is accepted lies in the roots, and nothing is opened."""
    folder = target.folder / "baits"
    root, opened = (folder / "root").resolve(), _opened(folder)
    name = hostile.paths(folder)
    sources = st.fixed_dictionaries(
        {"model": st.just("demo") | name},
        optional={
            "imatrix": name, "menu": hostile.menus(folder), "revision": name,
            "texts": st.dictionaries(
                st.sampled_from(["search", "heldout", "calibration"]),
                st.fixed_dictionaries({"source": name}), max_size=2,
            ),
        },
    )  # fmt: skip

    @given(body=sources | hostile.jobs(name))
    def one(body: dict[str, Any]) -> None:
        wrong, status = [], "refused"
        opened.clear()
        try:
            config, _ = job_of(body, (root,))
            status = "accepted"
            texts = [text.source for _, text in config.texts]
            wrong = [
                f"accepts '{source}', which is {path}"
                for source in (config.model, config.imatrix, *texts)
                if source and (path := _path_of(source)) and not path.is_relative_to(root)
            ]
            if ".." in (config.revision or ""):
                wrong.append(f"accepts the revision '{config.revision}'")
        except BitfrontError as error:
            wrong += _line_faults(error)
        except Exception:  # whatever gets out is what we look for
            wrong.append(f"raised: {traceback.format_exc()[-1500:]}")
        wrong += [f"opens {path}" for path in opened]
        tally.note("names of files", status, wrong, body)

    with chdir(folder):
        repeated(one, cases, number)()


def _path_of(source: str) -> Path | None:
    """Where a name leads on this machine, if it leads anywhere."""
    if source.startswith("datasets:"):
        name = source.split(":")[1]
        return Path(name).resolve() if Path(name).exists() or ".." in name else None
    if source.startswith("~"):
        return Path("/home")
    path = Path(source)
    return path.resolve() if path.is_absolute() or path.exists() or ".." in source else None


def _opened(folder: Path) -> list[str]:
    """Names of files below a folder that the interpreter opens from now on."""
    found: list[str] = []
    below = str(folder)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str):
            name = arguments[0]
            if name.startswith(below) or (Path.cwd() == folder and not name.startswith("/")):
                found.append(name)

    sys.addaudithook(watch)
    return found


def yaml_files(target: Target, tally: Tally, cases: int, number: int) -> None:
    """Files of jobs, as `bitfront search -c` reads them: a job, or one line that says why not."""
    path = target.folder / "job.yaml"

    @given(content=hostile.yaml_files())
    def one(content: bytes) -> None:
        path.write_bytes(content)
        wrong, status = [], "accepted"
        try:
            load_config("demo", path, {})
        except BitfrontError as error:
            wrong, status = _line_faults(error), "refused"
        except Exception:  # whatever gets out is what we look for
            wrong = [f"raised: {traceback.format_exc()[-1500:]}"]
        tally.note("YAML files", status, wrong, content)

    with chdir(target.folder / "baits"):
        repeated(one, cases, number)()


def _line_faults(error: Exception) -> list[str]:
    said = str(error)
    found = (
        [] if len(said) <= LONGEST_LINE else [f"an error of {len(said)} characters: {said[:200]}"]
    )
    return found if said.isprintable() else [*found, f"an error of several lines: {said[:300]!r}"]


PARTS: dict[str, Callable[[Target, Tally, int, int], None]] = {
    "documented": documented_requests,
    "odd requests": odd_requests,
    "names of files": names_of_files,
    "YAML files": yaml_files,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS)
    given_ = parser.parse_args()
    job_routes.WATCH_S = 0.01
    tally, start = Tally(strict=False), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for auth in (False, True):
            place = folder / str(auth)
            place.mkdir()
            target = Target(Store(f"sqlite:///{place}/s.sqlite").open(), place, auth=auth)
            for part, run in PARTS.items():
                most = given_.cases * SHARES[part] * (1 + auth) / 2
                number = given_.seed
                while (left := int(most - tally.cases[part])) > 0:  # routes may have few cases
                    number += 1000
                    run(target, tally, left, number)
            target.close()
    result = {
        "cases": sum(tally.cases.values()), "by_kind": dict(tally.cases), "seed": given_.seed,
        "statuses": dict(sorted(tally.statuses.items())),
        "server_errors": sum(n for s, n in tally.statuses.items() if s.startswith("5")),
        "faults": sum(tally.faults.values()), "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    given_.json.write_text(text + "\n")
    if tally.faults:
        raise SystemExit(f"{len(tally.faults)} kinds of faults")


if __name__ == "__main__":
    main()
