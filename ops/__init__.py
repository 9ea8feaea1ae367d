"""Commands and tools. Our `common` comes first, whatever a module here imports before it: see there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parents[1]))  # another `common` may lie in the working directory
from common import own_packages

del sys.path[0]
own_packages.find_first()
