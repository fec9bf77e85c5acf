"""Python runs this before a server's processes when this directory is on PYTHONPATH: the switch of faults.

Only an engine process is touched, and only where the variable FAULTS asks for it; see `injected_faults`.
No code of the server knows of any of this.
"""

import os
import sys

if os.environ.get("FAULTS") and "toptwo.launch_engine" in sys.orig_argv:
    import injected_faults

    injected_faults.install(os.environ["FAULTS"], generation=sys.orig_argv[-1])
