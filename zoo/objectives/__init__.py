"""What the tiny models learn, stage by stage; each class is a row of zoo/pyproject.toml (`relook.objectives`)."""
