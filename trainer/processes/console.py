"""The console, which may not know every character."""

import io
import sys


def accept_any_text() -> None:
    r"""From here on, a character that the console cannot show is printed as its code, such as `\xd7` for ×.

    Consoles with another encoding than UTF-8 (LANG=C, Windows code pages) would end the program with an error instead.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook, or a test, may have put something else there
            stream.reconfigure(errors="backslashreplace")
