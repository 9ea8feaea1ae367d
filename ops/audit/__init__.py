"""`katana audit`: whether cut rollouts could still have come out right."""
