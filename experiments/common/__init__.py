"""What studies of real data share: rivals, scores and the files that let a run go on."""
