"""Following one task point by point: what an update of the last layer is worth beside conditioning afresh."""
