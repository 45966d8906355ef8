"""Runs a script, then leaves without taking Python down: `torchrun ... run_and_leave.py SCRIPT`.

gloo's threads let go of a collective after those who waited for it have gone on, and take Python's lock for what it
holds of the thread that began it. One that is so late that Python is being taken down ends the process by
std::terminate, whatever was trained (pytorch/pytorch#190489). destroy_process_group() waits for them if nobody else
holds the group; torch itself does: DTensor caches what it knows of FSDP2's parameters, with their mesh, and the default
arguments of torch.distributed.nn.functional are the group that was there when it was first imported.
"""

import os
import runpy
import sys

if __name__ == "__main__":
    runpy.run_path(sys.argv[1], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
