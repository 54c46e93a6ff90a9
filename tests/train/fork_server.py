"""Starts programs fast: imports training once, then forks the ranks of each program from there.

Reads a line of JSON for each: the program's code, its arguments, the environment of every rank and
the folder for what they print. Answers by files in that folder: ``pids``, and ``codes`` once all
have ended. A process killed by signal N has the code −N. Programs may run at the same time.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import lst.train.__main__  # noqa: F401  what the programs need, imported once


def start(request: dict[str, Any], rank: int) -> int:
    log = os.open(Path(request["log"]) / f"rank-{rank}.log", os.O_CREAT | os.O_WRONLY)
    pid = os.fork()
    if pid:
        os.close(log)
        return pid
    code = 1
    try:
        os.environ.update(request["environments"][rank])
        for stream in (1, 2):
            os.dup2(log, stream)
        sys.argv = ["program", *request["arguments"]]
        exec(compile(request["code"], "program", "exec"), {"__name__": "program"})
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def answer(request: dict[str, Any], name: str, numbers: list[int]) -> None:
    path = Path(request["log"]) / name
    path.with_suffix(".tmp").write_text(json.dumps(numbers))
    path.with_suffix(".tmp").rename(path)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for ranks
    for line in sys.stdin:
        if os.fork():
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        request = json.loads(line)
        pids = [start(request, rank) for rank in range(len(request["environments"]))]
        answer(request, "pids", pids)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        answer(request, "codes", codes)
        os._exit(0)


if __name__ == "__main__":  # workers of the programs import this file under another name
    main()
