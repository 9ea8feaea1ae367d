"""What stands in Redis: records, scripts, keys, leases, and how processes reach it."""
