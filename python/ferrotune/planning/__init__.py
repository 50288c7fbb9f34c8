"""What a run will take of a GPU's memory, before there is a run: `ferrotune plan`."""
