"""Compilers and devices that judge a plan. Each is a module with one contract:

`lower(block, choice, path, ...)` writes the target's own file; `estimate(path, profile)` asks the vendor's offline compiler, which
gives estimates and never device results; both raise TargetUnavailable with the line that installs what is missing.
"""
