"""How a process ends while a thread of it is in a call of the store that has not returned."""

import subprocess
import sys

import pytest
from support.levels import full

# The call returns while the interpreter ends: the deletion of an object, which comes then, answers it and waits.
ENDING = """
import os, sys, time
from datetime import timedelta
from torch.distributed import TCPStore
from megapromoe.distributed.launch_environment import StoreUnreachable
from megapromoe.distributed.process_end import end_if_abandoned
from megapromoe.distributed.store_channel import StoreChannel

class SlowDeletion:
    def __init__(self, store): self.store = store
    def __del__(self):
        self.store.set("anything", "now")
        time.sleep(60)

class SilentStore:
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    def check(self, names): return self.store.wait(names)

# Deleted with the modules. A variable of this module would not be: the frames of the waiting thread keep them alive.
sys.modules["slow"] = SlowDeletion(TCPStore("127.0.0.1", SilentStore.store.port, None, False))
channel = StoreChannel(SilentStore(), 0, 2, timeout=0.1, receive_timeout=1)
try:
    channel.receive_if_sent("anything")
except StoreUnreachable:
    channel.close()
    print("unreachable")
    PREVENTION
    sys.exit(75)
"""


@pytest.mark.parametrize(("prevention", "code"), [("end_if_abandoned(75)", 75), full("", -6)], ids=["prevented", "not"])
def test_the_exit_code_is_kept_if_a_call_of_the_store_has_not_returned(prevention, code):
    """Python aborts otherwise."""
    program = ENDING.replace("PREVENTION", prevention)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert "unreachable" in done.stdout
