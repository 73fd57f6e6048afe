"""Runs pytest in forks of this process, which has imported what takes long: the modules that are its arguments.

Each line of its input is JSON: `package`, a folder that imports go by first; `root`, where to run; `tests`, what pytest
is given; `out`, a file for what it prints; `seconds` that it may take. Each is answered by a line, the exit status: 0
where all passed, 1 where one failed, less than 0 where the fork was ended.
"""

import importlib
import json
import os
import signal
import sys
import time
import traceback
from typing import Any, NoReturn

import pytest

OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
# Plugins may be imported already, as torch and others need some: their own asserts are not rewritten then.
OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]


def fork(asked: dict[str, Any]) -> NoReturn:
    """Be the fork."""
    out = os.open(asked["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(asked["root"])
    sys.path.insert(0, asked["package"])
    os.environ["PYTHONPATH"] = asked["package"]  # of processes that tests start
    status = 3
    try:
        status = int(pytest.main([*OPTIONS, "-o", f"timeout={asked['seconds']}", *asked["tests"]]))
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(child: int, seconds: float) -> int:
    """The exit status of a fork, which is ended after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)


def main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            fork(asked)
        print(wait(child, asked["seconds"]), flush=True)


if __name__ == "__main__":
    main()
