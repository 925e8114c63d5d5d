"""What a run keeps on disk or in object storage."""
