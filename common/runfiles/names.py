"""Names of the files and folders in a run's folder; docs/run-folder.md describes their contents and writers."""

CONFIG, RUN, DATA_ROWS = "config.yaml", "run.json", "data.rows"
ROLLOUTS, TRACES, AUDIT, LEDGER = "rollouts.jsonl", "traces.jsonl", "audit.jsonl", "ledger.json"
METRICS, TRAINED, COUNTED = "metrics.jsonl", "trained.jsonl", "counted.json"
WEIGHTS, CHECKPOINTS, MODEL = "weights", "checkpoints", "model"
TO_EVALUATE, EVALUATIONS = "eval", "eval.jsonl"
SUMMARY, WALL, BUSY = "summary.json", "wall.json", "busy.json"
REPORT_PAGE, REPORT_PICTURE, REPORT_PLOTS = "report.html", "report.png", "figures"
REPLAYS, AUDITS = "replay", "audit"
LOGS, REDIS, TENSORBOARD, WANDB = "logs", "redis", "tensorboard", "wandb"
CHAOS, SOAK, MEMORY = "chaos.json", "soak.json", "memory.jsonl"

LOCK, BOOKS_LOCK, LEARNER_LOCK, REPORT_LOCK = ".lock", ".books.lock", ".learner.lock", ".report.lock"
