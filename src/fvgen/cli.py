"""`fvgen`: parse, then call. A user's mistake is one sentence on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fvgen.errors import UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distil slow novel-view video diffusion into 4-step students.",
)


@app.callback()
def _root() -> None:
    """Keeps the commands named, however many there are."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the student and the report; run again to resume.")],
    data: Annotated[Path | None, typer.Option(help="Folder of real scenes; the built-in ones if not given.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of training and sampling.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Distil a student from the tiny teacher and compare them on held-out scenes."""
    from fvgen.demo import demo as run_demo
    from fvgen.demo import print_table

    console = Console()
    report = run_demo(out, data, seed, device)
    print_table(report, console)
    console.print(f"Pictures: {out / 'report.html'}")


def guarded(call: Callable[[], object]) -> None:
    """Run ``call``; a `UserError` becomes one sentence on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        call()
    except UserError as error:
        print(f"fvgen: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fvgen: interrupted; the same command again resumes", file=sys.stderr)
        sys.exit(130)


def main() -> None:
    guarded(app)


if __name__ == "__main__":
    main()
