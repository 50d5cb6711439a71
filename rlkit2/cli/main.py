"""`rlkit2 COMMAND ...`: finds the command, imports only its file, and turns every rlkit2 error into one line."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches

from rlkit2.errors import Preempted, RLKitError, first_line
from rlkit2.files import FULL, write_failure
from rlkit2.terminal import options_of

REQUEUE = 75  # exit status of work that was preempted and saved: EX_TEMPFAIL, try again

# command -> (module with `run(arguments: Sequence[str]) -> int | None`, one-line help)
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("rlkit2.cli.demo", "the main job on a built-in dataset in about two minutes"),
    "data": ("rlkit2.cli.data", "list, inspect, check, build, import and relabel datasets"),
    "train": ("rlkit2.cli.train", "train an agent on a dataset, several seeds together; resume a run"),
    "sweep": ("rlkit2.cli.sweep", "train many runs from one file; resumable"),
    "benchmark": ("rlkit2.cli.benchmark", "agents by datasets with one setting each: table, page, results that grow"),
    "evaluate": ("rlkit2.cli.evaluate", "play episodes with a trained policy and score it; --offline: from data alone"),
    "export": (
        "rlkit2.cli.export",
        "one file that acts as a policy does, in another program: ONNX, torch, safetensors",
    ),
    "push": ("rlkit2.cli.push", "put a run or policy on a hub, with a generated card"),
    "pull": ("rlkit2.cli.pull", "fetch a run or policy from a hub, every checksum compared"),
    "select": ("rlkit2.cli.select", "rank runs by what they would earn, judged from data alone"),
    "compare": ("rlkit2.cli.compare", "final scores of runs side by side, with intervals"),
    "report": ("rlkit2.cli.report", "one self-contained HTML page about runs"),
    "entangle": (
        "rlkit2.cli.entangle",
        "why both log-probabilities fall: losses, a model's gradients, a demonstration",
    ),
    "doctor": ("rlkit2.cli.doctor", "versions, optional parts, devices, dataset roots, write access"),
    "starc": ("rlkit2.cli.starc", "distances between rewards: exact, from data, and the regret study"),
    "prefs": ("rlkit2.cli.prefs", "label segments, fit a reward to the labels, and run the loop to a policy"),
    "uncertainty": ("rlkit2.cli.uncertainty", "whether a run's error bars are true: calibration, tails, ignorance"),
}


def usage() -> str:
    """The text of `rlkit2 --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rlkit2 COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "rlkit2 COMMAND --help explains a command and shows an example.",
            "Every command takes --quiet (results, warnings and errors only) and --plain (no colours, nothing that moves).",
            "rlkit2 --version; rlkit2 --completion bash (or zsh) prints a script that completes commands and options.",
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 fine, 1 the command found errors, 2 bad input, 75 preempted, 130 interrupted)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Warnings are for users here: a line without the place in the code.
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"rlkit2: {message}\n"
    try:
        status = _run(arguments)
        sys.stdout.flush()  # here, where a full disk can still be said
        return status
    except RLKitError as error:
        sys.stderr.write(f"rlkit2: {error}\n")
        return 2
    except Preempted as error:
        sys.stderr.write(f"rlkit2: {error}: saved; the same work continues where it was\n")
        return REQUEUE
    except KeyboardInterrupt:
        sys.stderr.write("rlkit2: interrupted\n")
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:
        if error.errno not in FULL:
            raise
        sys.stderr.write(f"rlkit2: {write_failure(error, error.filename)}\n")
        return 2
    except (MemoryError, ImportError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        sys.stderr.write(f"rlkit2: not enough memory{_memory_limit()}: {first_line(error)}\n")
        return 2
    finally:
        warnings.formatwarning = before


def _run(arguments: Sequence[str]) -> int:
    """What the first word says."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from rlkit2 import __version__

        sys.stdout.write(f"rlkit2 {__version__}\n")
        return 0
    if arguments[0] == "--completion":
        from rlkit2.cli.completion import completion

        try:
            sys.stdout.write(completion(arguments[1] if arguments[1:] else ""))
        except RLKitError as error:
            sys.stderr.write(f"rlkit2: {error}\n")
            return 2
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {close[0]}?" if close else f"; commands: {', '.join(COMMANDS)}"
        sys.stderr.write(f"rlkit2: unknown command {name!r}{hint}\n")
        return 2
    with options_of(rest) as own:
        status: int | None = importlib.import_module(COMMANDS[name][0]).run(own)
    return status or 0


def _out_of_memory(error: BaseException) -> bool:
    """Also as the loader of libraries and torch's allocators say it."""
    texts = ("failed to map segment", "cannot allocate memory", "can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)


def _memory_limit() -> str:
    """What the shell allows this process, where it limits it."""
    try:
        import resource
    except ImportError:  # no such limits on this system
        return ""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return (
        "" if soft == resource.RLIM_INFINITY else f" (ulimit -v allows {soft / 2**30:.2g} GiB; rlkit2 needs at least 1)"
    )


if __name__ == "__main__":
    sys.exit(main())
