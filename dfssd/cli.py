"""The commands: `dfssd NAME ...`, and `python jobs/NAME.py ...` for those that run under `ray job submit`."""

from __future__ import annotations

import functools
import importlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dfssd.errors import find_user_error, nearest
from dfssd.pipeline.stages import STAGES
from dfssd.version import __version__

HALF_STARTED_S = 8.0  # that an interrupted job waits for a Ray that is being started; who asks it to end waits for 30 s


class Command(NamedTuple):
    """One command: what it does, in one line, and the "module:function" that takes the words after its name; '' where it runs
    the stages that name it, and no more."""

    does: str
    job: str


def _of_stages() -> dict[str, Command]:
    """The commands of single stages, from their table; where several share one, the first describes it."""
    found = dict[str, Command]()
    for row in STAGES:
        found.setdefault(row.command_name, Command(row.command.does or row.does, row.command.job))
    return found


COMMANDS = {
    "pipeline": Command("all stages in order: from images to a measured student", "dfssd.jobs.pipeline:job"),
    **_of_stages(),
    "track": Command("deliver to MLflow what it missed while it was down", "dfssd.jobs.track:job"),
    "suggest": Command("the unlabelled images most worth a label", "dfssd.jobs.suggest:job"),
    "review": Command("labels out to Label Studio, CVAT, COCO or YOLO, and back", "dfssd.jobs.review:job"),
    "predict": Command("label pictures with an exported model, or a folder as they arrive", "dfssd.jobs.predict:job"),
    "sweep": Command("many runs with Ray Tune, and a table of what came of them", "dfssd.jobs.sweep:job"),
}


def console() -> None:
    """The command `dfssd`."""
    words = sys.argv[1:]
    if words[:1] == ["--version"]:
        print(f"dfssd {__version__}")
    elif not words or words[0] in ("-h", "--help"):
        print(overview())
    elif words[0].replace("-", "_") in COMMANDS:
        run(words[0].replace("-", "_"), words[1:])
    else:
        print(f"error: dfssd has no command {words[0]!r}{nearest(words[0], COMMANDS)}\n", file=sys.stderr)
        print(overview(), file=sys.stderr)
        sys.exit(2)


def overview() -> str:
    """All commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.does}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "dfssd: train a small, fast defect detector from few labels and many unlabelled images, on a Ray cluster",
            "",
            *lines,
            "",
            "dfssd COMMAND --help shows what a command takes, dfssd --version the version.",
        ]
    )


def run(name: str, words: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        words: what follows its name; default the words of the process.
    """
    words = sys.argv[1:] if words is None else words
    if "--version" in words:
        print(f"dfssd {__version__}")
        return
    main(lambda: job_of(name)(words))


def job_of(name: str) -> Callable[[Sequence[str]], None]:
    """What takes the words after a command's name."""
    module, _, function = (COMMANDS[name].job or "dfssd.jobs.stages:run_rows").partition(":")
    found: Callable[..., None] = getattr(importlib.import_module(module), function)
    return found if COMMANDS[name].job else functools.partial(found, name)


def _terminate(number: int, frame: object) -> None:
    """SIGTERM is an orderly end, as Ctrl-C is: leases are given back and the user is told how to go on."""
    signal.alarm(0)  # Ray's own handler, which may have come first, would abort the process three seconds from now
    raise KeyboardInterrupt


def _reader_is_gone() -> bool:
    """Does nobody read what is printed, as after `dfssd ... | head`? Then it goes nowhere from now on: the interpreter's own
    flush at its end would complain (Python's documentation, "Note on SIGPIPE")."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    if not pipe.poll(0):  # POLLERR: the other end is closed
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def main(job: Callable[[], None]) -> None:
    """Run a job; user errors end as text on stderr with exit code 2, Ctrl-C and SIGTERM with 130 and how to go on."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        job()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as error:
        if (
            isinstance(error, SystemExit) and error.code != signal.SIGTERM
        ):  # Ray's handler ends with the signal's number
            raise
        print("\ninterrupted: the same command goes on from here", file=sys.stderr, flush=True)
        cluster = sys.modules.get("dfssd.runtime.cluster")
        if cluster is not None and cluster.is_half_started(HALF_STARTED_S):
            sys.stdout.flush()
            os._exit(130)  # the end of an interpreter in which Ray is half started may be an abort
        sys.exit(130)
    except Exception as error:
        user_error = find_user_error(error)
        if user_error is None:
            raise
        print(f"\nerror: {user_error}", file=sys.stderr)
        sys.exit(2)
