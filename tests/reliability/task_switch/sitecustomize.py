"""Python runs this before a server's processes when this directory is on PYTHONPATH: SIGUSR1 counts tasks.

Only an API process is touched, and only where the variable TASKS_FILE says where the number goes; NEXT_SWITCH
may name another file like this. No code of the server knows of any of this.
"""

import os
import runpy
import sys

if os.environ.get("NEXT_SWITCH"):
    runpy.run_path(os.environ["NEXT_SWITCH"])

if os.environ.get("TASKS_FILE") and "serve" in sys.orig_argv:
    import asyncio
    import signal
    from pathlib import Path

    def count_tasks(_number: int, _frame: object) -> None:
        """Called between two instructions of the event loop's thread, so nothing changes meanwhile."""
        path = Path(os.environ["TASKS_FILE"])
        beside = path.with_suffix(".new")
        beside.write_text(str(len(asyncio.all_tasks())))
        beside.rename(path)

    signal.signal(signal.SIGUSR1, count_tasks)
