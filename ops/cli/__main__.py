"""`python -m ops.cli`: the command `katana` with this Python."""

import sys

from ops.cli.main import main

sys.exit(main())
