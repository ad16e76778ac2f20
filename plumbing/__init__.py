"""What no paper mentions: files, processes, checkpoints, logs. Nothing here knows the method."""
