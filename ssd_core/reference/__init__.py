"""The plain definition of every op: the truth that all backends are tested against."""
