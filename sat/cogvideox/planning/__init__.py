"""What a run will need of a GPU, in closed form and without torch: memory by kind and phase, time, communication."""
