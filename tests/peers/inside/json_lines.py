"""Does the tasks that come as lines of JSON on stdin, and answers each with one on stdout."""

import json
import os
import sys


def serve(tasks):
    """Do what comes until stdin ends; ``tasks`` are the functions by name."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the program prints is not an answer
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"value": tasks[name](**arguments)}
        except (Exception, SystemExit) as exc:  # noqa: BLE001 - all of it is an answer
            answer = {"raised": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), file=answers, flush=True)
