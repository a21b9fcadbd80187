"""What nobody should send, for `fuzz.py` and the tests: bodies, jobs, headers, names, YAML files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

HUGE = "\x00a number of 5000 digits\x00"
"""Stands for one that no encoder of JSON would write."""
WORDS = [
    "", "\0", "a\0b", "\ud800", "\udfff!", "\U0010ffff", "\u202e", "é", " ", "\n", "..", "demo", "auto",
    "bf16", "int4-g64", "int4-g64/bf16", "int4-g64/int8", "gptq", "llama.cpp", "rtx-4090", "local",
    "optuna:NSGAIISampler", "optuna:os:system", "%s%n", "{0}", "'; DROP TABLE jobs; --", "a" * 5000,
    "float32", "nan", "1e400", "٣", "\U00010d41", "[", "[[a]*", "**", "int-sym-g64",
]  # fmt: skip
NUMBERS = [
    0, -1, 1, 2, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**400, 0.0, -0.0, 0.5, 1e308, 5e-324,
    float("nan"), float("inf"), -float("inf"), HUGE,
]  # fmt: skip
RANGES = [
    "bytes=0-1",
    "bytes=-1",
    "bytes=5-2",
    "bytes=99999999999-",
    "bytes=a",
    "x=0-1",
    "bytes=0-0,2-2",
]


def mostly(
    common: st.SearchStrategy[Any], rare: st.SearchStrategy[Any], of: int = 5
) -> st.SearchStrategy[Any]:
    """One strategy, and once in `of` times the other."""
    return st.integers(1, of).flatmap(lambda drawn: rare if drawn == of else common)


def values() -> st.SearchStrategy[Any]:
    """Anything that JSON can say, and some that it can't."""
    scalars = st.one_of(
        st.none(), st.booleans(), st.sampled_from(WORDS), st.sampled_from(NUMBERS), st.integers(),
        st.floats(), st.text(st.characters(), max_size=12),
    )  # fmt: skip
    nested = st.recursive(
        scalars,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=6), inner, max_size=4),
        ),
        max_leaves=8,
    )
    return nested | st.integers(1, 40).map(_nest)


def _nest(depth: int) -> Any:
    found: Any = 1
    for level in range(depth):
        found = [found] if level % 2 else {"menu": found}
    return found


JOBS: list[dict[str, Any]] = [
    {"model": "demo"},
    {"model": "org/model-0", "menu": "int-sym-g64", "budgets": [3.5, 4.25]},
    {
        "model": "org/model-0", "menu": ["int4-g64", "bf16"], "budgets_bytes": [10**8],
        "texts": {"search": {"source": "datasets:Salesforce/wikitext", "chunks": 4, "length": 64}},
        "refinement": {"strategy": "evolve", "measurements": 5, "minutes": 1.5},
        "estimators": ["fisher"], "quantizer": "gptq", "revision": "main", "dtype": "float32",
    },
    {
        "model": "org/model-0/model.gguf", "imatrix": "matrix.dat", "transform": None, "seed": 3,
        "menu": {
            "schemes": ["int4-g64", "int8-g64", "bf16"], "pinned": {"head": "bf16"},
            "forbidden": {"*.down_proj": ["int4-g64"]}, "most_formats": 2, "left_alone": 0.1,
        },
        "interactions": 3, "random_controls": 2, "bank": "packed", "trust_remote_code": False,
        "workers": {"workers": 2, "cpus": 1, "gpus": 0.5, "accelerator_type": "H100",
                    "memory_bytes": 2**30},
    },
    {
        "model": "demo",
        "serving": {"engine": "llama.cpp", "context": 64, "prompt": 16, "threads": 1,
                    "max_memory_bytes": 10**9, "max_decode_s": 0.01, "max_prefill_s": 1.0},
    },
    {
        "model": "demo",
        "serving": {"engine": "vllm", "device": "rtx-4090", "batch": 2, "tensor_parallel": 2},
    },
]  # fmt: skip
FIELDS = sorted({"workers", "nothing", *(name for job in JOBS for name in job)})


@st.composite
def jobs(draw: st.DrawFn, more: st.SearchStrategy[Any] | None = None) -> dict[str, Any]:
    """A job with some of its fields replaced, lost, or set where there were none.

    Args:
        draw: of hypothesis.
        more: values that are put in beside `values`, such as names of files.
    """
    found: Any = json.loads(json.dumps(draw(st.sampled_from(JOBS))))
    anything = values() if more is None else mostly(more, values())
    for _ in range(draw(st.integers(1, 3))):
        place, name = draw(st.sampled_from(list(_places(found))))
        what = draw(st.sampled_from(["replace", "replace", "lose", "set", "twist"]))
        if what == "lose" and isinstance(place, dict):
            place.pop(name, None)
        elif what == "set":
            found[draw(st.sampled_from(FIELDS))] = draw(anything)
        elif what == "twist":  # of the right type, so that it gets further
            place[name] = draw(_twisted(place.get(name) if isinstance(place, dict) else None))
        else:
            place[name] = draw(anything)
        if not found:
            break
    return dict(found)


