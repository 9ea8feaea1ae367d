"""What every process imports first.

Libraries read these variables once, when they are imported. Each breaks a run if the shell has set it for another
program.
"""

import os

# prometheus_client would write a file for each metric into that folder, or fail if it does not exist. Here each process
# serves its own metrics.
for _name in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"):
    os.environ.pop(_name, None)
# matplotlib cannot be imported if it does not know the backend. Here pictures are files, drawn by Agg.
os.environ["MPLBACKEND"] = "agg"
# Celery takes its loader, a config module and URLs from there. Here all of that comes from the config file.
for _name in [name for name in os.environ if name.startswith("CELERY_")]:
    del os.environ[_name]
