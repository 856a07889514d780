"""What a training run is put together from, and what it leaves behind."""
