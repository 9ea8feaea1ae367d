"""`python -m ops.cli.nursery CONFIG MODELS PID SOCKET …`: the process that `katana run` has its roles forked from."""

import socket
import sys

from ops.cli.main import main
from ops.run.forking import serve


def _nursery() -> int:
    _, _config, models, parent, line, *_ = sys.argv
    words = serve(socket.socket(fileno=int(line)), int(parent), [name for name in models.split(",") if name])
    return 0 if words is None else main(words)


if __name__ == "__main__":  # a role may start processes that import the module by which it began
    sys.exit(_nursery())
