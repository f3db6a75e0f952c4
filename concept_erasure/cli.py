"""Command line: ``concept-erasure list | fit | apply | eval | compare | sae | card | demo``.

This module only starts the program: it turns every expected error into one line on standard error
and exit code 2. The commands and their options are in ``_commands.py``, what they do is in
``_commands_vectors.py``, ``_commands_language.py``, ``_commands_pipe.py`` and ``_commands_sae.py``,
reading files is in ``_cli_data.py``.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from typing import TYPE_CHECKING

from concept_erasure.errors import ConceptErasureError, missing_extra

if TYPE_CHECKING:
    from collections.abc import Sequence

    from concept_erasure._commands import Command

__all__ = ["main"]

EXPECTED = (ConceptErasureError, ImportError, LookupError, OSError, TypeError, ValueError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name. Default: those of the process.

    Returns:
        The exit code: 0, or 2 after an error that has been explained in one line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    verbose = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            _run(arguments)
    except EXPECTED as error:
        if verbose:
            raise
        sys.stderr.write(f"error: {_one_line(error)}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0


def _run(arguments: list[str]) -> None:
    """Parse the arguments and run the command they name."""
    try:
        import tyro
    except ImportError:
        raise missing_extra("tyro", "cli") from None
    from concept_erasure._commands import COMMANDS

    command: Command = tyro.extras.subcommand_cli_from_dict(
        dict(COMMANDS),
        prog="concept-erasure",
        description="Erase concepts from vectors and language models, and report what it did.",
        args=arguments,
    )
    command.run()


def _one_line(error: BaseException) -> str:
    """Return an error's message on one line; KeyError's quotes are dropped."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return _for_shell(text) or type(error).__name__


def _for_shell(text: str) -> str:
    """Return a message of the library on one line, with options as they are typed in a shell."""
    text = re.sub(r"(?:\b\w+\()?\b([a-z]\w*)=('?)([\w.]+)\2\)?", _typed, text)
    text = re.sub(r"^([a-z]\w*)(?= must be )", _named, text)
    text = re.sub(r"\b(attach\(\)|with_space\(None\))(?! from Python)", r"\1 from Python", text)
    return " ".join(text.split())


def _typed(match: re.Match[str]) -> str:
    from concept_erasure._commands import OPTIONS

    name, _, value = match.groups()
    return f"--{name.replace('_', '-')} {value}" if name in OPTIONS else match.group()


def _named(match: re.Match[str]) -> str:
    from concept_erasure._commands import OPTIONS

    name = match.group()
    return f"--{name.replace('_', '-')}" if name in OPTIONS else name


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    """Write a warning on one line, without the source line that raised it."""
    del filename, lineno, file, line
    sys.stderr.write(f"warning: {_for_shell(str(message))}\n")


if __name__ == "__main__":
    sys.exit(main())
