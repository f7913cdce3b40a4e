"""Watch the parent process."""

import os
import threading


def end_with_parent() -> None:
    """End this process when the parent has ended, which closes its end of this process' stdin."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock would block the end of this process
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