def _twisted(value: Any) -> st.SearchStrategy[Any]:
    if isinstance(value, dict):
        keys = st.sampled_from([*value, *WORDS])
        return st.dictionaries(keys, st.sampled_from([*value.values(), *WORDS]), max_size=5)
    if isinstance(value, list):
        inner = st.sampled_from([*value, *WORDS, *NUMBERS])
        return st.lists(inner, max_size=5) | inner.map(lambda one: [one] * 300)
    if isinstance(value, int | float):
        return st.sampled_from(NUMBERS) | st.integers(-5, 10**6) | st.floats()
    return st.sampled_from(WORDS)


def _places(found: Any) -> Any:
    """Every container of a document with every key or index of it."""
    pairs = found.items() if isinstance(found, dict) else enumerate(found)
    for name, value in list(pairs):
        yield found, name
        if isinstance(value, dict | list):
            yield from _places(value)


def encoded(value: Any) -> bytes:
    """As JSON, with what only careless encoders write: NaN, half surrogates, endless numbers."""
    return json.dumps(value).replace(json.dumps(HUGE), "9" * 5000).encode()


def bodies(documents: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """Documents as bytes; some of them damaged, in another encoding, or endless."""
    sound = documents.map(encoded)
    damages: list[Callable[[bytes], bytes]] = [
        lambda body: body[: len(body) // 2],
        lambda body: b"\xef\xbb\xbf" + body,
        lambda body: body.decode().encode("utf-16"),
        lambda body: body + body,
        lambda body: body.replace(b'"', b"\xff", 1),
    ]
    damaged = st.tuples(sound, st.sampled_from(damages)).map(lambda pair: pair[1](pair[0]))
    endless = st.sampled_from([b"[" * 100_000, b'{"a":' * 5000, b"", b" ", b"\0" * 9, b"1" * 5000])
    return mostly(sound, damaged | st.binary(max_size=40) | endless)


def too_large() -> st.SearchStrategy[bytes]:
    """Bodies above a MiB, which are jobs but for that."""
    sizes = st.sampled_from([2**20 + 1, 3 * 2**20])
    return sizes.map(lambda size: b'{"model": "demo"' + b" " * size + b"}")


TYPES = [
    "application/json", "application/json; charset=utf-7", "text/plain", "multipart/form-data",
    "application/x-www-form-urlencoded", "application/problem+json", "", "application/json;;;", "*/*",
    "multipart/form-data; boundary=", "text/event-stream",
]  # fmt: skip


def headers() -> st.SearchStrategy[dict[str, str]]:
    """Headers that routes read, with what they hardly expect: latin-1, as servers pass it on."""
    odd = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"), max_size=30)
    numbers = st.sampled_from(["0", "-1", "1e9", "9" * 30, "٣".encode().decode("latin-1"), "007"])
    return st.fixed_dictionaries(
        {},
        optional={
            "last-event-id": odd | numbers,
            "idempotency-key": odd | st.just("k" * 201) | st.just("again"),
            "range": odd | st.sampled_from(RANGES),
            "if-none-match": odd,
            "if-modified-since": odd | st.just("Mon, 99 Foo 99999 99:99:99 GMT"),
            "accept": odd,
            "origin": odd,
            "host": odd,
        },
    )


def tokens(good: list[str]) -> st.SearchStrategy[str | None]:
    """Values of Authorization: none, good ones, and odd ones."""
    odd = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"), max_size=30)
    fixed = ["Bearer", "Bearer ", "Basic Og==", f"bearer {'a' * 9000}", "Bearer bf_\x80"]
    bad = st.none() | st.sampled_from(fixed) | odd.map("Bearer {}".format)
    return mostly(st.sampled_from(good), bad)


def paths(folder: Path) -> st.SearchStrategy[str]:
    """Names of files inside and outside of `folder/root`, many of them in disguise.

    `make_baits` makes what they name.
    """
    inside, outside = folder / "root", folder / "outside"
    relative = [
        "outside/menu.yaml", "root/text.txt", "../outside/text.txt", "./outside/text.txt",
        "outside/text.txt", "outside/model", "~/text.txt", "~", "~root/x", "~nobody-such/x",
        "file:///etc/passwd", "/", ".", "..", "/etc/passwd", "/proc/self/environ", "/dev/zero",
        "datasets:outside", "datasets:outside/model", "datasets:text", "datasets:../outside",
        "datasets:/etc", "datasets:org/name:../x", "datasets:org/..", "org/..", "org/../outside",
        "org/x/../../outside/model.gguf", "org/name/../x.gguf", "outside/model.gguf", "a/" * 2000,
        "/" + "a" * 5000, "int4-g64,outside/menu.yaml", "root/menu.yaml", "http://localhost/x",
    ]  # fmt: skip
    whole = [
        f"{inside}/text.txt", f"{inside}/../outside/text.txt", f"{inside}/link/text.txt",
        f"{inside}/loop", f"{outside}/text.txt", f"{outside}/menu.yaml", f"{inside}/nothing",
        f"{inside}", f"{inside}x/text.txt", f"{inside}/text.txt/../../outside/text.txt",
        f"{inside}/./text.txt", f"//{outside}/text.txt", f"{inside}/text.txt\0.txt",
    ]  # fmt: skip
    return st.sampled_from([*whole, *whole, *relative])


def make_baits(folder: Path) -> None:
    """Files that names lead to, with a good menu and a good text in each."""
    for name in ("root", "outside", "rootx", "outside/model"):
        (folder / name).mkdir(parents=True)
        (folder / name / "text.txt").write_text("a text")
        for menu in ("menu.yaml", "int4-g64,menu.yaml", "a,.yaml"):
            (folder / name / menu).write_text("schemes: [int4-g64, bf16]\n")
        (folder / name / "model.gguf").write_bytes(b"GGUF")
    (folder / "root" / "link").symlink_to(folder / "outside")
    (folder / "root" / "loop").symlink_to(folder / "root" / "loop")


def menus(folder: Path) -> st.SearchStrategy[Any]:
    """Menus, as names or lists, that might be taken for a file's name."""
    names = [
        f"{folder}/outside/menu.yaml", "outside/menu.yaml", "outside/int4-g64,menu.yaml", ".yaml",
        f"{folder}/outside/a", f"{folder}/outside/int4-g64", "menu.yaml", "outside/int4-g64", "a",
        "outside/a", "int4-g64", "bf16", "x.yml",
    ]  # fmt: skip
    name = st.sampled_from(names)
    lists = st.lists(name, min_size=1, max_size=3)
    return name | lists | lists.map(",".join)


SCRAPS = [
    "a: 2001-99-99", "seed: 0x_", "seed: 0b", "seed: 1:99:99", "a: ._", "a: !!int ''", "a: !!bool x",
    "a: !!timestamp x", "a: !!binary x", "a: !!python/object:os.system x", "a: !!float x", "? [a]\n: b",
    "a: &a [*a]", "menu: &m {schemes: *m}", "<<: 1", "<<: *x", "a: .nan", "1: 2", "null: 1", "- a",
    "%YAML 9.9\n---\na: 1", "--- a\n--- b", 'a: "\\ud800"', "a: '\0'", "\ufeffmenu: 1", "a: \t1",
    "seed: " + "9" * 5000, "seed: 0x" + "f" * 6000, "menu: " + "[" * 3000, "menu: " + "{a: " * 3000, "a: !!set {b}", "=: =",
    "!!map {a: 1}", "menu: 3", "menu: []", "menu: {}", "serving: {engine: []}", "texts: 1", "a: 1e999",
    "texts: {search: {source: ~x/y}}", "imatrix: ~nobody-such/x", "menu: ~nobody/x.yaml", "? {}\n: 1",
    "menu: nothing.yaml", "menu: [a, b]", "menu: {schemes: &a [x, *a]}", "trust_remote_code: 2",
]  # fmt: skip


LAUGHS = "l0: &l0 [x]\n" + "".join(
    f"l{i}: &l{i} [{', '.join(9 * [f'*l{i - 1}'])}]\n" for i in range(1, 12)
)
"""Small as a file, and 9**11 words where somebody prints it."""
SCRAPS += [LAUGHS + "menu: *l11", LAUGHS + "menu: {schemes: *l11}"]


def yaml_files() -> st.SearchStrategy[bytes]:
    """Files of jobs: mutated, scraps of YAML that trip its readers, and noise."""
    documents = jobs().map(lambda job: {k: v for k, v in job.items() if k != "model"})
    dumped = documents.map(_dumped)
    scraps = st.lists(st.sampled_from(SCRAPS), min_size=1, max_size=3).map("\n".join)
    noise = st.text(st.sampled_from("abx01:-[]{}&*!|>'\"%@`#,? \n\t.~<="), max_size=60)
    texts = st.one_of(dumped, scraps, noise).map(lambda text: text.encode("utf-8", "surrogatepass"))
    return texts | st.binary(max_size=60)


def _dumped(document: dict[str, Any]) -> str:
    return yaml.safe_dump(document).replace(yaml.safe_dump(HUGE).strip(), "9" * 5000)
