"""`python -m ops.cli`: the command `katana`, by the Python that runs."""

import sys

from ops.cli.main import main

sys.exit(main())
