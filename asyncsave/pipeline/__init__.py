"""One save, from the state to the committed checkpoint: its threads, its memory, its handle."""
