"""What `toptwo model ...` does: commands that work on a checkpoint and serve nobody.

Each command is a module with one public function of the same name; `cli` parses its arguments.
"""
