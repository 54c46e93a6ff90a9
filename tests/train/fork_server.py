"""Starts programs fast: imports training once, then forks the ranks of each program from there.

Reads a line of JSON for each: the program's code, its arguments, the environment of every rank and
the folder for what they print. Answers with their process ids, and with their exit codes once all
have ended. A process killed by signal N has the code −N.
"""

import json
import os
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


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        pids = [start(request, rank) for rank in range(len(request["environments"]))]
        print(json.dumps(pids), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":  # workers of the programs import this file under another name
    main()
