"""The commands: `dfssd NAME ...`, and `python jobs/NAME.py ...` for those that run under `ray job submit`."""

from __future__ import annotations

import importlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dfssd.errors import find_user_error, nearest
from dfssd.version import __version__

HALF_STARTED_S = 8.0  # that an interrupted job waits for a Ray that is being started; who asks it to end waits for 30 s


class Command(NamedTuple):
    """One command: what it does, in one line, and the "module:function" that takes the words after its name."""

    does: str
    job: str


COMMANDS = {
    "pipeline": Command("all stages in order: from images to a measured student", "dfssd.jobs.pipeline:job"),
    "prepare": Command("check images and labels, split, choose the labelled subset", "dfssd.jobs.prepare:job"),
    "teacher": Command("train on labels alone: the teacher, or the label-only student", "dfssd.jobs.teacher:job"),
    "mean_teacher": Command("let the teacher go on with the unlabelled images too", "dfssd.jobs.mean_teacher:job"),
    "pseudo_label": Command("label the unlabelled images, and measure the labels", "dfssd.jobs.pseudo_label:job"),
    "distill": Command("train the student on labels, pseudo-labels and its teacher", "dfssd.jobs.distill:job"),
    "evaluate": Command("measure all finished models, write the report", "dfssd.jobs.evaluate:job"),
    "track": Command("deliver to MLflow what it missed while it was down", "dfssd.jobs.track:job"),
    "export": Command("write the student for the line, and prove that it finds the same", "dfssd.jobs.export:job"),
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
    module, _, function = COMMANDS[name].job.partition(":")
    words = sys.argv[1:] if words is None else words
    if "--version" in words:
        print(f"dfssd {__version__}")
        return
    main(lambda: getattr(importlib.import_module(module), function)(words))


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
