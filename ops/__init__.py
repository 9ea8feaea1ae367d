"""Commands and tools. Katana's own `common` is imported first, see `common/own_packages.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parents[1]))  # another `common` may lie in the working directory
from common import own_packages

del sys.path[0]
own_packages.find_first()
