"""`python -m toptwo` is the command `toptwo`."""

from toptwo.cli import main

main()
