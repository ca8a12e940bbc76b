"""Shared by the workers: requests come in as lines of JSON, answers go out as lines of JSON.

The workers run in other programs' interpreters, where neither this package nor a current Python need be installed.
"""

import json
import os
import sys
import traceback


def serve(start):
    """Answers requests until stdin ends, asleep in between so that others have the machine to themselves.

    Args:
        start: makes the function from a request (a dict) to an answer (a dict), which has the program's `version`. The
            first line out tells how it went.
    """
    # What libraries print must not get between the answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value):
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    def attempt(function, *arguments):
        try:
            return function(*arguments)
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}"})
            return None

    handle = attempt(start)
    if handle is None:
        return
    answer({"version": handle.version})
    for line in sys.stdin:
        result = attempt(handle, json.loads(line))
        if result is not None:
            answer(result)
