"""Python runs this before a server's processes when this directory is on PYTHONPATH: watches the event loop.

Only an API process is touched, and only where the variable LAG_FILE says where the lags go: lines of when a
short sleep ended, on the monotonic clock, and how much too late, but not more than the process has computed
meanwhile: what other processes take from the cores is not this one's fault. The variable NEXT_SWITCH may name
another file like this. No code of the server knows of any of this.
"""

import os
import runpy
import sys

if os.environ.get("NEXT_SWITCH"):
    runpy.run_path(os.environ["NEXT_SWITCH"])

if os.environ.get("LAG_FILE") and "serve" in sys.orig_argv:
    import asyncio
    import time
    from collections.abc import Coroutine
    from pathlib import Path
    from typing import Any

    import uvloop

    SLEEP_SECONDS = 0.005
    run = uvloop.run

    async def watch() -> None:
        with Path(os.environ["LAG_FILE"]).open("w", buffering=1) as lags:
            began, computed = time.monotonic(), time.process_time()
            while True:
                await asyncio.sleep(SLEEP_SECONDS)
                ended = time.monotonic()
                lag = min(ended - began - SLEEP_SECONDS, time.process_time() - computed)
                lags.write(f"{ended} {lag}\n")
                began, computed = time.monotonic(), time.process_time()

    def run_watched(main: Coroutine[Any, Any, Any]) -> Any:
        async def watched() -> Any:
            watching = asyncio.create_task(watch())
            try:
                return await main
            finally:
                watching.cancel()

        return run(watched())

    uvloop.run = run_watched
