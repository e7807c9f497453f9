"""The pages beside the JSON files of benchmarks/results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def page(title: str, script: str, remarks: Sequence[str], results: Mapping[str, Any]) -> str:
    """Markdown of ``results``: its "settings" by name, and a table of each of its "parts", lists of rows whose keys are
    the columns."""
    lines = [f"# {title}", "", f"Written by benchmarks/{script}, which says what the columns are.", ""]
    lines += [f"- {key}: {value}" for key, value in results["settings"].items()] + [f"- {text}" for text in remarks]
    for part, rows in results["parts"].items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += ["", f"## {part.capitalize()}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(str(row.get(key, '')) for key in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"
