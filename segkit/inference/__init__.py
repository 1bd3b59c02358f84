"""From checkpoints to masks: soups, views, votes, and files of results."""
