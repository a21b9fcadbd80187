"""What `engines` prints: who serves maps, or one runtime's rules in full."""

from typing import Any

from rich.table import Table

from bitfront.console import print_json, print_table
from engines import ENGINES, Engine, Rules, load_engine, target_of
from engines.declared import Declared


def show_engines(name: str | None, as_json: bool) -> None:
    """Print all engines, or the rules of one.

    Raises:
        UnknownNameError: no such engine, with the nearest.
    """
    if name is not None:
        _show_one(load_engine(name), as_json)
        return
    documents = [document(load_engine(entry)) for entry in ENGINES]
    if as_json:
        print_json(documents)
        return
    table = Table(
        "name", "version", "fuses", "timed here", "bitfront export --to", "formats",
        caption="Rules and their sources: bitfront engines NAME.", caption_justify="left",
    )  # fmt: skip
    for found in documents:
        table.add_row(
            found["name"], found["version"] or "", *("yes" if found[key] else "no" for key in
            ("fuses", "timed")), found["target"], _few(found["formats"]),
        )  # fmt: skip
    print_table(table)


def _show_one(rules: Rules, as_json: bool) -> None:
    found = document(rules)
    if as_json:
        print_json(found)
        return
    table = Table("formats", "outputs by", "inputs by", "remark", title=found["title"])
    for served in found["formats"]:
        rows, columns = served["rows"], served["columns"]
        table.add_row(served["formats"], str(rows), str(columns), served["remark"] or "")
    print_table(table)
    facts = Table("what", "value")
    for kind, why in found["kept"].items():
        facts.add_row(f"{kind} in bf16", why)
    if found["experts"]:
        alike = found["experts"] == found["formats"]
        names = ", ".join(served["formats"] for served in found["experts"])
        facts.add_row("experts", "as other matrices" if alike else names)
    facts.add_row("KV cache", ", ".join(found["cache"]))
    for source in found["sources"]:
        facts.add_row("source", source)
    print_table(facts)


def document(rules: Rules) -> dict[str, Any]:
    """An engine's rules; those that are code, not data, are in its module."""
    own = rules.runtime.model_dump() if isinstance(rules, Declared) else _in_code(rules)
    return {
        **own,
        "fuses": rules.fuses,
        "timed": isinstance(rules, Engine),
        "target": target_of(rules.name),
    }


def _in_code(rules: Rules) -> dict[str, Any]:
    module = type(rules).__module__.replace(".", "/")
    return {
        "name": rules.name, "title": rules.name, "version": None, "formats": [], "experts": [], "kept": {},
        "cache": ["bf16"], "sources": [f"{module}.py"],
    }  # fmt: skip


def _few(formats: list[dict[str, Any]]) -> str:
    names = [served["formats"] for served in formats]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
