"""Is a model getting better? Fixed held-out losses with error bars, and distances between sets of videos."""
