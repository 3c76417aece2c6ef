"""How does a worker start out of its one file? This is __main__.py in worker.pyz.

It must be readable by any Python, or the one that is too old could not say so.
"""

import sys

if sys.version_info < (3, 9):  # noqa: UP036
    sys.exit("worker.pyz needs Python 3.9 or newer, this is " + sys.version.split()[0] + ": start it with a newer one")

import runpy

runpy.run_module("worker", run_name="__main__", alter_sys=True)
