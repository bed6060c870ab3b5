"""Lightning callbacks of our own."""
