"""What becomes of finished rows: one kind of output file each."""
