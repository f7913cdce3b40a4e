"""The process that started this one."""

import os
import threading


def end_with_parent() -> None:
    """Whatever ends the command that started this closes its end of our stdin: end then too."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin: its lock would be held at our own end
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
