"""The commands that manage accounts on the machine itself, without a server."""
