"""Files that are computed once and found again by what decides their contents."""
