"""The pages of docs/ as a site in runs/site, with an API reference from the docstrings: `make docs`.

    python docs/build.py [--check]

Stages README.md, docs/ and whatever they link to below runs/site-source, in the repository's own layout, so that every
relative link is the one that also works in a clone; writes a page for each public module; runs zensical, whose warnings
are errors; and follows every link of the pages that came out. `--check` stages and writes the reference only, for which
no package is needed: fvgen is parsed, never imported.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
SOURCE, SITE = ROOT / "runs" / "site-source", ROOT / "runs" / "site"
STARTS = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md"]  # and docs/*.md
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)

# What the reference shows: a package's own names and those of its public modules. The names of `fvgen` itself come by
# __getattr__, which no parser sees through.
TOP = {"generate": "walks/run", "open_scene": "walks/api", "walk": "walks/api", "diagnose": "diagnosis/diagnose"}
ROOMS = ("distill", "pipelines", "diffusion", "objectives", "geometry", "metrics")
CLOSED = ("distill", "objectives")  # whose __all__ is all that is meant to be used


# --- What is staged ---


def local_links(text: str) -> list[str]:
    """Targets of a page's links to files beside it, without what follows #."""
    found = (target.partition("#")[0] for target in LINK.findall(FENCED.sub("", text)))
    return [target for target in found if target and not urlsplit(target).scheme]


def linked_files() -> list[Path]:
    """Every page, and every file that one of them leads to. Raises SystemExit where one is missing."""
    waiting = [ROOT / name for name in STARTS] + sorted((ROOT / "docs").glob("*.md"))
    found: list[Path] = []
    while waiting:
        file = waiting.pop(0)
        if file in found:
            continue
        found.append(file)
        if file.suffix == ".md":
            for target in local_links(file.read_text(encoding="utf-8")):
                other = (file.parent / unquote(target)).resolve()
                if not other.is_file() or ROOT not in other.parents:
                    sys.exit(f"{file.relative_to(ROOT)} links to {target}, which is no file of the repository")
                waiting.append(other)
    return found


def stage() -> None:
    shutil.rmtree(SOURCE, ignore_errors=True)
    for file in linked_files():
        place = SOURCE / file.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    (SOURCE / "README.md").rename(SOURCE / "index.md")
    for page in SOURCE.rglob("*.md"):
        page.write_text(page.read_text(encoding="utf-8").replace("../README.md", "../index.md"), encoding="utf-8")


# --- The reference ---


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def definitions(tree: ast.Module) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")}


def own_names(tree: ast.Module) -> list[str]:
    """The names in __all__."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def homes(tree: ast.Module) -> dict[str, Path]:
    """{name: file that it is imported from}, imports for type checkers included."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fvgen."):
            place = ROOT / "src" / Path(*node.module.split("."))
            file = place.with_suffix(".py") if place.with_suffix(".py").is_file() else place / "__init__.py"
            found |= {alias.name: file for alias in node.names}
    return found


