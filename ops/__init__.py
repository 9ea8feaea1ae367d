"""Commands and tools. `common` comes first, whatever a module here imports before it: see there."""

import common  # noqa: F401
