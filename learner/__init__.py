"""The learner: from trimmed trajectories to published weights and checkpoints."""