def signature(name: str, node: ast.FunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    whole = f"{name}({ast.unparse(node.args)}){returns}"
    if len(whole) <= 100:
        return whole
    arguments = re.split(r", (?=\*{0,2}\w+(?:[:,=]|$)|/)", ast.unparse(node.args))
    return f"{name}(\n    " + ",\n    ".join(arguments) + f"\n){returns}"


def text_of(docstring: str | None) -> str:
    """A docstring as Markdown: it nearly is. <, * and _ stand for themselves outside code, indented code included."""
    parts = re.split(r"(``.+?``|`.+?`|^ {4}[^\n]*)", docstring or "", flags=re.DOTALL | re.MULTILINE)
    escaped = (part if n % 2 else re.sub(r"([<*_])", r"\\\1", part) for n, part in enumerate(parts))
    return "".join(escaped)


def entry(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """A heading, the call, and the docstring; of a class also its public methods that have one."""
    lines = [f"## {node.name}", ""]
    if isinstance(node, ast.FunctionDef):
        return [*lines, "```python", signature(node.name, node), "```", "", text_of(ast.get_docstring(node)), ""]
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    listed = [f"    {ast.unparse(field)}" for field in fields if not ast.unparse(field.target).startswith("_")]
    bases = ", ".join(map(ast.unparse, node.bases))
    lines += ["```python", f"class {node.name}({bases})" if bases else f"class {node.name}", *listed, "```", ""]
    lines += [text_of(ast.get_docstring(node)), ""]
    for part in node.body:
        public = isinstance(part, ast.FunctionDef) and (part.name == "__call__" or not part.name.startswith("_"))
        if public and ast.get_docstring(part):
            shown = signature(part.name, part)
            lines += [f"### {node.name}.{part.name}", "", "```python", shown, "```", ""]
            lines += [text_of(ast.get_docstring(part)), ""]
    return lines


def page(title: str, intro: str | None, nodes: list[ast.FunctionDef | ast.ClassDef]) -> str:
    return "\n".join([f"# {title}", "", text_of(intro), "", *(line for node in nodes for line in entry(node))])


def reference() -> dict[str, str]:
    """{file name below api/: page}. A package's page has the names of its __all__, each of its modules has its own."""
    package = ROOT / "src" / "fvgen"
    top = [definitions(parsed(package / f"{place}.py"))[name] for name, place in TOP.items()]
    pages = {"fvgen.md": page("fvgen", ast.get_docstring(parsed(package / "__init__.py")), top)}
    for room in ROOMS:
        init = package / room / "__init__.py"
        tree = parsed(init)
        exported = {name: homes(tree).get(name, init) for name in own_names(tree)}
        files = {file: definitions(parsed(file)) for file in exported.values()}
        nodes = [files[file][name] for name, file in exported.items() if name in files[file]]
        pages[f"fvgen.{room}.md"] = page(f"fvgen.{room}", ast.get_docstring(tree), nodes)
        if room in CLOSED:
            continue
        for file in sorted((package / room).glob("[a-z]*.py")):
            inner = parsed(file)
            rest = [node for name, node in definitions(inner).items() if name not in exported]
            if rest:
                pages[f"{module_of(file)}.md"] = page(module_of(file), ast.get_docstring(inner), rest)
    listed = "\n".join(f"* [{name.removesuffix('.md')}]({name})" for name in sorted(pages))
    intro = "From the docstrings. Letters of shapes: [conventions](../docs/conventions.md)."
    pages["index.md"] = f"# API reference\n\n{intro}\n\n{listed}\n"
    return pages


def write_reference() -> int:
    folder = SOURCE / "api"
    folder.mkdir()
    pages = reference()
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")
    return len(pages)


# --- The site ---


class Links(HTMLParser):
    """Relative targets and the names that may follow a #, of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.names |= {found[key] for key in ("id", "name") if found.get(key)}
        target = found.get("href") or found.get("src")
        if target and not urlsplit(target).scheme and not target.startswith(("//", "/")):
            self.targets.add(target)


def broken() -> list[str]:
    """Links of the built site that lead nowhere."""
    pages = {file.resolve(): Links(file.read_text(encoding="utf-8")) for file in SITE.rglob("*.html")}
    wrong = []
    for file, links in pages.items():
        if file.name == "404.html":
            continue
        for target in sorted(links.targets):
            path, _, name = target.partition("#")
            place = (file.parent / unquote(urlsplit(path).path)).resolve() if path else file
            place = place / "index.html" if place.is_dir() else place
            if not place.is_file() or (name and place in pages and unquote(name) not in pages[place].names):
                wrong.append(f"{file.relative_to(SITE.resolve())}: {target}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="stage and write the reference, build nothing")
    check = parser.parse_args().check
    stage()
    count = write_reference()
    if not check:
        shutil.rmtree(SITE, ignore_errors=True)
        builder = Path(sys.executable).with_name("zensical")
        done = subprocess.run(
            [builder, "build", "--clean", "--strict", "--config-file", str(ROOT / "zensical.toml")], check=False
        )
        if done.returncode:
            sys.exit(done.returncode)
        if wrong := broken():
            sys.exit("\n".join([f"{len(wrong)} links lead nowhere:", *wrong]))
        print(f"{len(list(SITE.rglob('*.html')))} pages in {SITE.relative_to(ROOT)}, {count} of them the API reference")


if __name__ == "__main__":
    main()
