"""
The process that evaluates one checkpoint: `python -m trl_entropy.evaluation JOB PARENT TEMPORARY`.

JOB is the JSON of [`trl_entropy.evaluation.plan.Job`], PARENT the process id of the process with which this one ends,
and TEMPORARY the folder for temporary files, which is removed then.
"""

from __future__ import annotations

import sys

from trl_entropy.evaluation.session import end_with


def main() -> None:
    """Evaluate; the imports that take long begin when the end of the parent is watched for already."""
    job, parent, temporary = sys.argv[1:]
    end_with(int(parent), temporary)
    from trl_entropy.evaluation.worker import run

    run(job)


if __name__ == "__main__":
    main()
