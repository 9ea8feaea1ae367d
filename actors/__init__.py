"""The roles around the rollouts. `celery -A actors.app worker` starts here: Katana's own `common` is imported first."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parents[1]))
from common import own_packages

del sys.path[0]
own_packages.find_first()
