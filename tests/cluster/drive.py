"""`python drive.py '{"specs": […], "settings": {…}}'`: a sweep, its events a line of JSON each."""

import json
import sys

from gradflow.spec import RunSpec
from gradflow.sweep import sweep


def say(event):
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    result = sweep(
        [RunSpec.from_dict(spec) for spec in asked["specs"]], display=say, **asked["settings"]
    )
    failures = {spec.name: error for spec, error in result.failures}
    say({"event": "result", "counts": result.counts, "failures": failures})
    sys.exit(1 if failures else 0)
